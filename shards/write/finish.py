"""Finish a run: write catalogue, quarantine and then the manifest, from plan and commit records."""

import importlib
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from shards.errors import UserError, disk_errors
from shards.format.catalogue import build_columns, read_columns, write_columns
from shards.format.commits import (
    CommitRecord,
    committed,
    read_commits,
    refuse_missing_shards,
    shard_path,
)
from shards.format.manifest import (
    Manifest,
    NamedTower,
    ShardEntry,
    TowerFacts,
    read_manifest,
    split_served,
)
from shards.format.plan import Plan, planned
from shards.format.quarantine import QuarantineEntry, read_entries, update_quarantine
from shards.signed import signed_json, write_atomic
from shards.storage import open_files
from shards.text import counted, some
from shards.write.lease import holders, sweep
from shards.write.lock import folder_lock


def finish_alone(bank: Path) -> Manifest:
    """Finish a bank whose units were made by other processes; raises UserError if some are not made."""
    planned(bank)  # first, because the lock would create a missing folder
    with disk_errors(bank), folder_lock(bank, "preprocess finish"):
        plan = planned(bank)
        refuse_unfinished(bank, plan, f"run `preprocess work {bank}`, and this when it is done")
        refuse_missing_shards(bank, plan)
        commits = read_commits(bank, plan)
        return finish(bank, plan, TowerFacts.of(plan, commits), commits=commits)


def finish(
    out: Path,
    plan: Plan,
    tower: NamedTower,
    failed: Iterable[QuarantineEntry] = (),
    commits: Sequence[CommitRecord] | None = None,
) -> Manifest:
    """Write the catalogue, update the quarantine, and write the manifest last.

    The manifest comes last because it makes the folder a bank: a run that is killed before it leaves the
    old manifest, or none. failed: failures that are in no commit record. Banked clips are removed from
    the quarantine. commits: the records of the units, if they have been read already.
    """
    commits = read_commits(out, plan) if commits is None else commits
    columns = build_columns(out / "shards", commits, plan.features.strides, plan.served())
    # -- catalogue, quarantine, manifest: in this order, so that each is there
    # before the next one needs it
    write_columns(out / "index.zarr", columns)
    banked = {sample.key for sample in split_served(plan, commits)[0]}
    # before the manifest: a bank that is declared complete must already say what it lacks
    update_quarantine(out, banked | plan.pruned, [*new_failures(out, plan, commits), *failed])
    manifest = Manifest.of(plan, commits, columns, tower)
    write_atomic(out / "bank.json", signed_json(manifest.to_json()))
    sweep(out)
    return manifest


def import_ahead() -> None:
    """Import what `finish` needs, in another thread: half a second that hides behind a tower's work."""
    threading.Thread(target=importlib.import_module, args=("zarr",)).start()


def is_finished(bank: Path, plan: Plan, commits: Sequence[CommitRecord]) -> bool:
    """Return whether quarantine, catalogue and manifest are as `finish` would write them now.

    commits: of all units.
    """
    try:
        manifest = read_manifest(bank)
        # checksums included, or a run with nothing to do would leave a damaged catalogue
        read_columns(open_files(bank), manifest.catalogue)
    except UserError:
        return False
    return manifest.is_of(plan, commits) and not new_failures(bank, plan, commits)


def new_failures(bank: Path, plan: Plan, commits: Sequence[CommitRecord]) -> list[QuarantineEntry]:
    """Return the failures of units that were made after the bank was last finished.

    Those of older units are in quarantine.jsonl, unless a retry has removed them since; and what is there
    of more attempts is newer than a record.
    """
    served, is_old, known = plan.served(), _finished_with(bank), read_entries(bank)
    return [
        entry
        for commit in commits
        if not is_old(commit)
        for entry in commit.failures or ()
        if served.get(entry.key) == commit.unit
        and (entry.id not in known or known[entry.id].attempts <= entry.attempts)
    ]


def failed_clips(
    bank: Path, plan: Plan, commits: Sequence[CommitRecord]
) -> dict[str, QuarantineEntry]:
    """Return, by id, the clips that failed, as `finish` would list them now.

    The file itself still lists what a run has banked that was killed before its end, and lacks what it
    could not bank.
    """
    gone = plan.pruned | {sample.key for sample in split_served(plan, commits)[0]}
    listed = read_entries(bank) | {one.id: one for one in new_failures(bank, plan, commits)}
    return {id_: entry for id_, entry in listed.items() if entry.key not in gone}


def _finished_with(bank: Path) -> Callable[[CommitRecord], bool]:
    """Return a function of a commit: whether it was there when the bank was last finished."""
    try:
        manifest = read_manifest(bank)
    except UserError:
        return lambda commit: False
    # By name and content, never by time: the clock of the machine that made a unit may be behind, and a
    # copy of a bank has other times.
    shards, empty = set(manifest.shards), set(manifest.empty or ())
    return lambda commit: (
        ShardEntry(commit.shard, commit.nbytes, commit.sha256) in shards
        if commit.samples
        else commit.shard in empty
    )


def refuse_unfinished(bank: Path, plan: Plan, fix: str) -> None:
    """Raise UserError if units of the plan are not made, naming the holders of their leases."""
    # a manifest over missing units would declare the bank complete
    left = [unit for unit in range(len(plan.units)) if not committed(bank, unit)]
    if not left:
        return
    held = {unit: writer for unit, writer in holders(bank).items() if unit in left}
    who = [f"{shard_path(bank, unit).stem} by {writer}" for unit, writer in held.items()]
    raise UserError(
        f"{counted(len(left), 'unit')} of {len(plan.units)} "
        + ("is not made yet" if len(left) == 1 else "are not made yet")
        + (f", {len(held)} of them being made: {some(who)}" if held else ""),
        where=bank,
        fix=fix,
    )
