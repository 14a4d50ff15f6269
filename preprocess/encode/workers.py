"""Encode units in several processes: every worker has its own tower and decoders, and takes what is left.

summary = encode_in_processes(work, options, procs=4)

Other commands, here and on other machines, may take units of the same bank at the same time. The parent
shows one progress bar. If a worker fails or dies, the others continue; a bug ends the run, with its
traceback. Workers end with the parent, even if it is killed.
"""

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from preprocess.decode.child_process import ChildBug
from preprocess.encode.features import EncodeOptions, load_tower
from preprocess.encode.pipeline.decoders import Decoders, decoders_for
from preprocess.encode.pipeline.summary import Summary, progress_bar, show_pace
from preprocess.encode.tower import devices_of, start_torch
from preprocess.encode.unit import Encoder
from shards.errors import UserError, disk_errors
from shards.format.codec import Codec
from shards.format.features import FeatureConfig
from shards.format.plan import ClipSource
from shards.format.quarantine import QuarantineEntry
from shards.write.lease import Leases

if TYPE_CHECKING:
    from model.tower.tower import Tower


@dataclass(frozen=True)
class Work:
    """Units of one bank to encode."""

    out: Path
    features: FeatureConfig
    codec: Codec
    units: Mapping[int, list[ClipSource]]
    """By the unit's number in the plan: the clips to bank."""
    command: str
    """The name of this process in the messages of others."""
    failed: Mapping[str, QuarantineEntry] = field(default_factory=dict)
    """By id: clips that failed in earlier runs and are not tried again."""
    start: float = 0.0
    """The fraction of the units after which to begin, in [0, 1): workers begin at different units."""
    decoders: int | None = None
    """Decoder processes per tower; None for cores / towers."""

    @property
    def clips(self) -> int:
        return sum(map(len, self.units.values()))


def encode_work(
    work: Work,
    tower: "Tower",
    options: EncodeOptions,
    bar: "tqdm[Any] | None" = None,
    early: Decoders | None = None,
) -> Summary:
    """Encode units in this process, one after the other, until none is left to take. early: decoders of
    this process that have begun.

    The units that are unfinished then are held by live processes.
    """
    with (
        Encoder(
            work.out,
            work.features,
            tower,
            options,
            work.codec,
            bar,
            work.failed,
            decoders=early or work.decoders,
        ) as encoder,
        disk_errors(work.out),
        Leases(work.out, work.command) as leases,
    ):
        if bar is None:
            encoder.bar.total = work.clips
        elif isinstance(bar, RemoteBar):
            bar.summary = encoder.summary
        units = list(work.units)
        with closing(leases.left(units, int(work.start * len(units)))) as left:
            for lease in left:
                encoder.encode_unit(lease, work.units[lease.unit])
                if bar is None:
                    elsewhere = sum(len(work.units[unit]) for unit in leases.elsewhere)
                    encoder.bar.total = work.clips - elsewhere
    return encoder.summary


def encode_in_processes(work: Work, options: EncodeOptions, procs: int) -> Summary:
    """Encode the units in several processes.

    Raises UserError, a line for each reason, if some worker could not finish, after the others have
    ended; and ChildBug at once for a bug in a worker. Committed units are kept.
    """
    workers: list[tuple[Connection, BaseProcess]] = []
    done: dict[int, Summary] = {}
    problems: list[str] = []
    with progress_bar(work.clips) as bar:
        try:
            with _without_interrupt():
                for rank in range(procs):
                    workers.append(_start(work, options, rank, procs))
            waiting = {receiver: rank for rank, (receiver, _) in enumerate(workers)}
            while waiting:
                ready = wait(list(waiting))
                for receiver, rank in [(r, rank) for r, rank in waiting.items() if r in ready]:
                    try:
                        what, fact = receiver.recv()
                    except EOFError:
                        del waiting[receiver]
                        process = workers[rank][1]
                        process.join()
                        # a worker that was killed sends nothing: its closed pipe and its exit code tell
                        if process.exitcode:
                            problems.append(_death(rank, procs, process.exitcode))
                        continue
                    if what == "clips":
                        count, done[rank] = fact
                        bar.update(count)
                        show_pace(bar, Summary.of(list(done.values())))
                    # every worker has the same notes: the first one's are printed
                    elif what == "note" and not rank:
                        bar.write(fact, file=sys.stderr)
                    elif what == "failed":
                        problems += fact.splitlines()
                    elif what == "bug":
                        raise ChildBug(fact)
                    elif what == "done":
                        done[rank] = fact
        finally:
            for _, process in workers:
                # by a bug, an interrupt or at the end: a lease that they hold is free
                # as soon as they have died
                process.terminate()
            for _, process in workers:
                process.join()
        seconds = bar.format_dict["elapsed"]
    if problems:
        # one line for what several workers met alike (a full disk)
        raise UserError.of(dict.fromkeys(problems))
    return replace(Summary.of(list(done.values())), seconds=seconds)


# -- one worker process


def _start(
    work: Work, options: EncodeOptions, rank: int, procs: int
) -> tuple[Connection, BaseProcess]:
    context = multiprocessing.get_context("spawn")  # CUDA cannot be used in a forked process
    receiver, sender = context.Pipe(duplex=False)
    devices = devices_of(options)
    options = replace(options, device=devices[rank % len(devices)])
    share = replace(
        work,
        # spread over the units, so that workers seldom ask for the same lease
        start=(work.start + rank / procs) % 1,
        decoders=work.decoders or decoders_for(procs),
    )
    process = context.Process(target=_worker, args=(share, options, sender), daemon=True)
    process.start()
    # the parent's copy: with it open, the end of the worker would not close the pipe
    sender.close()
    return receiver, process


def _worker(work: Work, options: EncodeOptions, sender: Connection) -> None:
    """Encode units in a worker process, and send the parent its progress and result."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    start_torch(options.device)
    try:
        summary = encode_work(work, load_tower(options), options, RemoteBar(sender.send))
    except (UserError, OSError) as error:
        sender.send(("failed", str(error) or repr(error)))
    except Exception:
        sender.send(("bug", traceback.format_exc()))
    else:
        sender.send(("done", summary))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent
    # A daemon process is only ended by a parent that exits normally; the sentinel also notices `kill -9`.
    wait([parent.sentinel])
    # no cleaning up: the parent is gone, and its leases are taken over by whoever comes next
    os._exit(1)


class RemoteBar(tqdm):
    """Progress bar whose updates are sent to the parent process."""

    def __init__(self, send: Callable[[Any], None]) -> None:
        super().__init__(disable=True)
        self.send = send
        self.summary = Summary()

    def update(self, n: float | None = 1) -> bool | None:
        # the failures are in the shard's record, and need not travel with each clip
        self.send(("clips", (n, replace(self.summary, failures=[]))))
        return None

    def write(self, s: str, *_: Any, **__: Any) -> None:  # type: ignore[override]
        self.send(("note", s))


def _death(rank: int, procs: int, code: int) -> str:
    how = signal.Signals(-code).name if code < 0 else f"exit {code}"
    return (
        f"worker {rank + 1} of {procs} died ({how}); units that others finished are kept; run the same "
        "command again to continue"
    )


@contextmanager
def _without_interrupt() -> Iterator[None]:
    """Ignore Ctrl-C in processes that are started within: the parent handles it and ends them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a new process inherits ignored signals
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
