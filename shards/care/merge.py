"""`preprocess merge A B --out C`: join banks of the same features, without a common clip.

manifest = merge([Path("a"), Path("b")], Path("c"))

The finished units of A come first, then those of B, with new numbers: tars and indices are hard links
to the old ones, or copies; commit records are written with the new numbers. The new bank is made in a
temporary folder beside `--out` and renamed when it is complete. What was merged before is left alone.
"""

import errno
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from shards.care.inventory import refuse_no_bank
from shards.care.revise import is_being_moved
from shards.errors import UserError, disk_errors
from shards.format.beside import side_path, sides_of
from shards.format.commits import (
    CommitRecord,
    committed,
    done_path,
    index_path,
    read_commit,
    refuse_missing_shards,
    shard_name,
    shard_path,
    write_commit,
)
from shards.format.features import differences
from shards.format.manifest import Manifest, TowerFacts, read_manifest
from shards.format.plan import Plan, planned, write_plan
from shards.format.quarantine import read_entries
from shards.signed import canonical_json, sync_folder
from shards.text import counted, some
from shards.write.beside import pair
from shards.write.finish import finish
from shards.write.lock import folder_lock, lock_path, writer_of
from shards.write.shard import index_bytes

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """A bank, and what of it goes into another."""

    bank: Path
    plan: Plan
    commits: list[CommitRecord]
    """Of the units that are made."""
    files: list[tuple[int, ...]]
    """Which files their shards are."""

    @cached_property
    def clips(self) -> dict[str, str]:
        """By key, the id of each clip that was encoded or has failed."""
        units = [self.plan.units[commit.unit] for commit in self.commits]
        return {clip.key: clip.id for unit in units for clip in unit}


def merge(
    banks: Sequence[Path], out: Path, seen: Callable[[int], object] = lambda nbytes: None
) -> Manifest:
    """Join banks into a new one; return its manifest.

    seen: called with the bytes of each shard when it is done. Raises UserError naming each difference of
    the features, the clips that two banks have, a bank that is being written, and an `out` that exists
    and is not what these banks become.
    """
    # before the banks are read, which takes long
    if not (out / "bank.json").exists():
        _refuse_existing(out)
    sides = _common_sides(banks)
    # all refusals come before the first byte is copied
    everything = [[_part(bank) for bank in banks]]
    everything += [[_part(side_path(bank, strides)) for bank in banks] for strides in sides]
    for parts in everything:
        _refuse_different(parts)
        _refuse_common(parts)
    with disk_errors(out), _beside(out) as beside:
        if _is_made(out, everything, sides):
            log.warning(f"{out}: has been made of these banks already")
            return read_manifest(out)
        _refuse_existing(out)
        # the right to write there too: other commands may be given this folder
        with folder_lock(out, "preprocess merge"):
            manifest = _join(everything[0], beside, seen)
            for strides, parts in zip(sides, everything[1:], strict=True):
                _join(parts, side_path(beside, strides), seen)
            for why in pair(beside, "preprocess merge"):
                log.warning(why)
        _give_place(beside, out)
    if lacking := sorted(_not_made(everything[0]).values()):
        log.warning(
            f"{out}: lacks {counted(len(lacking), 'clip')} as planned, in units that none of the banks "
            f"has made: {some(lacking)}; `preprocess encode INPUT --out {out}` encodes them"
        )
    return manifest


@contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """Hold the right to merge into a folder, and yield the place beside it where the bank is made."""
    folder = out.with_name(f"{out.name}.merging")
    try:
        with folder_lock(folder, "preprocess merge"):
            # of a merge that was killed: links are made once more, at no cost
            _empty(folder)
            try:
                yield folder / "bank"
            finally:
                # nothing of a merge that failed is continued, and copies may fill the disk
                _empty(folder)
    finally:
        with suppress(OSError):  # another merge is at work there
            folder.rmdir()


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path != lock_path(folder):
            path.unlink(missing_ok=True)


def _give_place(beside: Path, out: Path) -> None:
    """Give a bank its name in one rename; UserError where another command has begun to write there."""
    try:
        # only the lock had made this folder
        os.rmdir(out)
        os.replace(beside, out)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise UserError(
            f"{writer_of(out) or 'another process'} has begun to write here",
            where=out,
            fix="name a new folder for the merged bank",
        ) from None
    sync_folder(out.parent)


