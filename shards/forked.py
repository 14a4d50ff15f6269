"""Work divided among processes, each of which starts with all that this one has in memory.

    for counts in in_processes(lambda part: count(records[part]), parts, cores()):
        ...

For functions in Python, which threads do not make faster. Results are pickled, arguments are not.
"""

import multiprocessing
import os
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from multiprocessing.connection import Connection
from typing import Any, TypeVar

Part = TypeVar("Part")
Result = TypeVar("Result")
STOPPING = {signal.SIGINT, signal.SIGTERM}
Pipes = Sequence[tuple[Connection, Connection]]
"""Of each process: where its results are read, and where they are written."""


def cores(sharers: int | None = None) -> int:
    """Return the cores that are this process's own.

    sharers: processes of this machine that work at the same time; None: all that its launcher started.
    """
    if sharers is None:
        sharers = max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or 1))
    # not os.cpu_count(): a container or a Slurm task may use fewer cores than there are
    return max(1, len(os.sched_getaffinity(0)) // sharers)


def in_processes(
    work: Callable[[Part], Result], parts: Sequence[Part], processes: int
) -> Iterator[Result]:
    """Yield `work(part)` of each part, in order; in this process if it is the only one.

    One process does its parts one after the other: `work` may keep what it found for the next. Raises
    what `work` raises, with the traceback as a note. What a killed process leaves is done in this one.
    """
    processes = min(processes, len(parts))
    # a worker of a data loader may start none
    if processes < 2 or multiprocessing.current_process().daemon:
        yield from map(work, parts)
        return
    with ExitStack() as stack:
        readers = _started(work, parts, processes, stack)
        for number, part in enumerate(parts):
            try:
                result, error = readers[number % processes].recv()
            # it was killed, perhaps for want of memory; or the system let none start; or an error was
            # sent whose class cannot be made of its text alone
            except Exception:
                result, error = work(part), None
            if error is not None:
                raise error
            yield result


def _started(
    work: Callable[[Part], Any], parts: Sequence[Part], processes: int, stack: ExitStack
) -> list[Connection]:
    """Start the processes and return where their results are read; stack: ends them."""
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(processes)]
    for reader, _ in pipes:
        stack.callback(reader.close)
    # what comes now waits: a new process has to decide first what it does about it, and fork swallows
    # exceptions
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        for number in range(processes):
            own = work, parts[number::processes], pipes, number
            process = context.Process(target=_work_off, args=own, daemon=True)
            with warnings.catch_warnings(), suppress(OSError):
                # of threads, whose locks may be held for ever in the new process: it asks for none
                warnings.simplefilter("ignore", DeprecationWarning)
                process.start()
                stack.callback(process.join)
                stack.callback(process.kill)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    for _, writer in pipes:
        writer.close()
    return [reader for reader, _ in pipes]


def _work_off(
    work: Callable[[Part], Any], parts: Sequence[Part], pipes: Pipes, number: int
) -> None:
    """Send the result or the error of each part: the new process's side."""
    # Ctrl-C goes to all processes of a terminal: the one that waits for this one ends it
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
    # threads are not copied: a tokenizer would wait for those that it has started
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    writer = pipes[number][1]
    for reader, other in pipes:
        reader.close()
        if other is not writer:  # else the end of the process that it belongs to would not be seen
            other.close()
    for part in parts:
        try:
            answer: tuple[Any, Exception | None] = work(part), None
        except Exception as error:
            error.add_note(traceback.format_exc())
            answer = None, error
        try:
            writer.send(answer)
        # nobody waits any more; or it cannot be pickled, and the other side does it, seeing this end
        except Exception:
            return
