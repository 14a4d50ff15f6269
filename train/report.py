"""What runs did, whether they learned, and where they fail: a page of pictures, and a table.

    python -m train.report runs/a runs/b         # -> runs/a/report.html, and a table in the terminal
    python train/report.py --watch runs/a        # remade while the run goes on, until it ends

Reads the folders of runs and, for pictures, their banks and videos, as far as those are still there. The
page is one file that fetches nothing.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from shards.errors import UserError
from shards.signed import write_atomic
from train.pages.chart import check_drawing
from train.pages.read.runs import METRICS, Run, goes_on, read_runs
from train.pages.table import table
from train.settings.exits import command
from train.settings.output import file_problem

PAGE = "report.html"
PAUSE_SECONDS = 5
"""Between two looks at a run that goes on."""
SHARE = 0.1
"""Of the time at most in which a page is remade: a run has better use for the cores."""


@command
def main(argv: list[str]) -> None:
    """Print the table of some runs, and write their page."""
    args = arguments(argv)
    place = args.output or (args.runs[0] / PAGE if args.runs else Path(PAGE))
    if args.watch:
        check_drawing()
        watch(args.runs, place)
    # the table first: it needs no matplotlib
    runs = read_runs(args.runs)
    print(table(runs))  # noqa: T201
    check_drawing()
    write_report(runs, place)
    print(f"written: {place}")  # noqa: T201


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m train.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="folders of runs")
    parser.add_argument(
        "--output", type=Path, help=f"where to write the page [RUN/{PAGE}, the first]"
    )
    parser.add_argument(
        "--watch",
        action="store_true",
        help="remake the page while a run goes on, until all have ended",
    )
    return parser.parse_args(argv)


def write_report(runs: Sequence[Run], place: Path, refresh: int = 0) -> None:
    """Write the page of some runs; a browser sees the old file or the new one."""
    from train.pages.page import page

    if problem := file_problem(place):
        raise UserError(problem)
    write_atomic(place, page(runs, refresh=refresh).encode())


def watch(folders: Sequence[Path], place: Path) -> None:
    """Write the page every few seconds while a process trains in any of the folders."""
    seen: list[int] = []
    while any(goes_on(folder) for folder in folders):
        begun = [folder for folder in folders if has_steps(folder)]
        # by the time of change: a page is remade only if a run has taken a step since
        now = [(folder / METRICS).stat().st_mtime_ns for folder in begun]
        pause = float(PAUSE_SECONDS)
        if begun and now != seen:
            began = time.monotonic()
            write_report(read_runs(begun), place, refresh=PAUSE_SECONDS)
            # once: a line each time would bury the table at the end
            if not seen:
                print(f"written: {place}; it is remade until the run ends", flush=True)  # noqa: T201
            seen = now
            # so long that drawing / (drawing + pause) is SHARE
            pause = max(pause, (time.monotonic() - began) * (1 / SHARE - 1))
        wait_while(folders, pause)


def has_steps(folder: Path) -> bool:
    """Return whether a run has written down a step."""
    path = folder / METRICS
    return path.is_file() and path.stat().st_size > 0


def wait_while(folders: Sequence[Path], seconds: float) -> None:
    """Wait for so long, or until no process trains in any of the folders."""
    end = time.monotonic() + seconds
    # looked at each second, so that the last page comes soon after the end of the run
    while time.monotonic() < end and any(goes_on(folder) for folder in folders):
        time.sleep(min(1.0, seconds))


if __name__ == "__main__":
    main(sys.argv[1:])
