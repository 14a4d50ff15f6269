"""Many workers on one plan: what leases, journals and commits cost. SIMULATED: no clip is decoded.

(a) `64 workers (simulated)`: processes without torch make units of clips that sleep instead of being
    encoded, and write a small sample each, as real workers do: the time that they sleep in all / 64,
    over the wall time. One process of each starts at its share of the units, as an array job does.
(b) `100,000 units (simulated)`: one worker asks for each unit of a plan of which all are made, as each
    does that comes late, takes and gives back the leases of so many that are not, and lists them all.
"""

import os
import random
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from shards.format.commits import done_path, shard_path
from shards.format.samples import SampleMeta
from shards.write.lease import Leases, holders
from shards.write.shard import OvertakenError, ShardWriter

WORKERS, UNITS, CLIPS = 64, 2000, 2
SECONDS = 2.0
"""That a clip sleeps, a tenth more or less."""
LISTED = 100_000
TAKEN = 5_000
"""Of them, leases that are timed."""
DAY = 86_400
ARRAYS = {4: np.ones((8, 2, 2, 64), np.float16), 8: np.ones((8, 1, 1, 64), np.float16)}


def run() -> list[dict[str, object]]:
    with TemporaryDirectory() as folder:
        return [*overhead(Path(folder) / "a"), *listing(Path(folder) / "b")]


def overhead(bank: Path) -> list[dict[str, object]]:
    rng = random.Random(0)
    sleeps = [[SECONDS * rng.uniform(0.9, 1.1) for _ in range(CLIPS)] for _ in range(UNITS)]
    children = []
    began = time.monotonic()
    for rank in range(WORKERS):
        child = os.fork()
        if child == 0:
            _work(bank, sleeps, rank * UNITS // WORKERS)
            os._exit(0)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    wall = time.monotonic() - began
    assert not any(codes), codes
    assert len(list((bank / "shards").glob("*.done"))) == UNITS
    assert len(list((bank / "shards").iterdir())) == 3 * UNITS, "something was left over"
    slept = sum(map(sum, sleeps)) / WORKERS
    row = {"what": f"{WORKERS} workers (simulated)", "units": UNITS, "seconds": wall}
    return [row | {"least seconds": slept, "of the least": slept / wall}]


def _work(bank: Path, sleeps: Sequence[Sequence[float]], first: int) -> None:
    with Leases(bank, "a benchmark") as leases, closing(leases.left(range(UNITS), first)) as left:
        for lease in left:
            with ShardWriter(
                lease.shard, lease.unit, "fe" * 16, token=lease.token, earlier=lease.earlier
            ) as writer:
                for clip, seconds in enumerate(sleeps[lease.unit]):
                    lease.check()
                    time.sleep(seconds)
                    key = f"clip-{lease.unit}-{clip}"
                    writer.write(key, _meta(key), ARRAYS)
                try:
                    writer.commit()
                except OvertakenError:
                    writer.abandon()


def _meta(id_: str) -> SampleMeta:
    return SampleMeta(
        id=id_,
        path=id_,
        size=1000,
        digest="ab" * 16,
        start=0.0,
        end=1.0,
        fps=8.0,
        frame_count=8,
        frame_index=list(range(8)),
        timestamps=[k / 8 for k in range(8)],
        display_size=(64, 64),
        covered=(0.0, 0.0, 1.0, 1.0),
        patch_grid=(8, 8),
        cell_grids={"4": (2, 2), "8": (1, 1)},
        tower_width=64,
        frames_per_unit=1,
        decoder="pyav",
        flags=[],
    )


def listing(bank: Path) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []

    def timed(what: str, began: float, units: int) -> None:
        seconds = (time.monotonic() - began) * LISTED / units
        row = {"what": f"{what} (simulated)", "units": LISTED, "seconds": seconds}
        rows.append(row | {"of a day": seconds / DAY})

    with Leases(bank, "a benchmark") as leases:
        for unit in range(LISTED):
            done_path(shard_path(bank, unit)).touch()
        began = time.monotonic()
        assert not list(leases.left(range(LISTED)))
        timed("ask for units that are made", began, LISTED)
        began = time.monotonic()
        fresh = range(LISTED, LISTED + TAKEN)
        with closing(leases.left(fresh)) as left:
            for lease in left:
                done_path(lease.shard).touch()
        timed("take and give back", began, TAKEN)
        began = time.monotonic()
        assert not holders(bank)
        timed("list who holds what", began, LISTED)
    return rows
