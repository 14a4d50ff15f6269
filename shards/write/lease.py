"""A lease per unit: one of many processes on many machines makes a unit, and another if that one dies.

with Leases(bank, "preprocess work") as leases:
    for lease in leases.left(units):
        ...  # write the unit's shard with `lease.token` in the names of all files, and commit it

The n-th holder of a unit creates `<shard>.<n>.lease` exclusively, with its process, host and kernel in
it, and touches it every `BEAT_SECONDS`. A lease has ended when its process no longer exists (as far as
this kernel can know), when its holder has released it (its time is `GIVEN_UP` then), or when it was not
touched while another process watched it for `WATCHED_SECONDS`. The next holder then creates number n + 1.
A holder that was only paused notices that when it resumes; the names of its files contain its own token,
so that it cannot damage those of the next holder.
"""

# Why files and not locks: some network file systems have no flock, or one that other hosts do not see.
# Why a touch is watched for, and its time not compared with the clock: two hosts' clocks may differ.

import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Collection, Generator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from shards.errors import UserError
from shards.format.commits import (
    attempt_files,
    attempt_path,
    done_path,
    journal_path,
    lease_path,
    shard_path,
)
from shards.format.fields import parse
from shards.signed import give_name, write_synced
from shards.text import some
from shards.write import lock
from shards.write.lock import Writer, touched
from shards.write.shard import Attempt, OvertakenError, drop_attempt

log = logging.getLogger(__name__)

GIVEN_UP = 10**18
"""Modification time, in ns, of a released lease: 2001, which every file system can store."""


@dataclass(frozen=True)
class Holder:
    """The contents of a lease file."""

    token: str
    writer: Writer


@dataclass
class Lease:
    """The right to make a unit's shard, until another holder takes it."""

    unit: int
    shard: Path
    number: int
    token: str
    """Part of the names of the files that this holder writes."""
    earlier: list[Attempt] = field(default_factory=list)
    """Attempts of the earlier holders."""

    @property
    def path(self) -> Path:
        return lease_path(self.shard, self.number)

    def check(self) -> None:
        """Raise OvertakenError if another process holds the unit now, or has made it."""
        if done_path(self.shard).exists() or lease_path(self.shard, self.number + 1).exists():
            raise OvertakenError


@dataclass
class Watched:
    """Observations of another process's lease."""

    time: int
    """Modification time of the file at the last look, in ns."""
    since: float
    """Monotonic seconds at which this time was first seen."""
    looked: float
    """Monotonic seconds of the last look."""
    lives: bool = False
    """Whether it was touched between two looks in quick succession."""


