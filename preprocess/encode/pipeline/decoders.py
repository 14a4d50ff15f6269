"""Processes that decode clips ahead of the tower, several clips at a time.

    with Decoders(4, bank) as decoders, closing(decoders.events(jobs, together=16)) as events:
        for source, event in events: ...        # clip after clip, in the order of the jobs

`begin` lets them start before anybody takes the events. All parts of one file are decoded by one process,
which can continue from one part to the next. Members of an archive are unpacked in the order of the jobs,
so that a compressed archive is read only once.
"""

from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import numpy as np

from preprocess.decode.archive import Unpacker
from preprocess.decode.decode_child import DecodeChild
from preprocess.decode.events import Begin, ClipFacts
from preprocess.decode.request import ReadRequest
from preprocess.decode.source import Outcome, SourceReader
from preprocess.encode.pipeline.ahead import Ahead
from shards.forked import cores
from shards.format.plan import ClipSource

# Several processes per tower: with one, a GPU waited for one core.
HELD_BYTES = 32 << 20
"""Bytes of frames that wait for the tower, per process."""

Job = tuple[ClipSource, ReadRequest]
SourceEvent = tuple[ClipSource, Begin | np.ndarray | Outcome[ClipFacts]]


def decoders_for(towers: int) -> int:
    """Return the number of decoder processes per tower, for `towers` towers on this machine."""
    return cores(sharers=towers)


@dataclass(frozen=True)
class Begun:
    """Events that are being made before anybody has asked for them."""

    jobs: Sequence[Job]
    together: int
    events: Ahead[SourceEvent]

    def serves(self, jobs: Sequence[Job], together: int) -> bool:
        """Return whether its events begin with those of these jobs, or are their first ones."""
        common = min(len(jobs), len(self.jobs))
        return together == self.together and list(jobs[:common]) == list(self.jobs[:common])


class Decoders(ExitStack):
    """Decoder processes, each started when the first clip is given to it."""

    def __init__(self, count: int, unpacker: Unpacker) -> None:
        super().__init__()
        self.enter_context(unpacker)
        self.readers = [
            self.enter_context(SourceReader(DecodeChild(), unpacker)) for _ in range(count)
        ]
        self._begun: Begun | None = None
        # first of all when closed: workers read from what is closed after it
        self.callback(self.drop)

    def begin(self, jobs: Sequence[Job], together: int) -> None:
        """Decode clips that most likely come first; `events` takes them where its jobs are equal."""
        self.drop()
        self._begun = Begun(jobs, together, self._ahead(jobs, together))

    def drop(self) -> None:
        """Give up what was begun."""
        if self._begun:
            self._begun.events.close()
        self._begun = None

    def events(self, jobs: Sequence[Job], together: int) -> Generator[SourceEvent]:
        """Yield the frames of each clip, `together` at a time, and its Outcome last.

        Raises as `SourceReader.events` does, after all earlier events have been consumed.
        """
        begun, self._begun = self._begun, None
        if begun:
            with closing(begun.events) as events:
                if begun.serves(jobs, together):
                    left = min(len(jobs), len(begun.jobs))
                    jobs = jobs[left:]
                    while left:
                        event = next(events)
                        left -= isinstance(event[1], Outcome)
                        yield event
                        del event
        with closing(self._ahead(jobs, together)) as events:
            yield from events

    def _ahead(self, jobs: Sequence[Job], together: int) -> Ahead[SourceEvent]:
        files = groupby(jobs, key=lambda job: (job[0].path, job[0].offset))
        workers = [partial(read_file, reader, together) for reader in self.readers]
        return Ahead(
            [list(group) for _, group in files],
            workers,
            HELD_BYTES * len(self.readers),
            self._interrupt,
        )

    def _interrupt(self) -> None:
        for reader in self.readers:
            reader.child.interrupt()


def read_file(reader: SourceReader, together: int, jobs: Sequence[Job]) -> Generator[SourceEvent]:
    """Return the events of the parts of one file; a member of an archive is unpacked at once."""
    reader.unpack_ahead(jobs[0][0])

    def events() -> Generator[SourceEvent]:
        for source, request in jobs:
            for event in reader.events(source, request, together):
                yield source, event

    return events()
