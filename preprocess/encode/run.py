"""The story of `preprocess encode`: plan -> work (decode -> tower -> pool -> write) -> finish.

    encode(["videos/"], Path("bank"), EncodeOptions(tower="google/siglip-so400m-patch14-384",
           strides=(4, 8), sampling=Sampling(fps="1", max_frames=64)))

A rerun goes on where the last one stopped: `units_left` skips shards that are finished, and a shard that
is not continues after its last whole clip (`shards/write/journal.py`). Other features in the same folder
are refused; a clip that fails is named in `quarantine.jsonl` and never stops the run. `bank.json` is
written last.

The three steps are commands, too: one process plans, any number on any machines work, one finishes.
Torch is imported with the tower, so a run that finds nothing to do ends without it.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preprocess.decode.archive import Unpacker
from preprocess.encode.beside import shared_out
from preprocess.encode.features import (
    EncodeOptions,
    coarse_strides,
    feature_config,
    plan_codec,
    predicted_bytes,
)
from preprocess.encode.jobs import first_jobs
from preprocess.encode.pipeline.decoders import Decoders, decoders_for
from preprocess.encode.pipeline.summary import Summary
from preprocess.encode.planning import (
    Survey,
    calibrated,
    fitting,
    make_plan,
    note,
    units_left,
)
from preprocess.encode.tower import Loading, as_banked, devices_of, refuse_other_device
from preprocess.encode.workers import Work, encode_in_processes, encode_work
from preprocess.sources.changes import Changes
from preprocess.sources.find import Found, clips_under, find_clips
from preprocess.sources.probe import probe
from preprocess.sources.skips import write_skips
from shards.errors import UserError, disk_errors
from shards.format.beside import banks_of
from shards.format.plan import (
    ClipSource,
    Plan,
    PlanAsRead,
    plan_as_read,
    planned,
    refuse_derived,
    refuse_other_features,
    refuse_other_reader,
)
from shards.format.quarantine import read_entries
from shards.write.beside import pair
from shards.write.finish import finish, import_ahead, refuse_unfinished
from shards.write.lease import sweep
from shards.write.lock import folder_lock

if TYPE_CHECKING:
    from model.tower.tower import Tower

__all__ = ["EncodeOptions", "calibrated", "encode", "execute", "make_plan", "plan_clips", "work"]


def encode(
    inputs: Sequence[str],
    out: Path,
    options: EncodeOptions,
    *,
    procs: int | None = None,
    decoders: int | None = None,
    prune: bool = False,
) -> Summary:
    """Bank the features of every clip of the inputs; return what was done and what failed.

    procs: processes, each with its own tower and decoders; None for one on each of the options' devices.
    decoders: per process; None for cores / towers. prune: stop serving clips whose sources no longer
    exist.
    """
    found = find_clips(inputs, options.find)
    return encode_clips(found, out, options, procs=procs, decoders=decoders, prune=prune)[0]


def encode_clips(
    found: Found,
    out: Path,
    options: EncodeOptions,
    *,
    procs: int | None = None,
    decoders: int | None = None,
    prune: bool = False,
    seen: PlanAsRead | None = None,
) -> tuple[Summary, Changes]:
    """Do what `encode` does for clips that were found already; returns the changes, too.

    Strides that a bank has not are made beside it, after it is brought up to date. seen: the bank's
    plan, where it has been read.
    """
    seen = plan_as_read(out, seen)
    how: dict[str, Any] = {"procs": procs, "decoders": decoders, "prune": prune}
    # -- the bank first, then what is beside it: sides take the clips that the bank serves by then
    own, beside = shared_out(out, seen.plan, options)
    summary, changes = _encode_bank(found, out, own, seen, **how)
    for side in beside:
        clips, empty = side.begun(changes.plan, found)
        seen = plan_as_read(side.path, empty=empty)
        more, _ = _encode_bank(clips, side.path, side.options, seen, clips.clips, **how)
        summary = summary.beside(more)
    for why in pair(out, "preprocess encode"):
        note(why)
    return summary, changes


def _encode_bank(
    found: Found,
    out: Path,
    options: EncodeOptions,
    seen: PlanAsRead,
    probed: list[ClipSource] | None = None,
    *,
    procs: int | None,
    decoders: int | None,
    prune: bool,
) -> tuple[Summary, Changes]:
    """Make one bank of one plan. probed: the clips, where they have been looked at."""
    with Decoders(decoders or decoders_for(1), Unpacker(out)) as ahead:
        # more processes have decoders of their own
        early = ahead if (procs or 1) == 1 and len(options.devices) < 2 else None
        loading, probed = _before_a_folder(out, found, options, probed, early=early)
        with disk_errors(out), folder_lock(out, "preprocess encode"):
            # under the lock: another process may have planned in between
            known = plan_as_read(out, seen).plan
            options = as_banked(options, known)
            # loaded in a thread while clips are probed, and only if some unit is left
            if loading is None and (known is None or units_left(out, known)):
                loading = Loading(options)
            survey = Survey.of(out, found.clips, options, known, probed)
            if loading is None and (changes := survey.of_nothing(out, options, prune=prune)):
                write_skips(out, found.skips)
                # what workers that died have left of finished units
                sweep(out)
                return _with_earlier(out, changes.plan, found.clips, Summary()), changes
            tower, options = (loading or Loading(options)).tower()
            changes, options = make_plan(
                out, found.clips, tower, options, prune=prune, survey=survey
            )
            write_skips(out, found.skips)
            plan = changes.plan
            summary = execute(out, plan, found.clips, tower, options, procs, decoders, early)
            return summary, changes


@dataclass(frozen=True)
class Planned:
    """A bank, or a side of one, that was planned."""

    bank: Path
    tower: "Tower"
    changes: Changes
    options: EncodeOptions


def plan_clips(
    found: Found,
    out: Path,
    options: EncodeOptions,
    *,
    prune: bool = False,
    seen: PlanAsRead | None = None,
) -> list[Planned]:
    """Write the plans that `encode_clips` would execute, and encode nothing."""
    seen = plan_as_read(out, seen)
    own, beside = shared_out(out, seen.plan, options)
    made = [_plan_bank(found, out, own, seen, prune=prune)]
    for side in beside:
        clips, empty = side.begun(made[0].changes.plan, found)
        seen = plan_as_read(side.path, empty=empty)
        made.append(_plan_bank(clips, side.path, side.options, seen, clips.clips, prune=prune))
    return made


def _plan_bank(
    found: Found,
    out: Path,
    options: EncodeOptions,
    seen: PlanAsRead,
    probed: list[ClipSource] | None = None,
    *,
    prune: bool,
) -> Planned:
    loading, probed = _before_a_folder(out, found, options, probed, here=False)
    with disk_errors(out), folder_lock(out, "preprocess plan"):
        known = plan_as_read(out, seen).plan
        loading = loading or Loading(as_banked(options, known), here=False)
        survey = Survey.of(out, found.clips, options, known, probed)
        tower, options = loading.tower()
        changes, options = make_plan(out, found.clips, tower, options, prune=prune, survey=survey)
        write_skips(out, found.skips)
        return Planned(out, tower, changes, options)


def _before_a_folder(
    out: Path,
    found: Found,
    options: EncodeOptions,
    probed: list[ClipSource] | None = None,
    *,
    here: bool = True,
    early: Decoders | None = None,
) -> tuple[Loading | None, list[ClipSource] | None]:
    """Load the tower and probe the clips if the bank does not exist yet; else (None, None).

    So what the tower cannot do is refused before a folder is made. early: decode the first clips
    meanwhile.
    """
    if out.exists():
        return None, probed
    loading = Loading(options, here=here)
    if probed is None:
        probed = probe(found.clips, {}, options.sampling)
    if early:
        early.begin(first_jobs(probed, options), options.batch_frames)
    # a stride that leaves no cell of the tower's grid raises here
    predicted_bytes(*loading.tower())
    for line in coarse_strides(*loading.tower()):
        note(line)
    return loading, probed


def execute(
    out: Path,
    plan: Plan,
    clips: Sequence[ClipSource],
    tower: "Tower",
    options: EncodeOptions,
    procs: int | None = None,
    decoders: int | None = None,
    early: Decoders | None = None,
) -> Summary:
    """Encode what is left of a plan. clips: of this run, whose earlier failures are reported, too. early:
    decoders of this process that have begun.

    If the GPU runs out of memory and the bank is still empty, this is repeated once with half the frames
    per batch, and plan.json records it, so that all features are made with one batch shape. Otherwise
    GpuMemoryError is raised.
    """

    import_ahead()

    def made(plan: Plan, options: EncodeOptions) -> Summary:
        left = units_left(out, plan)
        work = _work(out, plan, left, "preprocess encode", decoders=decoders)
        summary = _encode_left(work, plan, tower, options, procs, early)
        # units may be held by workers elsewhere, who go on after this process
        refuse_unfinished(out, plan, f"`preprocess finish {out}` when they are made")
        with disk_errors(out):
            finish(out, plan, tower)
        undone = {clip.id for unit in left.values() for clip in unit}
        return _with_earlier(out, plan, clips, summary, undone)

    return fitting(out, plan, options, made)[0]


def _with_earlier(
    out: Path,
    plan: Plan,
    clips: Sequence[ClipSource],
    summary: Summary,
    undone: Collection[str] = (),
) -> Summary:
    """Return a run's summary with what earlier runs did: clips already banked, or in the quarantine."""
    entries, asked = read_entries(out), {clip.id for clip in clips}
    served = plan.served()
    there = {clip.id for clip in plan.clips if clip.key in served}
    failures = [entry for id_, entry in entries.items() if id_ in asked]
    return replace(summary, failures=failures, skipped=len(there - set(undone) - set(entries)))


