"""Write a shard in another thread, behind the tower: tar, checksums, disk.

with Writing(writer) as writing:
    writing.write(key, meta, arrays, underflowed)       # returns at once
    writing.wait()                                      # until all of it is on the disk
"""

import threading
from collections import deque
from collections.abc import Callable
from types import TracebackType

import numpy as np

from shards.format.quarantine import QuarantineEntry
from shards.format.samples import SampleMeta
from shards.write.shard import ShardWriter


class Writing:
    """Queue of calls of a `ShardWriter`, made in order; an error is raised by the next call here."""

    def __init__(self, writer: ShardWriter) -> None:
        self._writer = writer
        self._waiting: deque[Callable[[], None]] = deque()
        self._left = 0
        """Calls that are waiting or being made."""
        self._change = threading.Condition()
        self._over = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Writing":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        with self._change:
            self._over = True
            if kind is not None:
                self._waiting.clear()
            self._change.notify_all()
        self._thread.join()

    def write(
        self, key: str, meta: SampleMeta, arrays: dict[int, np.ndarray], underflowed: int
    ) -> None:
        """Queue a clip's features; who queues clip after clip waits for each, or holds them all."""
        self._put(lambda: self._writer.write(key, meta, arrays, underflowed))

    def fail(self, entry: QuarantineEntry) -> None:
        """Queue the failure of a clip."""
        self._put(lambda: self._writer.fail(entry))

    def wait(self) -> None:
        """Return when everything is written; raises the writer's error."""
        with self._change:
            self._change.wait_for(lambda: self._error or not self._left)
        self._raise()

    def _put(self, do: Callable[[], None]) -> None:
        with self._change:
            self._raise()
            self._waiting.append(do)
            self._left += 1
            self._change.notify_all()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._waiting or self._over)
                if not self._waiting:
                    return
                do = self._waiting.popleft()
            try:
                # not under the lock: the tower goes on while the disk is busy
                do()
            except BaseException as error:
                with self._change:
                    self._error = error
                    self._change.notify_all()
                return
            # it holds the arrays of its clip
            del do
            with self._change:
                self._left -= 1
                self._change.notify_all()
