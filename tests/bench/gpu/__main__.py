"""`make gpu`: everything that waits for a CUDA device, in pieces.

make gpu                # all pieces; those in bench-results/gpu.json are not run again
make gpu MINUTES=9      # stop before the piece that would take longer; the same command goes on
make gpu PIECES=demo    # these, whether they were run or not
make gpu SMALL=1        # tiny models on whatever device is here: does the machinery work

Each piece is a process of its own, so that memory is free again and a crash costs one piece. It prints
rows; all rows are kept in one JSON and shown as one Markdown table, for the README.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]
PYTHON = sys.executable


def last_line(output: str) -> list[Row]:
    """Return the rows that a module of this folder prints as its last line."""
    rows: list[Row] = json.loads(output.splitlines()[-1])
    return rows


def counted(output: str) -> list[Row]:
    """Return pytest's own count, such as `9 passed in 80 s`."""
    return [{"what": "tests marked gpu", "note": output.splitlines()[-1].strip("= ")}]


def demonstrated(output: str) -> list[Row]:
    """Return the scores of `make demo`'s two runs."""
    rows = []
    for run in ("run-a", "run-b"):
        report = json.loads(Path(f"demo/{run}/eval-test.json").read_text())
        rows.append(
            {"what": f"make demo, {run}: span mIoU", "value": report["tasks"]["span"]["iou"]}
        )
    return rows


def proved(output: str) -> list[Row]:
    """Return the mean span mIoU of each way of the core evidence."""
    scores: dict[str, list[float]] = {}
    for path in sorted(Path("evidence/runs").glob("*/seed-*/eval-test.json")):
        report = json.loads(path.read_text())
        scores.setdefault(path.parts[2], []).append(report["tasks"]["span"]["iou"])
    return [
        {"what": f"evidence, {way}: span mIoU", "value": sum(s) / len(s), "note": f"{len(s)} seeds"}
        for way, s in scores.items()
    ]


@dataclass(frozen=True)
class Piece:
    minutes: float
    """What it takes on an H100 or H200, roughly: whether it is begun in the time that is left."""
    command: list[str]
    rows: Callable[[str], list[Row]] = last_line
    small: bool = True
    """Whether it has a small form that runs without CUDA."""


def module(name: str, *words: str) -> list[str]:
    return [PYTHON, "-m", f"tests.bench.gpu.{name}", *words]


PIECES: Mapping[str, Piece] = {
    "tests": Piece(4, [PYTHON, "-m", "pytest", "-q", "-m", "gpu"], counted, small=False),
    "attention": Piece(1, module("attention")),
    "training-0.5B": Piece(2, module("training", "Qwen2.5-0.5B")),
    "training-1.5B": Piece(3, module("training", "Qwen2.5-1.5B")),
    "live": Piece(1, module("live")),
    "encoding": Piece(2, module("encoding")),
    "fsdp": Piece(3, module("fsdp")),
    "demo": Piece(4, ["make", "-o", ".venv/.ready", "demo"], demonstrated, small=False),
    # goes on where it was cut off, so a part of it is worth beginning
    "evidence": Piece(
        4, ["make", "-o", ".venv/.ready", "evidence", "SWEEPS=lape"], proved, small=False
    ),
}


def main(arguments: list[str]) -> int:
    asked = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    asked.add_argument("pieces", nargs="*", choices=[[], *PIECES], help="all, if none is named")
    asked.add_argument("--minutes", type=float, default=float("inf"))
    asked.add_argument("--small", action="store_true")
    asked.add_argument("--out", type=Path, help="[bench-results/gpu.json, gpu-small.json]")
    given = asked.parse_args(arguments)
    # apart: a piece that was run small is not done
    out = given.out or Path("bench-results") / ("gpu-small.json" if given.small else "gpu.json")
    if not given.small and not torch.cuda.is_available():
        print("make gpu: no CUDA device here; SMALL=1 tries the machinery", file=sys.stderr)
        return 2
    ends = time.monotonic() + 60 * given.minutes
    done = json.loads(out.read_text()) if out.exists() else {}
    failed, left = [], []
    for name in given.pieces or PIECES:
        piece = PIECES[name]
        if (given.small and not piece.small) or (name in done and not given.pieces):
            continue
        room = ends - time.monotonic()
        if room < 60 * piece.minutes:
            left.append(name)
            continue
        rows = run_piece(name, piece, given.small, room)
        if rows is None:
            failed.append(name)
            continue
        done[name] = {"device": device(), "date": time.strftime("%Y-%m-%d"), "rows": rows}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(done, indent=2))
    print(table(done))
    for names, what in ((failed, "failed"), (left, "left for the next time")):
        if names:
            print(f"{what}: {', '.join(names)}", file=sys.stderr)
    return 1 if failed or left else 0


def run_piece(name: str, piece: Piece, small: bool, seconds: float) -> list[Row] | None:
    """Return a piece's rows; None if it failed or ran out of time, with its last lines shown."""
    print(f"== {name}", flush=True)
    command = [*piece.command, *["--small"] * small]
    # a group of its own, so that time running out ends what the command started, too
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            printed, _ = process.communicate(timeout=None if seconds == float("inf") else seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)
            process.communicate()
            print(f"{name}: not done within {seconds:.0f} s", file=sys.stderr)
            return None
    if process.returncode:
        print(printed[-3000:], file=sys.stderr)
        return None
    return piece.rows(printed)


def device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU ({platform.machine()})"


def table(done: Mapping[str, Any]) -> str:
    """Return all rows as one Markdown table."""
    lines = ["| what | value | note | device, date |", "|---|---|---|---|"]
    for piece in done.values():
        for row in piece["rows"]:
            value = row.get("value", "")
            shown = f"{value:.3g}" if isinstance(value, float) else str(value)
            where = f"{piece['device']}, {piece['date']}"
            lines.append(f"| {row['what']} | {shown} | {row.get('note', '')} | {where} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
