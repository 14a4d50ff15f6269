"""Run an iterator in a thread of its own, a little ahead of whoever takes its items.

with closing(ahead(events, most_bytes=32 << 20)) as items:
    for source, event in items: ...
"""

import threading
from collections import deque
from collections.abc import Generator, Iterator
from typing import Any, TypeVar

import numpy as np

Item = TypeVar("Item", bound=tuple[Any, ...])


def ahead(items: Iterator[Item], most_bytes: int) -> Generator[Item, None, None]:
    """Yield the items, taken from their iterator by another thread.

    It goes on while what waits to be taken holds fewer than `most_bytes` in arrays. What it raises is
    raised here. Closing this ends the thread, and the iterator in it.
    """
    waiting: deque[Item] = deque()
    change = threading.Condition()
    state: dict[str, Any] = {"ended": False, "stop": False, "error": None}

    def fill() -> None:
        try:
            for item in items:
                with change:
                    waiting.append(item)
                    change.notify_all()
                    change.wait_for(lambda: state["stop"] or _bytes_of(waiting) < most_bytes)
                    if state["stop"]:
                        return
        except BaseException as error:
            state["error"] = error
        finally:
            if isinstance(items, Generator):
                items.close()
            with change:
                state["ended"] = True
                change.notify_all()

    thread = threading.Thread(target=fill, daemon=True)
    thread.start()
    try:
        while True:
            with change:
                change.wait_for(lambda: waiting or state["ended"])
                if not waiting:
                    break
                item = waiting.popleft()
                change.notify_all()
            yield item
            del item
        if state["error"] is not None:
            raise state["error"]
    finally:
        with change:
            state["stop"] = True
            change.notify_all()
        thread.join()


def _bytes_of(waiting: "deque[Item]") -> int:
    return sum(part.nbytes for item in waiting for part in item if isinstance(part, np.ndarray))
