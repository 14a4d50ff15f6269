"""`preprocess status`: the progress of a bank, also while it is being written.

print(table(status(Path("bank"))))

Nothing is locked or changed; files that appear or disappear meanwhile are counted if they are found.
"""

import calendar
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from shards.care.garbage import dead_samples, dead_shards, disk_size, leftovers
from shards.care.inventory import Inventory, read_inventory
from shards.format.commits import done_path, journal_path, shard_name
from shards.format.features import FeatureConfig
from shards.format.manifest import Manifest
from shards.format.quarantine import QuarantineEntry, read_quarantine
from shards.text import counted, duration, in_bytes, printable, some
from shards.write.finish import failed_clips
from shards.write.journal import Written, journal_lines, written_of
from shards.write.lease import holders, tokens
from shards.write.lock import Writer, lock_path, writer_of


@dataclass
class Progress:
    """Units, clips and frames of a bank."""

    units_done: int = 0
    units_begun: int = 0
    units_left: int = 0
    """Neither finished nor begun."""
    clips: int = 0
    """Clips that are banked and served."""
    frames: int = 0
    clips_begun: int = 0
    """Clips in the journals of unfinished shards."""
    frames_begun: int = 0
    clips_left: int = 0
    clips_new: int = 0
    """Clips of the current run, in finished or begun units."""


@dataclass
class Status:
    """The state of a bank, found without opening it."""

    bank: Path
    features: FeatureConfig | None
    manifest: Manifest | None
    progress: Progress
    nbytes: int
    writer: Writer | None
    """The process that holds the folder's lock; None if there is none."""
    workers: list[Writer]
    """The holders of units that are not known to have ended."""
    quarantine: dict[str, int]
    """Number of clips by reason."""
    dead: int = 0
    dead_bytes: int = 0
    dead_shards: list[str] = field(default_factory=list)
    leftovers: int = 0
    leftover_bytes: int = 0
    problems: list[str] = field(default_factory=list)
    seconds: float | None = None
    """Seconds since the current run began; None if there is none."""


def status(bank: Path) -> Status:
    """Return the state of a bank; raises UserError if there is none."""
    inventory = read_inventory(bank)
    # -- everything is read once, without a lock: what changes meanwhile is counted as it was found
    newest = _newest(bank)
    writer, workers = writer_of(bank), list(holders(bank).values())
    # the first of them: the rate is that of all together
    began = min(map(_began, filter(None, [writer, *workers])), default=None)
    begun = _begun(inventory)
    entries = _failures(inventory, begun)
    failed = {entry.key for entry in entries}
    found = Status(
        bank=bank,
        features=inventory.features,
        manifest=inventory.manifest,
        progress=_progress(inventory, begun, failed, began),
        nbytes=sum(_size(path) for path in bank.glob("shards/*")),
        writer=writer,
        workers=workers,
        quarantine=dict(Counter(entry.reason.value for entry in entries).most_common()),
        problems=[str(damage) for damage in inventory.damages],
        # by times of files alone: the clocks of the writer, of this host and of the disk may differ
        seconds=None if began is None else max(newest - began, 1.0),
    )
    for samples in dead_samples(inventory).values():
        found.dead += len(samples)
        found.dead_bytes += sum(sample.nbytes for sample in samples)
    found.dead_shards = dead_shards(inventory)
    # what is needed cannot be distinguished from what is left over with a damaged plan or manifest
    if not inventory.damages:
        try:
            pieces = leftovers(inventory)
        except OSError:  # a writer removed a file that was being counted
            pieces = []
        found.leftovers, found.leftover_bytes = len(pieces), sum(piece.nbytes for piece in pieces)
    return found


def _began(writer: Writer) -> float:
    # timegm, not mktime: the time is UTC, whatever zone this machine is in
    return calendar.timegm(time.strptime(writer.started, "%Y-%m-%dT%H:%M:%SZ"))


@dataclass(frozen=True)
class Begun:
    """The finished clips of an unfinished unit."""

    written: Written
    """From the journal with most clips, if there are several."""
    moment: float
    """Time of the last write to a journal, in seconds since the epoch; 0 without any."""


# -- unfinished units


def _begun(inventory: Inventory) -> dict[int, Begun]:
    """Return the units of the plan that are not finished."""
    units = range(len(inventory.plan.units) if inventory.plan else 0)
    return {
        unit: _begun_unit(inventory.bank / "shards" / shard_name(unit))
        for unit in units
        if inventory.commits.get(shard_name(unit)) is None
    }


def _begun_unit(shard: Path) -> Begun:
    found, moment = [Written()], 0.0
    for token in tokens(shard):
        try:
            found.append(written_of(journal_lines(shard, token)))
            moment = max(moment, journal_path(shard, token).stat().st_mtime)
        except FileNotFoundError:
            continue
    # the journal that the next holder would continue from
    return Begun(max(found, key=lambda written: len(written.keys)), moment)


def _failures(inventory: Inventory, begun: Mapping[int, Begun]) -> list[QuarantineEntry]:
    """Return the failures of earlier runs, of units made since, and of begun units."""
    if not inventory.plan:
        return read_quarantine(inventory.bank)
    found = failed_clips(inventory.bank, inventory.plan, inventory.sound_commits())
    since = [entry for unit in begun.values() for entry in unit.written.failures]
    # later ones replace earlier ones: a clip that was tried twice is one failure
    return list((found | {entry.id: entry for entry in since}).values())


