"""The page of a folder of evidence: its sweeps' tables, and what the bank spared them.

    python -m train.sweep.page evidence

Reads what `make evidence` leaves: `encode-*.txt`, the last line of each encoding; `runs/*.md`, a table
of each sweep; `runs/NAME/seed-N`, the runs. Writes `evidence.md`.
"""

import json
import os
import platform
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from shards.errors import UserError
from shards.forked import cores
from shards.signed import Json, write_atomic
from shards.text import counted, duration
from train.settings.exits import command
from train.settings.output import RUN
from train.sweep.record import record_of
from train.sweep.story import REPORT

ENCODED = re.compile(r"([\d,]+) clips?, .* in ([\d.]+) s; ([\d,]+) clips? there already")
"""How `preprocess encode` ends: clips that it made, its seconds, clips that it found."""
FIRST = ("lape", "frame-loss", "space", "singles", "small")
"""The order of the sweeps' tables; others follow."""


@command
def main(argv: list[str]) -> None:
    if len(argv) != 1:
        raise UserError("name the folder of the evidence: python -m train.sweep.page evidence")
    folder = Path(argv[0])
    tables = sorted((folder / "runs").glob("*.md"), key=lambda path: (place(path), path.name))
    if not tables:
        raise UserError(
            "no table of a sweep here",
            where=folder / "runs",
            fix="train first: train/run.py --sweep ... --output_dir FOLDER/runs",
        )
    text = "\n".join([*head(folder), *(f"#{path.read_text()}" for path in tables)])
    write_atomic(folder / "evidence.md", text.encode())
    print(f"{text}\nwritten: {folder / 'evidence.md'}")  # noqa: T201
    if (folder / "runs" / REPORT).exists():
        print(f"pictures: {folder / 'runs' / REPORT}")  # noqa: T201


def place(path: Path) -> int:
    return FIRST.index(path.stem) if path.stem in FIRST else len(FIRST)


def head(folder: Path) -> list[str]:
    """Return what stands above the tables: the machine, and what encoding cost and would have."""
    lines = ["# Evidence", "", f"On {machine()}.", ""]
    runs = [path for path in sorted((folder / "runs").glob("*/seed-*")) if record_of(path)]
    encoded = {
        path.stem.removeprefix("encode-"): own
        for path in sorted(folder.glob("encode-*.txt"))
        if (own := read_encoded(path))
    }
    # each run beside the encodings of what it reads: banks differ in clips and in frames of a clip
    reads = {run: [encoded[name] for name in banks_of(run) if name in encoded] for run in runs}
    reads = {run: own for run, own in reads.items() if own}
    if not reads:
        return lines
    trained = sum(record.seconds for path in reads if (record := record_of(path)))
    lines += [f"- encoded once: {own.line}" for own in encoded.values()]
    # two ways to do without a bank: encode for each run, or each time that a clip is trained on
    once = sum(own.seconds for own in encoded.values())
    again = sum(own.seconds for several in reads.values() for own in several)
    seen = {run: clips_seen(run) for run in reads}
    pace = {
        run: sum(e.seconds for e in own) / sum(e.clips for e in own) for run, own in reads.items()
    }
    each = sum(seen[run] * pace[run] for run in reads)
    times = f"{sum(seen.values()):,} times"
    lines += [
        f"- {counted(len(reads), 'run')} trained on that, {duration(trained)} in all",
        f"- encoding for each run again would have taken {duration(again)} in place of "
        f"{duration(once)}; and again each time that a clip is trained on ({times}), "
        f"{duration(each)}",
        "",
    ]
    return lines


def banks_of(run: Path) -> list[str]:
    """Return the names of the banks that a run reads."""
    banks: list[str] = json.loads((run / RUN).read_text())["config"]["bank"]
    return [Path(bank).name for bank in banks]


def machine() -> str:
    threads = os.environ.get("OMP_NUM_THREADS")
    said = (
        f"{counted(cores(sharers=1), 'core')} of {processor()}, Python {platform.python_version()}"
    )
    return f"{said}, OMP_NUM_THREADS {threads}" if threads else said


def processor() -> str:
    try:
        names = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        names = []
    return names[0].strip() if names else platform.machine()


class Encoding(NamedTuple):
    """What an encoding said at its end."""

    line: str
    clips: int
    seconds: float
    """Of all its clips."""


def read_encoded(path: Path) -> Encoding | None:
    """Return how an encoding ended; None where it did not."""
    lines = [line for line in path.read_text().splitlines() if ENCODED.search(line)]
    if not lines:
        return None
    # the last line alone: it names the clips of the attempts before it
    found = ENCODED.search(lines[-1])
    assert found
    made, there = (int(found[k].replace(",", "")) for k in (1, 3))
    if not made:  # a stop after the last clip: how long they took is not known any more
        return None
    # the clips that were there already took as long
    return Encoding(lines[-1], made + there, float(found[2]) * (made + there) / made)


def clips_seen(run: Path) -> int:
    """Return how often a run has trained on a clip: a clip a record, as in drawn worlds."""
    config: Json = json.loads((run / RUN).read_text())["config"]
    steps = [row for row in rows_of(run / "metrics.jsonl") if row["kind"] == "train"]
    return (
        len(steps) * config["per_device_train_batch_size"] * config["gradient_accumulation_steps"]
    )


def rows_of(path: Path) -> Sequence[Json]:
    return [json.loads(line) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    main(sys.argv[1:])
