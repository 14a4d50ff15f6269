"""The command group, its commands in the order of use, and its exit codes.

Parsing only: torch, decoders and zarr are imported inside the commands, so that `--help` and wrong usage
answer at once (importing torch takes about 3 s).
"""

import signal
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from preprocess.cli.bench import bench
from preprocess.cli.care import gc, repair, status, verify
from preprocess.cli.derive import derive
from preprocess.cli.encode import encode, plan, retry
from preprocess.cli.export import export
from preprocess.cli.look import diff, footage, realmodels, show, toyworld
from preprocess.cli.work import finish, merge, work
from shards.errors import UserError, is_of_disk
from shards.stopping import Stopped, end_by, stopped_by


class Commands(click.Group):
    """A command group whose usage errors are one line, as all other errors are."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        # in the order of use, as they are added below; click sorts by name
        return list(self.commands)

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with one_line_errors():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        with one_line_errors():
            return super().invoke(ctx)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        # around click's own, which makes exit code 1 of Ctrl-C
        with ended_by_signals():
            return super().main(*args, **kwargs)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Print user, usage and OS errors, a line each, and exit with 2; for a bug its traceback, and 70."""
    try:
        yield
    # click's own: a command without arguments prints its help
    except click.exceptions.NoArgsIsHelpError:
        raise
    except click.UsageError as error:
        problems = error.format_message()
    except (UserError, OSError) as error:
        problems = str(error) or repr(error)
    except (click.exceptions.Exit, click.Abort):
        raise
    except Exception as error:
        if not is_of_disk(error):
            # a bug keeps its traceback, and no clip is blamed for it
            traceback.print_exc()
            raise SystemExit(70) from None  # EX_SOFTWARE of sysexits.h
        problems = str(error)
    else:
        return
    for line in problems.splitlines():
        click.echo(f"error: {line}", err=True)
    raise SystemExit(2)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Clean up at Ctrl-C and SIGTERM, and end with 128 + the signal's number: 130 and 143."""
    try:
        # SIGTERM as Ctrl-C: what schedulers send has to clean up as well
        with stopped_by(signal.SIGINT, signal.SIGTERM):
            yield
    except Stopped as stopped:
        click.echo("stopped; committed work is kept: run the same command to continue", err=True)
        end_by(stopped.number)


@click.group(
    cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(package_name="framebank")
def main() -> None:
    """Encode videos once into a bank of features; train on it many times.

    \b
    preprocess toyworld demo/toy             draw a small world of videos to try everything on
    preprocess footage CLIPS... OUT          cut a benchmark with exact answers from your own videos
    preprocess bench VIDEOS --tower T        measure here, and estimate hours and money elsewhere
    preprocess plan VIDEOS --out BANK ...    estimate what encoding will cost, and encode nothing
    preprocess encode VIDEOS --out BANK ...  run a frozen vision tower over videos, once
    preprocess work BANK                     encode what is planned, on many machines; then `finish`
    preprocess retry BANK                    encode the clips that failed, and nothing else
    preprocess derive BANK --out NEW ...     coarser cells, fewer frames, another codec: no video
    preprocess verify BANK                   find what is damaged; `repair` encodes only that

    \b
    Exit codes: 0 all is done
                1 some clips failed and are listed, damage was found, features differ
                2 wrong usage, or the machine failed; one line says what to do
                70 a bug in framebank, with its traceback; what is committed is intact
                130, 143 stopped by Ctrl-C, by SIGTERM; run the same command to continue
    """


for command in (
    *(toyworld, footage, realmodels, bench, plan, encode, retry),
    *(work, finish, merge, derive),
    *(status, show, verify, repair),
    *(diff, export, gc),
):
    main.add_command(command)