def work(
    bank: Path,
    tower: str | None = None,
    roots: Sequence[str] = (),
    device: str = "cpu",
    *,
    devices: tuple[str, ...] = (),
    plan: Plan | None = None,
    procs: int | None = None,
    decoders: int | None = None,
    start: float = 0.0,
) -> Summary:
    """Encode units of a plan until none is left to take; any number of processes may do so at once.

    Strides planned beside the bank come after it. tower: its path or name on this machine, if it
    differs from the plan; another tower is refused. roots: folders to search for videos that are
    elsewhere than planned. start: the fraction of the units after which to begin, so that workers begin
    at different units. plan: of the bank, if already read. device, devices, procs: as for `encode`.
    """
    summaries, seen = list[Summary](), dict[Path, int]()
    # until no plan has more units than it had: clips and strides may be planned while workers are at it
    while plans := _grown(bank, seen, plan):
        for one, own in plans.items():
            seen[one] = len(own.units)
            # a derived bank is made of another bank's cells: no video has its features
            refuse_derived(one, own.features)
            # a tower is loaded only for a bank that has something left
            if left := units_left(one, own):
                refuse_other_reader(one, own)
                how = {"tower": tower} if tower else {}
                options = EncodeOptions.of_plan(own, device=device, devices=devices, **how)
                work = _work(one, own, left, "preprocess work", start, decoders)
                summaries.append(_work_on(work, own, options, roots, procs))
        plan = None
    return replace(Summary.of(summaries), seconds=sum(made.seconds for made in summaries))