class Leases(ExitStack):
    """The leases of one process, one at a time, and its observations of others' leases."""

    def __init__(self, bank: Path, command: str) -> None:
        super().__init__()
        self.bank = bank
        (bank / "shards").mkdir(parents=True, exist_ok=True)
        folder = os.open(bank / "shards", os.O_RDONLY)
        try:
            self.writer = Writer.here(command, folder)
        finally:
            os.close(folder)
        self.held: dict[int, Writer | None] = {}
        """By unit, its holder when it was last requested; None if the file does not say."""
        self.elsewhere: set[int] = set()
        """Units that other processes made in the meantime."""
        self._watched: dict[Path, Watched] = {}
        self._mine: Lease | None = None
        self._guard = threading.Lock()
        self._over = threading.Event()
        # a thread, since encoding a clip may take longer than others watch before they take over
        threading.Thread(target=self._beat, daemon=True).start()
        self.callback(self._over.set)
        self.callback(self._release)

    def take(self, unit: int) -> Lease | None:
        """Return the lease of a unit that nobody holds and nobody has made, else None."""
        assert self._mine is None, "one at a time"
        shard, number, earlier = shard_path(self.bank, unit), 1, [Attempt("", over=True)]
        self.held.pop(unit, None)
        if done_path(shard).exists():
            return None
        while lease_path(shard, number).exists():
            holder, over = _holder(lease_path(shard, number)), False
            if not lease_path(shard, number + 1).exists():
                over = self._is_over(lease_path(shard, number), holder)
                if not over:
                    self.held[unit] = holder.writer if holder else None
                    return None
            if holder:
                # all earlier holders' attempts count: the one with most finished clips is continued
                earlier.append(Attempt(holder.token, _has_ended(lease_path(shard, number), holder)))
            number += 1
        # random: two processes that race for one number must not write into the same files
        lease = Lease(unit, shard, number, secrets.token_hex(4), earlier)
        if not self._create(lease):
            return None
        with self._guard:
            self._mine = lease
        if done_path(shard).exists():  # committed between the first check and the lease
            self._release()
            return None
        return lease

    def left(self, units: Sequence[int], first: int = 0) -> Generator[Lease]:
        """Yield leases of the units that are left, until all are made or held by live processes.

        first: the index in `units` to begin at. A lease is released when the next one is requested.
        """
        # workers begin at different places, so that they seldom ask for the same unit
        todo, logged = [*units[first:], *units[:first]], False
        while todo:
            took = False
            for unit in todo:
                if lease := self.take(unit):
                    took = True
                    try:
                        yield lease
                    finally:
                        self._release()
                elif done_path(shard_path(self.bank, unit)).exists():
                    self.elsewhere.add(unit)
            todo = [unit for unit in todo if not done_path(shard_path(self.bank, unit)).exists()]
            # left to holders that were seen alive; a silent one is watched until it can be taken over
            if not took and all(self._is_alive(unit) for unit in todo):
                return
            if not took:
                if not logged:
                    who = some([writer or "another process" for writer in self.held.values()])
                    log.warning(f"{self.bank}: watching whether {who} still works here")
                logged = True
                time.sleep(lock.BEAT_SECONDS / 5)

    def _create(self, lease: Lease) -> bool:
        # Written under another name first, so that a lease has its content from the start (by a link).
        written = attempt_path(lease.shard, lease.token, "holder")
        with open(written, "wb", buffering=0) as file:
            write_synced(file, json.dumps(asdict(Holder(lease.token, self.writer))).encode())
        created = give_name(written, lease.path)
        written.unlink(missing_ok=True)
        return created

    def _release(self) -> None:
        """Release the lease; if the unit is made, remove the files that its holders have left."""
        with self._guard:
            lease, self._mine = self._mine, None
        if lease is None:
            return
        if done_path(lease.shard).exists():
            for attempt in [Attempt(lease.token, True), *lease.earlier]:
                drop_attempt(lease.shard, attempt.token)
            for number in range(1, lease.number + 1):
                lease_path(lease.shard, number).unlink(missing_ok=True)
        elif (
            not journal_path(lease.shard, lease.token).exists()
            and not lease_path(lease.shard, lease.number + 1).exists()
        ):
            # Nothing to continue from. With a later lease this one must stay: `take` looks for the first
            # free number, and a gap would hand out a unit that is held.
            lease.path.unlink(missing_ok=True)
        else:
            with suppress(FileNotFoundError):
                os.utime(lease.path, ns=(GIVEN_UP, GIVEN_UP))

    def _is_over(self, path: Path, holder: Holder | None) -> bool:
        """Return whether a lease's holder has ended, or is taken to have ended."""
        now = touched(path)
        if now is None or (holder is not None and _has_ended(path, holder)):
            return True
        clock, soon = time.monotonic(), 3 * lock.BEAT_SECONDS
        # two looks that are far apart prove nothing: the touch may be from long before the second one
        seen = self._watched.get(path)
        if seen is None or seen.time != now:
            lives = seen is not None and clock - seen.looked < soon
            seen = self._watched[path] = Watched(now, clock, clock, lives)
        seen.looked, seen.lives = clock, seen.lives and clock - seen.since < soon
        return clock - seen.since > lock.WATCHED_SECONDS

    def _is_alive(self, unit: int) -> bool:
        """Return whether a unit's last holder was recently seen to touch its lease."""
        shard, number = shard_path(self.bank, unit), 1
        while lease_path(shard, number + 1).exists():
            number += 1
        seen = self._watched.get(lease_path(shard, number))
        return seen is not None and seen.lives

    def _beat(self) -> None:
        while not self._over.wait(lock.BEAT_SECONDS):
            with self._guard, suppress(OSError):  # the file server may be unavailable for a while
                if self._mine:
                    os.utime(self._mine.path)


# -- lease files


def _holder(path: Path) -> Holder | None:
    """Return the contents of a lease file; None if it does not exist or is not written yet."""
    try:
        return parse(Holder, json.loads(path.read_bytes()), str(path))
    except (OSError, ValueError, UserError):
        return None


def _has_ended(path: Path, holder: Holder) -> bool:
    """Return whether a holder is known not to write to its files any more."""
    return holder.writer.is_over or touched(path) == GIVEN_UP


def holders(bank: Path) -> dict[int, Writer]:
    """Return the live holders of a bank's unfinished units, as far as this machine can know."""
    found: dict[int, tuple[int, Path]] = {}
    for path, shard, kind in attempt_files(bank / "shards"):
        if kind == "lease" and not done_path(shard).exists():
            unit, number = int(shard.stem.rpartition("-")[2]), int(path.name.split(".")[-2])
            found[unit] = max(found.get(unit, (0, path)), (number, path))
    read = {unit: (path, _holder(path)) for unit, (_, path) in sorted(found.items())}
    return {
        unit: holder.writer
        for unit, (path, holder) in read.items()
        if holder and not _has_ended(path, holder)
    }


def sweep(bank: Path) -> None:
    """Remove the files that holders have left of finished units."""
    for path, shard, _ in attempt_files(bank / "shards"):
        if done_path(shard).exists():
            path.unlink(missing_ok=True)


def tokens(shard: Path) -> Collection[str]:
    """Return the tokens of a unit's holders, first to last."""
    number, found = 1, [""]
    while lease_path(shard, number).exists():
        holder = _holder(lease_path(shard, number))
        found += [holder.token] if holder else []
        number += 1
    return found
