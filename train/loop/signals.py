"""Requests from outside to end a run or to save it: signals, the end of its launcher, the clock.

SIGTERM, SIGINT, SIGHUP and the end of the process that started it end a run after a checkpoint; SIGUSR1
and the clock (`save_minutes`) ask for a checkpoint alone.
"""

import os
import signal
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

from train.settings.ancestors import Process

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
ECHO_SECONDS = 5.0
"""Seconds in which torchrun may forward a signal that the whole job, workers included, got already."""


class StopSignals:
    """Collects requests to stop or to save while its context is open.

    The first SIGTERM, SIGINT or SIGHUP is noted, and the run ends itself at its next step boundary; a
    second one ends the process at once, as it would without this class. The checkpoints are then those
    that were complete, since each is written beside its name and renamed.
    """

    def __init__(self, holding: Sequence[Process] = (), save_seconds: float = 0.0) -> None:
        """holding: processes whose end ends the run. save_seconds: between saves, 0 for never.

        Only one rank is given save_seconds, and decides for all: clocks of ranks differ.
        """
        self.stop: signal.Signals | None = None
        self.save = False
        self.cause = ""
        """The reason for the stop in words, where it is not a signal."""
        self._holding, self._save_seconds = holding, save_seconds
        self._saved_at = time.monotonic()
        self._noted_at: float | None = None
        # torchrun forwards a signal that Slurm has sent to its workers directly, too
        self._echoes = "TORCHELASTIC_RUN_ID" in os.environ
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        for number in (*STOPS, signal.SIGUSR1):
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # under nohup
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def take(self) -> list[float]:
        """Return the requests as numbers that can be summed over the ranks: each stop, and a save.

        A save is reported once, a stop until the run has ended. Every rank calls this once per step.
        """
        if self.stop is None:
            # a killed launcher sends no signal, and its workers would go on without
            # it, holding their devices
            ended = next((one for one in self._holding if not one.is_alive()), None)
            if ended:
                self.stop, self.cause = signal.SIGTERM, f"the end of {ended}"
        if 0 < self._save_seconds <= time.monotonic() - self._saved_at:
            self.save = True
        asked = [*(float(self.stop is number) for number in STOPS), float(self.save)]
        self.save = False
        return asked

    def saved(self) -> None:
        """Restart the clock of the next save."""
        self._saved_at = time.monotonic()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self.save = True
            return
        first = self._noted_at is None
        if self._noted_at is None:
            self.stop, self._noted_at = signal.Signals(number), time.monotonic()
        if self._echoes and time.monotonic() - self._noted_at < ECHO_SECONDS:
            return
        # the system's own handler: a Python handler never runs during a call into C that hangs
        for stop in self._before.keys() & set(STOPS):
            signal.signal(stop, signal.SIG_DFL)
        if not first:
            os.kill(os.getpid(), number)


def asked_of_all(counts: Sequence[float]) -> tuple[signal.Signals | None, bool]:
    """Return (the signal that stops the run, whether to save), from `take()` summed over the ranks."""
    *stops, save = counts
    # ranks may have got different signals: the order of STOPS decides, the same on all of them
    stop = next((number for number, count in zip(STOPS, stops, strict=True) if count), None)
    return stop, bool(save)
