"""The clips of records as arrays, read from the banks' catalogues, from which lengths are counted."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b

import numpy as np

from model.slow_fast import uniform_indices
from shards.read.banks import Banks, Place
from shards.read.timeline import Timeline
from shards.signed import canonical_json
from train.batches.chat import Chat
from train.data.known.facts import Media
from train.data.records import Record
from train.data.splice import Layout


@dataclass(frozen=True)
class Clips:
    """The clips of records, one entry per use of a clip, in the order of the records.

    A medium is one use, or several that a timeline joins.
    """

    record: np.ndarray
    """int64, the number of the record of each use."""
    frames: np.ndarray
    """int64, banked frames."""
    slow_cells: np.ndarray
    fast_cells: np.ndarray
    """int64, cells of a frame on either grid."""
    duration: np.ndarray
    """float64 seconds of each medium."""
    digest: str
    """blake2b of the ids, times and features of all of them, in order."""
    uses: np.ndarray | None = None
    """int64 `(media,)`, the number of uses of each medium; None where all are 1."""

    @classmethod
    def of(
        cls,
        records: Sequence[Record | Media],
        banks: Banks,
        slow_stride: int,
        fast_stride: int,
        pooled: int = 1,
    ) -> "Clips":
        """Read the facts of the records' clips, all of which are banked, from the catalogues.

        pooled: banked cells on a side that are pooled to one token.
        """
        media = [(k, place) for k, own in enumerate(records) for place in own.places]
        spliced = [k for k, (_, place) in enumerate(media) if isinstance(place, Timeline)]
        uses = np.ones(len(media), np.int64)
        places: list[Place] = []
        taken: dict[int, int] = {}
        for number, (_, place) in enumerate(media):
            if isinstance(place, Timeline):
                uses[number] = len(place.stretches)
                for stretch in place.stretches:
                    taken[len(places)] = stretch.last - stretch.first
                    places.append(stretch.place)
            else:
                places.append(place)
        digest = blake2b(
            "\n".join(c for own in records for c in own.clips).encode(), digest_size=16
        )
        if cuts := [cut.to_json() for own in records for cut in own.cuts]:
            digest.update(canonical_json({"cuts": cuts}))
        values = np.zeros((4, len(places)))
        found = np.zeros(len(places), bool)
        # by bank, in columns: a plan of a hundred thousand clips has no time for one object each
        for bank in banks.banks:
            here = np.asarray([place.bank is bank for place in places], bool)
            rows = np.asarray([place.row for place in places if place.bank is bank], np.int64)
            columns = bank.columns
            for name in (
                "start",
                "end",
                # checksums of the features: a bank remade with other features is another run
                *(f"stride{s}_crc32c" for s in (slow_stride, fast_stride)),
            ):
                digest.update(columns[name][rows].tobytes())
            for grid, stride in ((1, slow_stride), (2, fast_stride)):
                shape = columns[f"stride{stride}_shape"].reshape(-1, 4).astype(np.int64)[rows]
                values[0, here] = shape[:, 0]
                values[grid, here] = -(-shape[:, 1] // pooled) * -(-shape[:, 2] // pooled)
            values[3, here] = (columns["end"] - columns["start"])[rows]
            found |= here
        assert found.all()
        record = np.repeat(np.asarray([k for k, _ in media], np.int64), uses)
        frames, slow, fast = values[:3].astype(np.int64)
        frames[list(taken)] = list(taken.values())
        duration = values[3][np.cumsum(uses) - uses]
        duration[spliced] = [media[k][1].duration for k in spliced]
        facts = frames, slow, fast, duration, digest.hexdigest()
        return cls(record, *facts, uses if spliced else None)

    @classmethod
    def joined(cls, parts: Sequence["Clips"], records: Sequence[int], digest: str) -> "Clips":
        """Return the clips of several parts of the records, one after the other.

        records: the number of records of each part.
        """
        before = np.cumsum([0, *records]).tolist()
        record = np.concatenate([own.record + k for own, k in zip(parts, before, strict=False)])
        frames, slow, fast, duration = (
            np.concatenate([getattr(own, name) for own in parts])
            for name in ("frames", "slow_cells", "fast_cells", "duration")
        )
        uses = np.concatenate(
            [np.ones(len(own.frames), np.int64) if own.uses is None else own.uses for own in parts]
        )
        several = uses if (uses != 1).any() else None
        return cls(record, frames, slow, fast, duration, digest, several)

    def spliced(self, laid: Layout) -> "Clips":
        """Return the clips of spliced records, where these clips are those of their sources, one each."""
        on = np.arange(laid.source.shape[1]) < laid.parts[:, None]
        source = laid.source[on]
        return Clips(
            np.repeat(np.arange(len(laid.parts)), laid.parts),
            (laid.last - laid.first)[on],
            self.slow_cells[source],
            self.fast_cells[source],
            # summed in order, as a timeline does: the same rounding
            np.cumsum(np.where(on, laid.end / 1000 - laid.start / 1000, 0.0), axis=1)[:, -1],
            "",
            laid.parts,
        )

    @cached_property
    def first(self) -> np.ndarray:
        """The first use of each medium: int64 `(media,)`."""
        return (
            np.arange(len(self.frames)) if self.uses is None else np.cumsum(self.uses) - self.uses
        )

    @cached_property
    def banked(self) -> np.ndarray:
        """The banked frames of each medium: int64 `(media,)`."""
        return np.add.reduceat(self.frames, self.first) if len(self.first) else self.frames

    @cached_property
    def place(self) -> np.ndarray:
        """The number of each medium in its record: int64 `(media,)`."""
        record = self.record[self.first]
        return np.arange(len(record)) - np.searchsorted(record, record)

    @cached_property
    def line(self) -> np.ndarray:
        """The first index of each use's frames, all frames concatenated: int64 `(uses,)`."""
        return np.cumsum(self.frames) - self.frames


@dataclass(frozen=True)
class Stamps:
    """The number of tokens of the time before each frame, and of the tags around it."""

    tokens: np.ndarray
    """int64 `(frames,)`, for every banked frame of every use of a clip, one use after the other."""
    first: np.ndarray
    """int64 `(media,)`, the first index of each medium's frames."""

    @classmethod
    def joined(cls, seconds: np.ndarray, frames: np.ndarray, chat: Chat) -> "Stamps":
        """Count the tokens around frames; seconds: of all frames; frames: number of each medium's."""
        tokens = [sum(map(len, chat.stamp(time))) for time in seconds.tolist()]
        return cls(np.asarray(tokens, np.int64), np.cumsum(frames) - frames)

    def taken(self, banked: np.ndarray, taken: np.ndarray) -> np.ndarray:
        """Return the tokens of each medium, with `taken` of its `banked` frames used, evenly spaced."""
        out = np.zeros_like(taken)
        # most clips of a data set have the same number of frames: few pairs, each an indexing of arrays
        for most, count in set(zip(banked.tolist(), taken.tolist(), strict=True)):
            these = np.flatnonzero((banked == most) & (taken == count))
            places = self.first[these, None] + np.asarray(uniform_indices(most, count), np.int64)
            out[these] = self.tokens[places].sum(axis=1)
        return out


def frame_times(records: Sequence[Record | Media]) -> np.ndarray:
    """Return the seconds of all banked frames of the records' media, one after the other."""
    seconds: dict[Place | Timeline, np.ndarray] = {}
    # each clip once, however many records ask about it
    for place in {place: None for record in records for place in record.places}:
        info = place.clip().info
        seconds[place] = info.timestamps - info.start
    media = [seconds[place] for record in records for place in record.places]
    return np.concatenate([np.zeros(0), *media])
