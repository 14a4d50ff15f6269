"""SIGTERM and SIGUSR1 ask for a checkpoint at the next step boundary; SIGTERM ends the run after it."""

import signal
from types import FrameType, TracebackType
from typing import Any


class Requests:
    """What this process was asked for by signals while the context was open."""

    def __init__(self) -> None:
        self.stop = False
        self.save = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Requests":
        for number in (signal.SIGTERM, signal.SIGUSR1):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def take(self) -> list[float]:
        """Return (stop, save) as numbers to be added up over the ranks; a save is asked for once."""
        asked = [float(self.stop), float(self.save)]
        self.save = False
        return asked

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM:
            self.stop = True
        else:
            self.save = True
