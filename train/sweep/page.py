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

from shards.errors import UserError
from shards.signed import Json, write_atomic
from shards.text import counted, duration
from train.settings.exits import command
from train.settings.output import RUN
from train.sweep.record import record_of
from train.sweep.story import REPORT

ENCODED = re.compile(r"([\d,]+) clips, .* in ([\d.]+) s; ([\d,]+) clips there already")
"""How `preprocess encode` ends."""
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
    encoded = [line for path in sorted(folder.glob("encode-*.txt")) for line in read_encoded(path)]
    if not encoded or not runs:
        return lines
    trained = sum(record.seconds for path in runs if (record := record_of(path)))
    lines += [f"- encoded once: {line}" for line, _, _ in encoded]
    once = sum(seconds for _, _, seconds in encoded)
    # what encoding for each run would cost is said of the bank that the runs read
    main_bank = next((own for own in encoded if own[0].startswith(f"{folder}/bank:")), encoded[0])
    _, clips, seconds = main_bank
    # two ways to do without a bank: encode for each run, or each time that a clip is trained on
    again = seconds * len(runs)
    seen = sum(map(clips_seen, runs))
    lines += [
        f"- {counted(len(runs), 'run')} trained on that, {duration(trained)} in all",
        f"- encoding for each run again would have taken {duration(again)} in place of "
        f"{duration(once)}; and again each time that a clip is trained on ({seen:,} times), "
        f"{duration(seconds / clips * seen)}",
        "",
    ]
    return lines


def machine() -> str:
    # not os.cpu_count(): that is the machine's, of which a process may have few
    cores = len(os.sched_getaffinity(0))
    threads = os.environ.get("OMP_NUM_THREADS")
    said = f"{counted(cores, 'core')} of {processor()}, Python {platform.python_version()}"
    return f"{said}, OMP_NUM_THREADS {threads}" if threads else said


def processor() -> str:
    try:
        names = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        names = []
    return names[0].strip() if names else platform.machine()


def read_encoded(path: Path) -> list[tuple[str, int, float]]:
    """Return (the line, clips, seconds of all of them) of an encoding; nothing where it did not end."""
    lines = [line for line in path.read_text().splitlines() if ENCODED.search(line)]
    out = []
    # the last line alone: a file holds the attempts that were stopped, too
    for line in lines[-1:]:
        found = ENCODED.search(line)
        assert found
        clips, there = (int(found[k].replace(",", "")) for k in (1, 3))
        # a stopped one went on: the clips before took as long
        out.append((line, clips, float(found[2]) * clips / max(clips - there, 1)))
    return out


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
