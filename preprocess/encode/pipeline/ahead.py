"""Run several workers, each in its own thread, a bounded number of bytes ahead of the consumer.

    with closing(Ahead(groups, [worker, worker], most_bytes=64 << 20)) as items:
        for item in items: ...      # those of the first group, then those of the second ...

A worker takes the next group and makes its items, independently of the others; items are yielded in the
order of the groups. So neither the number nor the speed of workers changes the output.
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
"""Called with each group in order, one call at a time; the generators it returns run in parallel."""

LEAST_BYTES = 4096
"""Bytes that every item counts for, in addition to its arrays."""
NUDGE_SECONDS = 0.1


@dataclass
class Stream(Generic[Item]):
    """The items of a group that were made and not consumed yet."""

    items: deque[Item] = field(default_factory=deque)
    ended: bool = False
    error: BaseException | None = None


class Ahead(Iterator[Item]):
    """The items that workers make of groups, in the order of the groups.

    Workers begin at once, and continue while the waiting items have fewer than `most_bytes` in arrays. A
    worker's exception is raised at the item's place in the order.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        workers: Sequence[Worker[Group, Item]],
        most_bytes: int,
        interrupt: Callable[[], None] = lambda: None,
    ) -> None:
        """interrupt: makes workers return that wait for something else; may be called more than once."""
        workers = workers[: len(groups)]
        self._groups = iter(groups)
        self._most_bytes = most_bytes
        self._interrupt = interrupt
        self._streams: deque[Stream[Item]] = deque()
        self._bytes = 0
        self._taking = threading.Lock()
        self._change = threading.Condition()
        self._stop = False
        self._working = len(workers)
        self._threads = [
            threading.Thread(target=self._work, args=(one,), daemon=True) for one in workers
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """End the workers; all have ended when this returns."""
        with self._change:
            self._stop = True
            self._change.notify_all()
        for thread in self._threads:
            thread.join(NUDGE_SECONDS)
            # a worker may be waiting for a decoder: it is interrupted until it returns
            while thread.is_alive():
                self._interrupt()
                thread.join(NUDGE_SECONDS)

    def __next__(self) -> Item:
        """Return the next item once it is there. Closes at the end, and with a worker's error."""
        try:
            with self._change:
                return self._taken()
        except BaseException:
            self.close()
            raise

    def _taken(self) -> Item:
        while True:
            self._change.wait_for(self._is_next_known)
            if not self._streams:
                raise StopIteration
            first = self._streams[0]
            if first.items:
                item = first.items.popleft()
                self._bytes -= bytes_of(item)
                self._change.notify_all()
                return item
            if first.error is not None:
                raise first.error
            self._streams.popleft()
            self._change.notify_all()  # the next group is first now, and may always add one item

    def _is_next_known(self) -> bool:
        if not self._streams:
            return not self._working
        return bool(self._streams[0].items) or self._streams[0].ended

    def _work(self, worker: Worker[Any, Item]) -> None:
        try:
            while self._work_on_next(worker):
                pass
        finally:
            with self._change:
                self._working -= 1
                self._change.notify_all()

    def _work_on_next(self, worker: Worker[Any, Item]) -> bool:
        """Take a group and make all of its items; return whether to continue."""
        stream: Stream[Item] = Stream()
        try:
            with self._taking:
                group = next(self._groups, None)
                if group is None:
                    return False
                with self._change:
                    # under the lock that gives out groups: streams stand in the order of the groups
                    self._streams.append(stream)
                items = worker(group)
            with closing(items):
                for item in items:
                    if not self._put(stream, item):
                        return False
                    del item  # else its arrays live until the next item is made
        except BaseException as error:
            stream.error = error
        finally:
            with self._change:
                stream.ended = True
                self._change.notify_all()
        return stream.error is None

    def _put(self, stream: Stream[Item], item: Item) -> bool:
        """Add an item when there is room; return whether to continue.

        The group that is being consumed may always add one item: otherwise later groups could fill the
        room, and consumer and workers would wait for each other.
        """

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


def bytes_of(item: tuple[Any, ...]) -> int:
    """Return the bytes that an item counts for: those of its arrays, and `LEAST_BYTES`."""
    return LEAST_BYTES + sum(part.nbytes for part in item if isinstance(part, np.ndarray))