def _is_made(
    out: Path, everything: Sequence[Sequence[Part]], sides: Sequence[tuple[int, ...]]
) -> bool:
    """Return whether a folder holds the bank that these parts become, as after a merge that was killed
    when it had given the bank its name."""
    places = [out, *(side_path(out, strides) for strides in sides)]
    if not (out / "bank.json").exists() or {*sides_of(out)} != {*places[1:]}:
        return False
    for place, parts in zip(places, everything, strict=True):
        plan, commits = _joined(parts)
        try:
            there = canonical_json(planned(place).to_json())
            found = [read_commit(shard_path(place, commit.unit)) for commit in commits]
        except (UserError, OSError):
            return False
        if there != canonical_json(plan.to_json()) or found != commits:
            return False
    return True


def _refuse_existing(out: Path) -> None:
    # a folder with a lock alone is left by a merge that was killed
    if out.exists() and not {path.name for path in out.iterdir()} <= {".lock"}:
        raise UserError("exists already", where=out, fix="name a new folder for the merged bank")


def _not_made(parts: Sequence[Part]) -> dict[str, str]:
    """Return, by key, the ids of the clips of the plans whose last unit is made in no bank."""
    ids, made = dict[str, str](), set[str]()
    for part in parts:
        served, units = part.plan.served(), {commit.unit for commit in part.commits}
        ids |= {clip.key: clip.id for clip in part.plan.clips if clip.key in served}
        made |= {key for key, unit in served.items() if unit in units}
    return {key: id_ for key, id_ in ids.items() if key not in made}


def _join(parts: Sequence[Part], out: Path, seen: Callable[[int], object]) -> Manifest:
    """Make one bank in a new folder."""
    (out / "shards").mkdir(parents=True)
    plan, commits = _joined(parts)
    _bring_shards(parts, commits, out, seen)
    for part in parts:
        _refuse_changed(part)
    write_plan(out, plan)
    _bring_skips(parts, out)
    failed = [
        entry
        for part in parts
        for entry in read_entries(part.bank).values()
        if entry.key in part.clips
    ]
    return finish(out, plan, TowerFacts.of(plan, commits), failed, commits)


def _joined(parts: Sequence[Part]) -> tuple[Plan, list[CommitRecord]]:
    """Return the plan and the commit records of the bank that some parts become."""
    made = [(part, commit) for part in parts for commit in part.commits]
    # what was made of a clip that is planned again and not made is of its older video
    stale = _not_made(parts).keys()
    plan = replace(
        parts[0].plan,
        units=[part.plan.units[commit.unit] for part, commit in made],
        # only of clips that are brought: others are in no unit of the new plan
        pruned=frozenset().union(
            *((part.plan.pruned | stale) & part.clips.keys() for part in parts)
        ),
    )
    # numbered in order: units that were never made leave no gap
    commits = [
        replace(commit, shard=shard_name(unit), unit=unit) for unit, (_, commit) in enumerate(made)
    ]
    return plan, commits


def _common_sides(banks: Sequence[Path]) -> list[tuple[int, ...]]:
    """Return the strides of the sides that all banks have; UserError where some lack one."""
    of_each = [[planned(side).features.strides for side in sides_of(bank)] for bank in banks]
    problems = [
        f"{bank}: has no stride {','.join(map(str, strides))} beside it, which {other} has; encode it "
        "there first, or merge copies without the folder `beside`"
        for bank, mine in zip(banks, of_each, strict=True)
        for other, theirs in zip(banks, of_each, strict=True)
        for strides in theirs
        if strides not in mine
    ]
    if problems:
        raise UserError.of(problems)
    return of_each[0]


def _part(bank: Path) -> Part:
    refuse_no_bank(bank)
    writer = writer_of(bank)
    if writer:
        raise UserError(
            f"{writer} writes here", where=bank, fix="merge it when the writer has finished"
        )
    if is_being_moved(bank / "shards" / ".repair"):
        raise UserError(
            "its repair was cut off", where=bank, fix=f"`preprocess repair {bank}` first"
        )
    plan = planned(bank)
    refuse_missing_shards(bank, plan)
    units = [unit for unit in range(len(plan.units)) if committed(bank, unit)]
    files = _files(bank, units)  # before the records are read: they are of these files
    commits = [read_commit(shard_path(bank, unit)) for unit in units]
    for commit in commits:
        if commit.samples:
            _refuse_damaged(bank, commit)
    return Part(bank, plan, commits, files)


