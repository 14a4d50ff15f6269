"""The end of every run: catalogue, quarantine, then the manifest, from plan and commit records."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from shards.errors import UserError
from shards.format.catalogue import build_columns, read_columns, write_columns
from shards.format.commits import (
    CommitRecord,
    committed,
    done_path,
    read_commits,
    refuse_missing_shards,
    shard_path,
)
from shards.format.manifest import Manifest, NamedTower, TowerFacts, read_manifest
from shards.format.plan import Plan, planned
from shards.format.quarantine import QuarantineEntry, settle
from shards.signed import signed_json, write_atomic
from shards.storage import open_files
from shards.text import counted, some
from shards.write.lease import holders, sweep
from shards.write.lock import folder_lock


def finish_alone(bank: Path) -> Manifest:
    """Finish a bank that others have made the units of; raises UserError where some are not made."""
    planned(bank)  # before there is a lock, and so a folder
    with folder_lock(bank, "preprocess finish"):
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
    """Write the catalogue, bring the quarantine up to date, and write the manifest last.

    failed: clips that no commit record tells of. Banked clips leave the quarantine. commits: the
    records of the units, where they have been read.
    """
    commits = read_commits(out, plan) if commits is None else commits
    served = plan.served()
    columns = build_columns(out / "shards", commits, plan.features.strides, served)
    write_columns(out / "index.zarr", columns)
    banked = {key for one in commits for key in one.keys if served.get(key) == one.unit}
    settle(out, banked | plan.pruned, [*untold_failures(out, plan, commits), *failed])
    manifest = Manifest.of(plan, commits, columns, tower)
    write_atomic(out / "bank.json", signed_json(manifest.to_json()))
    sweep(out)
    return manifest


def is_finished(bank: Path, plan: Plan, commits: Sequence[CommitRecord]) -> bool:
    """Whether quarantine, catalogue and manifest are as `finish` would write them now.

    commits: of all units.
    """
    try:
        manifest = read_manifest(bank)
        read_columns(open_files(bank), manifest.catalogue)
    except UserError:
        return False
    return manifest.is_of(plan, commits) and not untold_failures(bank, plan, commits)


def untold_failures(
    bank: Path, plan: Plan, commits: Sequence[CommitRecord]
) -> list[QuarantineEntry]:
    """Return the failures of units that have been made since the bank was last finished.

    Of the others quarantine.jsonl tells: lines may have been added to it by a retry, or taken out.
    """
    served, told = plan.served(), _told(bank)
    return [
        entry
        for commit in commits
        if not told(commit)
        for entry in commit.failures or ()
        if served.get(entry.key) == commit.unit
    ]


def _told(bank: Path) -> Callable[[CommitRecord], bool]:
    """Return what tells whether a bank was finished since a unit was made."""
    try:
        listed = {(entry.name, entry.sha256) for entry in read_manifest(bank).shards}
        finished = (bank / "bank.json").stat().st_mtime_ns
    except (UserError, FileNotFoundError):
        return lambda commit: False

    def told(commit: CommitRecord) -> bool:
        if commit.samples:
            return (commit.shard, commit.sha256) in listed
        # a unit without samples is not listed
        return done_path(bank / "shards" / commit.shard).stat().st_mtime_ns <= finished

    return told


def refuse_unfinished(bank: Path, plan: Plan, fix: str) -> None:
    """Raise UserError if units of the plan are not made, saying who holds which."""
    left = [unit for unit in range(len(plan.units)) if not committed(bank, unit)]
    if not left:
        return
    held = {unit: writer for unit, writer in holders(bank).items() if unit in left}
    who = [f"{shard_path(bank, unit).stem} by {writer}" for unit, writer in held.items()]
    raise UserError(
        f"{counted(len(left), 'unit')} of {len(plan.units)} "
        + ("is not made yet" if len(left) == 1 else "are not made yet")
        + (f", {len(held)} of them in work: {some(who)}" if held else ""),
        where=bank,
        fix=fix,
    )
