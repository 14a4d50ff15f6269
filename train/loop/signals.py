"""SIGTERM and SIGINT end a run after a checkpoint, SIGUSR1 asks for a checkpoint alone."""

import signal
from collections.abc import Sequence
from types import FrameType
from typing import Any

STOPS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """What this process was asked for by signals while the context was open.

    The first SIGTERM or SIGINT is noted, and the run ends itself at its next step boundary; a second
    one ends the process at once, as it would without this class. The checkpoints are then those that
    were complete, since each is written beside its name and renamed.
    """

    def __init__(self) -> None:
        self.stop: signal.Signals | None = None
        self.save = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        for number in (*STOPS, signal.SIGUSR1):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def take(self) -> list[float]:
        """Return what was asked for as numbers to be added up over the ranks: each stop, and a save.

        A save is asked for once, a stop until the run has ended.
        """
        asked = [*(float(self.stop is number) for number in STOPS), float(self.save)]
        self.save = False
        return asked

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self.save = True
            return
        self.stop = signal.Signals(number)
        for stop in STOPS:  # by the system itself, so that a call into C that hangs ends too
            signal.signal(stop, signal.SIG_DFL)


def asked_of_all(counts: Sequence[float]) -> tuple[signal.Signals | None, bool]:
    """Return (the signal that stops the run, whether to save) of `take()` added up over the ranks."""
    *stops, save = counts
    stop = next((number for number, count in zip(STOPS, stops, strict=True) if count), None)
    return stop, bool(save)
