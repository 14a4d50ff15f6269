"""How a command of `train` ends: what a person can mend is printed, a bug keeps its traceback."""

import sys
import typing
from collections.abc import Callable, Iterable
from functools import wraps
from typing import ParamSpec, TypeVar

from shards.errors import UserError

P = ParamSpec("P")
T = TypeVar("T")


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
    """Print problems to stderr, one line each, and exit with 2. Libraries raise UserError instead."""
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)  # noqa: T201
    raise SystemExit(2)