def _grown(bank: Path, seen: Mapping[Path, int], plan: Plan | None) -> dict[Path, Plan]:
    """Return the plans of a bank and the banks beside it that have more units than were seen.

    plan: of the bank, if already read.
    """
    sides = {one: planned(one) for one in banks_of(bank) if plan is None or one != bank}
    every = sides if plan is None else {bank: plan} | sides
    return {one: own for one, own in every.items() if len(own.units) > seen.get(one, -1)}


def _work_on(
    work: Work, plan: Plan, options: EncodeOptions, roots: Sequence[str], procs: int | None
) -> Summary:
    if plan.quality is None:
        raise UserError(
            "its plan was not calibrated completely",
            where=work.out,
            fix="run `preprocess plan` again",
        )
    # while the tower loads, videos are searched for under the roots
    loading = Loading(options)
    if roots:
        units = {unit: clips_under(clips, roots) for unit, clips in work.units.items()}
        work = replace(work, units=units)
    tower, options = loading.tower()
    # by its weights: a folder of the same name on another machine may hold another tower
    refuse_other_features(work.out, feature_config(tower, options), plan.features)
    return _encode_left(work, plan, tower, options, procs)


def _work(
    bank: Path,
    plan: Plan,
    left: Mapping[int, list[ClipSource]],
    command: str,
    start: float = 0.0,
    decoders: int | None = None,
) -> Work:
    failed = read_entries(bank)
    return Work(bank, plan.features, plan_codec(plan), left, command, failed, start, decoders)


def processes(options: EncodeOptions, procs: int | None) -> int:
    """Return how many processes encode; print a note where GPUs are left idle. procs: if asked for."""
    devices = devices_of(options)
    if options.devices:
        return procs or len(devices)
    if (procs or 1) < len(devices):
        note(f"{procs or 1} of {len(devices)} GPUs will be used; --devices auto takes all")
    return procs or 1


def _encode_left(
    work: Work,
    plan: Plan,
    tower: "Tower",
    options: EncodeOptions,
    procs: int | None,
    early: Decoders | None = None,
) -> Summary:
    """Encode the units that no other process has made or holds."""
    if not work.units:
        return Summary()
    refuse_other_device(work.out, plan, options)
    # a process more than units would load a tower for nothing
    procs = min(processes(options, procs), len(work.units))
    if procs == 1:
        return encode_work(work, tower, options, early=early)
    if early:
        early.drop()
    tower.model.to("cpu")  # free the GPU's memory for the workers
    return encode_in_processes(work, options, procs)
