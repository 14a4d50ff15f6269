"""How a command of `train` ends: a user's error is printed in a line, a bug keeps its traceback."""

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

from shards.errors import UserError, is_of_disk
from shards.stopping import Stopped, end_by, stopped_by
from train.settings import last_word

P = ParamSpec("P")
T = TypeVar("T")

GRACE_SECONDS = 3.0
"""Seconds in which a launcher ends the other processes, once one of them has ended."""


def command(main: Callable[P, T]) -> Callable[P, T]:
    """Wrap a command's main function: a UserError or an OSError becomes lines and exit code 2.

    An OSError is the machine's (a full disk, a folder without write permission). Ctrl-C ends it
    with exit code 130, without a traceback. Anything else is a bug and passes through.
    """

    @wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            # SIGTERM ends it as it ends any program: a handler would wait for ranks that hang in C
            with stopped_by(signal.SIGINT):
                return main(*args, **kwargs)
        except UserError as error:
            refuse(error.problems)
        except OSError as error:
            refuse([str(error) or repr(error)])
        except Exception as error:
            if not is_of_disk(error):
                raise
            refuse([str(error)])
        except Stopped as stopped:
            if os.environ.get("RANK", "0") == "0":
                print("stopped", file=sys.stderr)  # noqa: T201
            end_by(stopped.number)

    return run


def refuse(problems: Iterable[str]) -> typing.NoReturn:
    """Print problems to stderr, one line each, and exit with 2. Libraries raise UserError instead.

    If several processes have the same problem, one prints it, below the launcher's own report.
    """
    problems = list(problems)
    # every rank finds the same problem: printed by each, it would stand there as
    # often as there are processes
    if rank := int(os.environ.get("RANK", "0")):
        wait_to_be_ended(rank)
    # the launcher prints its own report of a failed process after this one has ended: what is
    # printed now would stand far above the end
    if is_launched(os.environ):
        report_to_launcher(problems, os.environ)
        say_last([f"error: {problem}" for problem in problems])
    else:
        for problem in problems:
            print(f"error: {problem}", file=sys.stderr)  # noqa: T201
    raise SystemExit(2)


def wait_to_be_ended(rank: int) -> None:
    """Wait until the launcher ends this process, as it does if another one has the same problem."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # later ranks wait longer: if no launcher ends them, they speak one after the other
    time.sleep(GRACE_SECONDS + 0.5 * rank)


def is_launched(environ: Mapping[str, str]) -> bool:
    """Return whether this process' parent is a launcher that reports its failure."""
    by_launcher = "TORCHELASTIC_RUN_ID" in environ or "ACCELERATE_MIXED_PRECISION" in environ
    return by_launcher and os.getppid() > 1  # with process 1 a container ends, and all in it


def report_to_launcher(problems: Sequence[str], environ: Mapping[str, str]) -> None:
    """Write the problems to the file of the launcher's own report; without one, print them.

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
    """Print lines after the launcher, this process' parent, has ended, below all that it prints."""
    subprocess.Popen(
        # -I -S: no site-packages, no user paths: it starts in milliseconds and imports nothing of others
        [sys.executable, "-I", "-S", last_word.__file__, str(os.getppid()), *lines],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # the launcher ends the group of its processes
    )
