"""Batches from the plan, prepared ahead in threads; their content is a pure function of the step.

Nothing is shuffled here: the order of the records is the plan's, `train.batches.plan.order`.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import torch

from model.batch import Batch, pinned, to_device
from model.vlm import VLMConfig
from shards.read.timeline import Medium
from train.batches.augment import Look, Looks
from train.batches.chat import MEDIA, Chat, Encoded
from train.batches.collate import Row, collate, frames_within, lay_out, pack
from train.batches.run_plan import RunPlan
from train.batches.turns import encode_apart
from train.data.dataset import Dataset
from train.data.records import Record, one_by_one, tasks_of

THREADS = 2
"""Threads that prepare batches; more would compete with the training loop for the interpreter lock."""


@dataclass(frozen=True)
class Share:
    """The packs of a step that are this process's: k = rank, rank + world, ..."""

    rank: int
    world: int
    """Number of processes."""

    def packs(self, plan: RunPlan, step: int) -> range:
        """Return the numbers of this process's packs in a step."""
        return range(self.rank, int(plan.num_packs[step]), self.world)

    def idles(self, plan: RunPlan, step: int) -> bool:
        """Return whether other processes have one pack more in this step.

        With DDP and FSDP processes wait for each other in every pass, so all must make as many passes.
        """
        return len(self.packs(plan, step)) < -(-int(plan.num_packs[step]) // self.world)


class Loader:
    """Makes the batches of a process."""

    def __init__(
        self,
        dataset: Dataset,
        chat: Chat,
        config: VLMConfig,
        *,
        row_length: int = 0,
        pin: bool = False,
        limit: int = 0,
    ) -> None:
        """row_length: least length of rows. pin: whether batches are copied to a CUDA device.

        limit: most tokens of a record, kept by leaving out whole frames, for records without a plan; 0
        sets none.
        """
        self.dataset = dataset
        self.config = config
        self.pool = dataset.banks.config.pool
        self.chat = chat
        self.row_length = row_length
        self.pin = pin
        self.limit = limit
        # a spliced record is used once: there is nothing to gain from keeping many
        kept = 1_000 if dataset.splices else 100_000
        self._encoded = lru_cache(maxsize=kept)(self._encode)
        self._fits = lru_cache(maxsize=kept)(self._frames_that_fit)
        # lru_cache on the instance: the caches die with the loader, and no record
        # needs a hash of the dataset
        self._record = lru_cache(maxsize=1_000)(dataset.record)

    def _encode(self, record: Record, places: object, answer: int | None) -> Encoded:
        """Return a record, or its prompt, as tokens. places: its own.

        Records are equal where their places differ: a file in two datasets may have two banks, whose
        clips of one id have other durations.
        """
        durations = [clip.info.duration for clip in self.dataset.clips(record)]
        if not record.independent:
            return self.chat.encode(record.turns, durations, answer=answer)
        if answer is None:
            return encode_apart(self.chat, record, durations)
        # the number of the question among those that are asked alone
        asked = sum(turn.role == "assistant" for turn in record.turns[:answer])
        alone = one_by_one(record.turns)[asked]  # as in training: without the turns before
        return self.chat.encode(alone, durations, answer=len(alone) - 1)

    def fitting(self, record: Record) -> int:
        """Return the most frames of a clip within a record's token limit; 0 if one is too much."""
        if not self.limit:
            return self.config.max_frames_num
        return self._fits(record, record.places)

    def _frames_that_fit(self, record: Record, places: object) -> int:
        infos = [clip.info for clip in self.dataset.clips(record)]
        encoded = self._encoded(record, places, None)
        return frames_within(encoded, infos, self.config, self.pool, self.limit, self.chat.stamp)

    def prompt_length(self, record: Record, answer: int) -> int:
        """Return the tokens of a record up to where an answer begins."""
        return len(self._row(record, None, answer)[0])

    def _row(
        self,
        record: Record,
        most: int | None,
        answer: int | None,
        looks: Sequence[Look] | None = None,
    ) -> tuple[Row, list[Medium]]:
        """Return a record's row, cut where an answer begins if one is given, and the media in it."""
        encoded = self._encoded(record, record.places, answer)
        # a prompt may end before the record's last medium, whose features would be read for nothing
        media: list[Medium] = [*self.dataset.clips(record)[: encoded.ids.count(MEDIA)]]
        most = max(self.fitting(record), 1) if most is None else most
        infos = [clip.info for clip in media]
        stamp = self.chat.stamp
        return lay_out(encoded, infos, self.config, self.pool, most, stamp, looks), media

    def batch(self, records: Sequence[Record], *, with_copy: bool = False) -> Batch:
        """Return the batch of records, one a row, features read from the banks."""
        return self.rows([[(record, None)] for record in records], with_copy)

    def prompts(self, questions: Sequence[tuple[Record, int]]) -> Batch:
        """Return the batch of (record, number of an answer's turn): rows cut where the answer begins."""
        rows = [[(record, None)] for record, _ in questions]
        return self.rows(rows, False, [answer for _, answer in questions])

    def pack(self, plan: RunPlan, step: int, number: int, *, with_copy: bool = False) -> Batch:
        """Return the batch of a pack of the plan."""
        chosen = plan.pack(step, number)
        rows = [[(self._record(k), int(plan.frames[k])) for k in row] for row in chosen]
        looks = None
        if self.dataset.augment.is_on:
            looks = [[self._looks(k) for k in row] for row in chosen]
        batch = self.rows(rows, with_copy, looks=looks)
        # denominators, memory and packing were counted before: one token more and all three are wrong
        assert batch.lengths.tolist() == [int(plan.tokens[row].sum()) for row in chosen]
        return batch

    def _looks(self, number: int) -> list[Look]:
        """Return the choice of frames for each medium of a plan's record."""
        # records of drawn epochs are numbered through: the number alone says which epoch drew it
        epoch, place = divmod(number, self.dataset.count)
        looks = Looks.of_epoch(self.dataset, self.config, epoch)
        return [looks.of(place, medium) for medium in range(self._record(number).media)]

    def rows(
        self,
        rows: Sequence[Sequence[tuple[Record, int | None]]],
        with_copy: bool,
        answers: Sequence[int] | None = None,
        looks: Sequence[Sequence[Sequence[Look]]] | None = None,
    ) -> Batch:
        """Return the batch of rows of (record, most frames of a clip).

        answers: for rows of one record each, the turn at which each is cut. looks: for each record of
        each row, the choice of frames of its media, where that is drawn.
        """
        laid, clips = [], []
        for number, row in enumerate(rows):
            answer = answers[number] if answers else None
            talks, own = [], []
            for place, (record, most) in enumerate(row):
                seen = looks[number][place] if looks else None
                talk, media = self._row(record, most, answer, seen)
                talks.append(talk)
                own.append(media)
            laid.append(pack(talks) if len(talks) > 1 else talks[0])
            clips.append(own)
        batch = collate(
            laid,
            [[clip for media in own for clip in media] for own in clips],
            self.config,
            [record.id for row in rows for record, _ in row],
            with_copy=with_copy,
            length=self.row_length,
            tasks=[task for row in rows for record, _ in row for task in tasks_of(record)],
        )
        # int8 features cross to a GPU as stored, half the bytes; on a CPU they become floats in this
        # thread, beside the steps
        return pinned(batch) if self.pin else to_device(batch, torch.device("cpu"))

    def packs(
        self, plan: RunPlan, share: Share, step: int, *, with_copy: bool = False
    ) -> list[Batch]:
        """Return the batches of this process's packs of a step."""
        return [self.pack(plan, step, k, with_copy=with_copy) for k in share.packs(plan, step)]

    def idle(self, plan: RunPlan, step: int) -> Batch:
        """Return a small batch for an idle pass, which does not count: one record, a frame a clip."""
        return self.rows([[(self._record(plan.records(step)[0]), 1)]], False)

    def steps(
        self, plan: RunPlan, share: Share, first: int, *, copy_every: int, prefetch: int = 2
    ) -> Iterator[tuple[int, list[Batch]]]:
        """Yield (step, batches) from a step to the plan's end, up to `prefetch` steps prepared ahead.

        The features of the baselines are read every `copy_every` steps.
        """
        # threads: nothing is pickled between processes, and reading and copying release the lock
        with ThreadPoolExecutor(max_workers=min(prefetch, THREADS)) as pool:
            running: deque[Future[list[Batch]]] = deque()
            ahead = first
            for step in range(first, plan.num_steps):
                # one more than `prefetch`: the first of them is this step's own
                while ahead < min(step + prefetch + 1, plan.num_steps):
                    with_copy = (ahead + 1) % copy_every == 0
                    running.append(pool.submit(self.packs, plan, share, ahead, with_copy=with_copy))
                    ahead += 1
                # in the order of submission, whichever thread is first: the
                # content of a step is the plan's
                yield step, running.popleft().result()
