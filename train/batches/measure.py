"""Counts the lengths of a dataset's records: once for those in files, each epoch for drawn ones."""

from collections.abc import Sequence
from functools import cached_property, lru_cache
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

from model.config import ModelSettings
from model.lape.tokens import LAPE_AXES, LapeTokens
from model.slow_fast import exact_ratio
from shards.signed import Json, canonical_json
from train.batches.augment import Looks
from train.batches.chat import Chat
from train.batches.clips import Clips, Stamps, frame_times
from train.batches.lengths import Apart, Lengths, counted, counting_code, kept_counts, text_lengths
from train.batches.turns import Count, Rounds, as_turns, count_rounds, count_rounds_apart
from train.data.dataset import Dataset, RecordFile
from train.data.known.facts import media_of
from train.data.records import Record
from train.start.templates import load_with_template


def measure(
    settings: ModelSettings, dataset: Dataset, llm: str, tokenizer: str, *, lenient: bool = False
) -> Lengths:
    """Return the lengths of a dataset's records, as `Measure` counts them in the first epoch."""
    return Measure(settings, dataset, llm, tokenizer, lenient=lenient).epoch(0)


class Measure:
    """Counts the lengths of a dataset's records, in each epoch where they are drawn in each."""

    def __init__(
        self,
        settings: ModelSettings,
        dataset: Dataset,
        llm: str,
        tokenizer: str,
        *,
        lenient: bool = False,
    ) -> None:
        """llm: name or folder of the model whose tokenizer is used. tokenizer: its digest.

        lenient: a record that the chat template refuses has UNWRITABLE tokens of text, where it else
        raises UserError.
        """
        self.settings, self.dataset, self.lenient = settings, dataset, lenient
        axes, spatial = LAPE_AXES[settings.lape_axes], settings.num_spatial_tokens
        counts = settings.num_temporal_tokens, spatial, spatial
        self.anchors = LapeTokens(counts, axes) if settings.enable_lape else None
        template, date = settings.chat_template, settings.template_date
        around, frames = settings.around_media, (settings.time_form, settings.around_frames)
        self.template = f"{tokenizer} {template} {date}" + (f" {around}" if around else "")
        self.chat = lru_cache(
            lambda: Chat(load_with_template(llm, template), self.anchors, date, around, frames)
        )
        self.in_words = self.anchors is None or 0 not in self.anchors.axes

    def epoch(self, number: int) -> Lengths:
        """Return the lengths of an epoch's records."""
        dataset, settings = self.dataset, self.settings
        # a dataset of spliced records alone has no others, whose empty columns could not be joined
        lots = [self._read] if self._read.clips.record.size or not dataset.splices else []
        spliced = [file for file in dataset.files if file.splice]
        lots += [self._spliced(*own, number) for own in zip(spliced, self._sources, strict=True)]
        text, supervised, *apart = widened([lot.counts for lot in lots]).T
        clips = lots[0].clips
        if dataset.splices:
            digest = self._read.clips.digest
            clips = Clips.joined(
                [lot.clips for lot in lots], [len(lot.counts) for lot in lots], digest
            )
        written = None
        if settings.time_form:
            seconds = np.concatenate([lot.seconds for lot in lots])
            written = Stamps.joined(seconds, clips.banked, self.chat())
        looks = Looks.of_epoch(dataset, settings, number)
        drawn = clips.uses is not None or looks.settings.is_on
        ratio = exact_ratio(settings.slow_frame_ratio)
        if settings.newline_tokens:
            media = np.bincount(clips.record[clips.first], minlength=len(text))
            # below 0 is UNWRITABLE, which stays what it is
            newlines = np.where(text < 0, 0, media * settings.newline_tokens)
            text = text + newlines
            if apart:  # they are among the tokens that all turns see
                apart[0] = apart[0] + newlines
        seen = looks if drawn else None
        own = Apart(*apart) if apart else None
        return Lengths(text, supervised, clips, ratio, written, seen, own, settings.closing_tokens)

    @cached_property
    def _read(self) -> "Lot":
        """The records that are the same in every epoch."""
        dataset = self.dataset
        files = [file for file in dataset.files if not file.splice]
        own_media = [media_of(file.records) for file in files]
        media = [
            one
            for file, own in zip(files, own_media, strict=True)
            for _ in range(file.repeats)
            for one in own
        ]
        clips = Clips.of(media, dataset.banks, *self._strides, self.settings.pooled)
        counts, first = [np.zeros((0, 2), np.int64)], 0
        for file, own in zip(files, own_media, strict=True):
            number = sum(one.media for one in own)
            durations = clips.duration[first : first + number]
            first += number * file.repeats
            facts = durations, self.template, self.anchors, self.chat
            found = text_lengths(file, *facts, lenient=self.lenient)
            # `name*2` in a mixture: the same records once more, counted once
            counts.append(np.tile(found, (file.repeats, 1)))
        stamped = bool(self.settings.time_form)
        return Lot(clips, widened(counts), frame_times(media) if stamped else NO_TIMES)

    def _spliced(self, file: RecordFile, sources: Clips, epoch: int) -> "Lot":
        """The records that are spliced for an epoch. sources: the clips of its sources."""
        splice = file.splice
        assert splice is not None
        laid = splice.layout(epoch, np.arange(file.count))
        clips = sources.spliced(laid)
        facts: Json = {"tokenizer": self.template, "anchors": repr(self.anchors)}
        facts |= {"settings": repr(splice.settings), "code": counting_code()}
        facts |= {"turns": "independent"} if splice.independent else {}
        talks = splice.questions(laid, timed=self.in_words)
        # phrases, choices and times decide the texts; the first few texts too, in
        # case their wording changes
        key = blake2b(canonical_json(facts | {"first": repr(talks[:64])}), digest_size=16)
        for column in laid:
            key.update(np.ascontiguousarray(column).tobytes())
        key.update("\0".join("\1".join(own.phrases) for own in splice.sources).encode())
        seconds, apart = clips.duration.tolist(), splice.independent
        shape = len(talks), len(Count._fields) if apart else 2
        counts = kept_counts(
            key.hexdigest(), shape, lambda: self._count(talks, seconds, independent=apart)
        )
        stamped = bool(self.settings.time_form)
        return Lot(clips, counts, splice.frame_times(laid) if stamped else NO_TIMES)

    def _count(
        self, talks: Sequence[Rounds], durations: Sequence[float], *, independent: bool
    ) -> np.ndarray:
        count = count_rounds_apart if independent else count_rounds
        counts = count(self.chat(), talks, durations)
        if counts is None:  # the template has no control tokens between turns: count whole records
            turns = [as_turns(talk) for talk in talks]
            records = [
                Record(str(k), ("",), tuple(own), "", "", independent=independent)
                for k, own in enumerate(turns)
            ]
            counts = counted(self.chat(), records, durations)
            counts = counts if independent else counts[:, :2]
        return counts

    @cached_property
    def _sources(self) -> list[Clips]:
        """The clips of the sources of each splice."""
        # in a list: two splices may be of one file, and of other rows or banks
        return [
            Clips.of(own.records, self.dataset.banks, *self._strides, self.settings.pooled)
            for own in self.dataset.splices
        ]

    @property
    def _strides(self) -> tuple[int, int]:
        return self.dataset.slow_stride, self.dataset.fast_stride


def layout_facts(settings: ModelSettings) -> Json:
    """Return the facts of frames' layout that a plan depends on, only those that are not the default.

    So plans from before these settings keep their fingerprint, and their runs can be resumed.
    """
    tagged = settings.around_media or settings.around_frames
    facts: Json = {"media_tags": settings.media_tags} if tagged else {}
    if settings.frame_marks != "frames":
        facts["frame_marks"] = settings.frame_marks
    if settings.pool_after_projector:
        facts["pool_after_projector"] = True
    return facts


class Lot(NamedTuple):
    """Counts of the records that were counted together."""

    clips: Clips
    counts: np.ndarray
    """int64 `(records, 2)`: tokens of text, supervised ones; or a `Count` of each."""
    seconds: np.ndarray
    """float64, times of all frames of all media, if times are written before frames; else empty."""


def widened(counts: Sequence[np.ndarray]) -> np.ndarray:
    """Return counts joined, with the columns of `Count` if any of them has these."""
    most = max(own.shape[1] for own in counts)
    wide = [
        own if own.shape[1] == most else np.column_stack([own, own[:, 0], 0 * own])
        for own in counts
    ]
    return np.concatenate(wide)


NO_TIMES = np.zeros(0)
