"""How a command of `train` ends: what a person can mend is printed, a bug keeps its traceback."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from typing import ParamSpec, TypeVar

from shards.errors import UserError
from train.settings import last_word

P = ParamSpec("P")
T = TypeVar("T")

GRACE_SECONDS = 3.0
"""In which a launcher ends the other processes, once one of them has ended."""


def command(main: Callable[P, T]) -> Callable[P, T]:
    """Wrap what a command line runs: a UserError or an OSError becomes lines and exit 2.

    An OSError is the machine's (a full disk, a folder that may not be written). Anything else is a
    bug and passes through.
    """

    @wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return main(*args, **kwargs)
        except UserError as error:
            refuse(error.problems)
        except OSError as error:
            refuse([str(error) or repr(error)])

    return run


def refuse(problems: Iterable[str]) -> typing.NoReturn:
    """Print problems to stderr, one line each, and exit with 2. Libraries raise UserError instead.

    Of several processes that meet the same problem one prints it; below a launcher's own report.
    """
    problems = list(problems)
    if rank := int(os.environ.get("RANK", "0")):
        let_the_first_one_speak(rank)
    if is_launched(os.environ):
        report_to_launcher(problems, os.environ)
        say_last([f"error: {problem}" for problem in problems])
    else:
        for problem in problems:
            print(f"error: {problem}", file=sys.stderr)  # noqa: T201
    raise SystemExit(2)


def let_the_first_one_speak(rank: int) -> None:
    """Wait to be ended by the launcher, as happens when another process has met the same problem."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(GRACE_SECONDS + 0.5 * rank)


def is_launched(environ: Mapping[str, str]) -> bool:
    """Tell whether this process' parent is a launcher that reports its failure."""
    by_launcher = "TORCHELASTIC_RUN_ID" in environ or "ACCELERATE_MIXED_PRECISION" in environ
    return by_launcher and os.getppid() > 1  # with number 1 a container ends: nothing outlives it


def report_to_launcher(problems: Sequence[str], environ: Mapping[str, str]) -> None:
    """Leave the problems where the launcher's own report takes them from; without one, print them.

    `TORCHELASTIC_ERROR_FILE` is torchrun's: https://docs.pytorch.org/docs/stable/elastic/errors.html
    """
    if file := environ.get("TORCHELASTIC_ERROR_FILE"):
        facts = {"message": "; ".join(problems), "timestamp": int(time.time())}
        try:
            with open(file, "w", encoding="utf-8") as written:
                json.dump(facts, written)
        except OSError:  # a full disk may be what is reported
            pass
        return
    for problem in problems:
        print(f"stopped: {problem}", file=sys.stderr, flush=True)  # noqa: T201


def say_last(lines: Sequence[str]) -> None:
    """Print lines when the launcher, this process' parent, has ended with all that it prints."""
    subprocess.Popen(
        [sys.executable, "-I", "-S", last_word.__file__, str(os.getppid()), *lines],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # the launcher ends the group of its processes
    )
