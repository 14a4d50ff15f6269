"""Ctrl-C and SIGTERM in a command: an exception that cleans up, then exit code 130 or 143.

try:
    with stopped_by(signal.SIGINT, signal.SIGTERM):
        ...
except Stopped as stopped:
    end_by(stopped.number)
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

LOOK_SECONDS = 0.2
"""Between two looks whether a stop is under way."""
PATIENCE_SECONDS = 5.0
"""A process that does not begin to clean up for so long is ended as by any second signal."""
THREADS_SECONDS = 1.0
"""A process that ends waits for its threads for so long at most."""


class Stopped(BaseException):
    """A signal was received; `BaseException`, so that no `except Exception` swallows it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def stopped_by(*numbers: signal.Signals) -> Iterator[None]:
    """Raise `Stopped` at one of these signals; a second one ends the process at once."""
    if threading.current_thread() is not threading.main_thread():  # where Python refuses handlers
        yield
        return
    received: list[tuple[int, float]] = []

    def stop(number: int, frame: FrameType | None) -> None:
        for one in numbers:
            signal.signal(one, signal.SIG_DFL)
        received.append((number, time.monotonic()))
        before[signal.SIGALRM] = signal.signal(signal.SIGALRM, look)
        look(number, frame)

    # again and again, since a bare `except` or a `__del__` of some library swallows an exception
    def look(_: int, frame: FrameType | None) -> None:
        signal.setitimer(signal.ITIMER_REAL, LOOK_SECONDS)
        if _is_under_way():
            return
        number, moment = received[0]
        if time.monotonic() - moment > PATIENCE_SECONDS:
            _end_at_once(number)
        # an exception within the import of a library in C++, as torch is, aborts the process
        if not _is_importing(frame):
            raise Stopped(number)

    before = {one: signal.signal(one, stop) for one in numbers}
    try:
        yield
    finally:
        if received:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for one, handler in before.items():
            signal.signal(one, handler)


def _is_under_way() -> bool:
    """Return whether what runs now cleans up after `Stopped`."""
    error = sys.exception()
    while error is not None and not isinstance(error, Stopped):
        error = error.__context__
    return error is not None


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


def end_by(number: int) -> NoReturn:
    """Exit with 128 + the number of a signal: 130 for Ctrl-C, 143 for SIGTERM.

    Python would wait for a thread that goes on, such as one that loads a model: then it ends without
    Python's own cleaning up. Ours was done, by `with` and `finally`.
    """
    deadline = time.monotonic() + THREADS_SECONDS
    while any(map(_is_going_on, threading.enumerate())):
        if time.monotonic() > deadline:
            _end_at_once(number)
        time.sleep(0.01)
    raise SystemExit(128 + number)


def _is_going_on(thread: threading.Thread) -> bool:
    """Return whether Python would have to wait for a thread, or for one that it takes to have ended.

    Before 3.13 a `join` that an exception leaves marks a running thread as ended (bpo-45274). Python does
    not wait for it, and ends it where it next asks for the interpreter: within torch this aborts.
    """
    if thread.daemon or thread is threading.current_thread():
        return False
    return thread.ident in sys._current_frames()


def _end_at_once(number: int) -> NoReturn:
    with suppress(OSError, RuntimeError):  # RuntimeError: the signal came within another flush
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(128 + number)