def _refuse_damaged(bank: Path, commit: CommitRecord) -> None:
    """Raise UserError for a shard whose files have not the sizes that its record gives them."""
    shard = bank / "shards" / commit.shard
    # by size: reading every byte is `verify --deep`, which a merge of terabytes cannot wait for
    sizes = {shard: commit.nbytes, index_path(shard): len(index_bytes(commit.samples))}
    for path, nbytes in sizes.items():
        there = path.stat().st_size if path.exists() else None
        if there != nbytes:
            raise UserError(
                "is missing" if there is None else "is damaged",
                got=None if there is None else f"{there} bytes",
                expected=None if there is None else f"{nbytes} bytes",
                where=path,
                fix=f"`preprocess repair {bank}` first",
            )


def _files(bank: Path, units: Iterable[int]) -> list[tuple[int, ...]]:
    """Return which files the shards of some units are; none of a file that is not there."""
    shards = [shard_path(bank, unit) for unit in units]
    paths = [path for one in shards for path in (one, index_path(one), done_path(one))]
    stats = [path.stat() if path.exists() else None for path in paths]
    # finished shards are only ever replaced, by another file
    return [(stat.st_ino, stat.st_size, stat.st_mtime_ns) if stat else () for stat in stats]


def _refuse_changed(part: Part) -> None:
    """Raise UserError for a bank whose shards were replaced while they were brought, as by a repair."""
    # not by its lock: a merge must not write into banks that it only reads
    if _files(part.bank, (commit.unit for commit in part.commits)) != part.files:
        raise UserError(
            "was changed while it was merged", where=part.bank, fix="merge when nobody writes there"
        )


def _refuse_different(parts: Sequence[Part]) -> None:
    """Raise UserError naming each difference between the first bank and another."""
    first, problems = parts[0], []
    for part in parts[1:]:
        ours, theirs = first.plan.features.to_json(), part.plan.features.to_json()
        lines = differences(ours, theirs)
        # one bank has one scale per channel: values stored by two scales cannot be distinguished
        if first.plan.calibration != part.plan.calibration:
            lines.append(
                "the scales of int8, which were calibrated separately: plan once, and copy plan.json"
            )
        if first.plan.decoder != part.plan.decoder:
            lines.append(f"videos are read by {first.plan.decoder} here, {part.plan.decoder} there")
        here, there = first.plan.tower.device, part.plan.tower.device
        if here and there and here != there:
            lines.append(
                f"features are computed on {here} here, on {there} there, and round otherwise"
            )
        if lines:
            problems.append(
                f"{first.bank} and {part.bank} differ; only banks of the same features can be one: "
                f"{'; '.join(lines)}"
            )
    if problems:
        raise UserError.of(problems)


def _refuse_common(parts: Sequence[Part]) -> None:
    """Raise UserError naming the clips that two banks have."""
    problems, holder = [], dict[str, Part]()
    for part in parts:
        common: dict[Path, list[str]] = {}
        for key, id_ in part.clips.items():
            if key in holder:
                common.setdefault(holder[key].bank, []).append(id_)
            holder.setdefault(key, part)
        problems += [
            f"{bank} and {part.bank} have {counted(len(ids), 'clip')} in common: {some(sorted(ids))}; "
            "encode each in one of them only"
            for bank, ids in common.items()
        ]
    if problems:
        raise UserError.of(problems)


def _bring_shards(
    parts: Sequence[Part],
    commits: Sequence[CommitRecord],
    out: Path,
    seen: Callable[[int], object],
) -> None:
    """Link or copy the shards and write their commit records."""
    olds = [part.bank / "shards" / commit.shard for part in parts for commit in part.commits]
    for old, commit in zip(olds, commits, strict=True):
        new = shard_path(out, commit.unit)
        if commit.samples:
            _bring(old, new)
            _bring(index_path(old), index_path(new))
            seen(commit.nbytes)
        write_commit(new, commit)


def _bring(old: Path, new: Path) -> None:
    try:
        # Finished shards are never written to: a link is as safe as a copy, and takes no space.
        # of the file itself: of a symbolic link Linux would link the link
        os.link(old.resolve(), new)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(old, new)
        with open(new, "rb") as file:
            os.fsync(file.fileno())


def _bring_skips(parts: Sequence[Part], out: Path) -> None:
    lines = [path.read_bytes() for part in parts if (path := part.bank / "skipped.jsonl").exists()]
    if lines:
        (out / "skipped.jsonl").write_bytes(b"".join(lines))