def _progress(
    inventory: Inventory, begun: Mapping[int, Begun], failed: set[str], began: float | None
) -> Progress:
    found = Progress()
    for unit, work in enumerate(inventory.plan.work() if inventory.plan else ()):
        name, todo = shard_name(unit), {clip.key for clip in work}
        commit = inventory.commits.get(name)
        if commit:
            # of superseded clips another unit has the sample that is served
            banked = [sample for sample in commit.samples if sample.key in todo]
            found.units_done += 1
            found.clips += len(banked)
            found.frames += sum(sample.frames for sample in banked)
            moment = _moment(done_path(inventory.bank / "shards" / name))
            # by the time of the file: records do not say which run made them
            if began is not None and moment >= began:
                found.clips_new += len(banked)
            continue
        samples = [entry.sample for entry in begun[unit].written.samples]
        found.units_begun += bool(samples)
        found.units_left += not samples
        found.clips_begun += len(samples)
        found.frames_begun += sum(sample.frames for sample in samples)
        found.clips_left += max(len(todo - failed) - len(samples), 0)
        if began is not None and begun[unit].moment >= began:
            found.clips_new += len(samples)
    return found


def _size(path: Path) -> int:
    try:
        return disk_size(path)
    except OSError:  # renamed or removed since it was listed
        return 0


def _newest(bank: Path) -> float:
    """Return the present by the disk's clock: a writer touches its lock or lease every few seconds."""
    return max(map(_moment, [lock_path(bank), *bank.glob("shards/*")]))


def _moment(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


# -- the text


def table(found: Status) -> str:
    """Return the state as lines of text, `name  text`."""
    progress = found.progress
    rows = {"bank": printable(str(found.bank)), "state": _state(found)}
    if found.features:
        features = found.features
        strides = ",".join(map(str, features.strides))
        rows["features"] = (
            f"{features.tower_type}, layer {features.layer}, stride {strides}, {features.pool}, "
            f"codec {features.codec}, fingerprint {features.fingerprint[:12]}"
        )
    rows["units"] = (
        f"{progress.units_done} finished, {progress.units_begun} begun, {progress.units_left} to do"
    )
    rows["clips"] = (
        f"{progress.clips} banked, {progress.clips_begun} written in units that are begun, "
        f"{progress.clips_left} to do"
    )
    rows["frames"] = f"{progress.frames} banked, {progress.frames_begun} written"
    rows["disk"] = f"{in_bytes(found.nbytes)} in shards"
    if found.seconds is not None:
        rows["rate"] = _rate(progress, found.seconds)
    failed = sum(found.quarantine.values())
    reasons = ", ".join(f"{n} {reason}" for reason, n in found.quarantine.items())
    rows["quarantine"] = (
        f"{counted(failed, 'clip')}: {reasons}; `preprocess retry`" if failed else "empty"
    )
    if found.dead:
        whole = f"; nothing else in {', '.join(found.dead_shards)}" if found.dead_shards else ""
        rows["dead"] = (
            f"{found.dead} samples superseded or pruned, {in_bytes(found.dead_bytes)}{whole}"
        )
    if found.leftovers:
        rows["leftovers"] = (
            f"{found.leftovers} files or folders, {in_bytes(found.leftover_bytes)}; `preprocess gc`"
        )
    shown = [printable(problem) for problem in found.problems[:5]]
    if len(found.problems) > 5:
        shown.append(f"and {len(found.problems) - 5} more; `preprocess verify`")
    lines = [f"{name:<10}  {text}" for name, text in rows.items()]
    return "\n".join([*lines, *(f"{'damaged':<10}  {problem}" for problem in shown)])


def _state(found: Status) -> str:
    progress, writer = found.progress, found.writer
    left = progress.units_begun + progress.units_left
    if writer:
        there = "" if writer.is_here else "; on another machine, so it may have ended"
        return f"being written by {printable(str(writer))} since {writer.started}{there}"
    if found.workers:
        who = some([f"process {one.pid} on {one.host}" for one in found.workers])
        return f"being written by {counted(len(found.workers), 'worker')}: {printable(who)}"
    # a lock file without a live holder: whoever ends in order removes it
    killed = " (its writer was killed)" if lock_path(found.bank).exists() else ""
    command = "derive" if found.features and found.features.derived else "encode"
    if left:
        fix = f"run `preprocess {command}` again to continue"
        if found.problems:  # a finished shard whose record is lost is no work to do
            fix = f"run `preprocess repair {printable(str(found.bank))}` first"
        return f"{counted(left, 'unit')} to do and no process writes{killed}; {fix}"
    if found.manifest is None:
        return f"all units are finished, bank.json is missing{killed}; run `preprocess {command}` again"
    return f"finished{killed}"


def _rate(progress: Progress, seconds: float) -> str:
    # clips of this run alone: those that were there before took none of its seconds
    rate = progress.clips_new / seconds
    if not rate:
        return "no clip of this run is written yet"
    left = duration(progress.clips_left / rate)
    return f"{rate:.2f} clips/s since the run began, start-up included; about {left} to go"
