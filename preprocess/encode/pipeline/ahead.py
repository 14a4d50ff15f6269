"""Several workers, each in a thread of its own, a bounded number of bytes ahead of who takes their items.

    with closing(ahead(groups, [worker, worker], most_bytes=64 << 20)) as items:
        for item in items: ...      # those of the first group, then those of the second ...

A worker makes items of the group that it takes next, whatever the others are at; they are handed on
in the order of the groups. So neither their number nor their haste changes what comes out.
"""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np

Group = TypeVar("Group")
Item = TypeVar("Item", bound=tuple[Any, ...])
Worker = Callable[[Group], Generator[Item]]
"""Called for one group after the other, in their order; what it returns runs beside other workers."""

LEAST_BYTES = 4096
"""That any item counts for."""
NUDGE_SECONDS = 0.1


@dataclass
class Stream(Generic[Item]):
    """What came of a group so far and is not taken yet."""

    items: deque[Item] = field(default_factory=deque)
    ended: bool = False
    error: BaseException | None = None


class Ahead(Generic[Group, Item]):
    """The streams of groups that are begun, and what their workers and their taker share."""

    def __init__(self, groups: Sequence[Group], most_bytes: int) -> None:
        self._groups = iter(groups)
        self._most_bytes = most_bytes
        self._streams: deque[Stream[Item]] = deque()
        self._bytes = 0
        self._taking = threading.Lock()
        self._change = threading.Condition()
        self._stop = False
        self._working = 0

    def run(self, workers: Sequence[Worker[Group, Item]], interrupt: Callable[[], None]) -> Any:
        """Yield the items; at the end, and where the taker leaves, no worker is left."""
        self._working = len(workers)
        threads = [threading.Thread(target=self._work, args=(one,), daemon=True) for one in workers]
        for thread in threads:
            thread.start()
        try:
            yield from self._taken()
        finally:
            with self._change:
                self._stop = True
                self._change.notify_all()
            for thread in threads:
                thread.join(NUDGE_SECONDS)
                while thread.is_alive():
                    interrupt()
                    thread.join(NUDGE_SECONDS)

    def _taken(self) -> Iterator[Item]:
        while True:
            with self._change:
                self._change.wait_for(self._is_next_known)
                if not self._streams:
                    return
                first = self._streams[0]
                if not first.items:
                    if first.error is not None:
                        raise first.error
                    self._streams.popleft()
                    self._change.notify_all()  # another may go on whatever is held
                    continue
                item = first.items.popleft()
                self._bytes -= bytes_of(item)
                self._change.notify_all()
            yield item
            del item

    def _is_next_known(self) -> bool:
        if not self._streams:
            return not self._working
        return bool(self._streams[0].items) or self._streams[0].ended

    def _work(self, worker: Worker[Group, Item]) -> None:
        try:
            while self._work_on_next(worker):
                pass
        finally:
            with self._change:
                self._working -= 1
                self._change.notify_all()

    def _work_on_next(self, worker: Worker[Group, Item]) -> bool:
        """Take a group and make all of its items; return whether to go on."""
        stream: Stream[Item] = Stream()
        try:
            with self._taking:
                group = next(self._groups, None)
                if group is None:
                    return False
                with self._change:
                    self._streams.append(stream)
                items = worker(group)
            with closing(items):
                for item in items:
                    if not self._put(stream, item):
                        return False
                    del item
        except BaseException as error:
            stream.error = error
        finally:
            with self._change:
                stream.ended = True
                self._change.notify_all()
        return stream.error is None

    def _put(self, stream: Stream[Item], item: Item) -> bool:
        """Hand an item on when there is room, of the group that is taken now always for one; return
        whether to go on."""

        def has_room() -> bool:
            first = stream is self._streams[0] and not stream.items
            return self._stop or first or self._bytes < self._most_bytes

        with self._change:
            self._change.wait_for(has_room)
            if self._stop:
                return False
            stream.items.append(item)
            self._bytes += bytes_of(item)
            self._change.notify_all()
        return True


def ahead(
    groups: Sequence[Group],
    workers: Sequence[Worker[Group, Item]],
    most_bytes: int,
    interrupt: Callable[[], None] = lambda: None,
) -> Generator[Item]:
    """Yield the items that the workers make of the groups, in their order.

    A worker goes on while what waits to be taken holds fewer than `most_bytes` in arrays. What it raises
    is raised here, in its place. Closing this ends the workers. interrupt: ends what they wait for, and
    may be called more than once.
    """
    shared: Ahead[Group, Item] = Ahead(groups, most_bytes)
    yield from shared.run(workers[: len(groups)], interrupt)


def bytes_of(item: tuple[Any, ...]) -> int:
    """Return what an item counts for: the bytes of its arrays, and something for itself."""
    return LEAST_BYTES + sum(part.nbytes for part in item if isinstance(part, np.ndarray))
