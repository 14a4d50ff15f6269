"""Steps of batches, prepared ahead in a thread: which records is a pure function of the step."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

from model.batch import Batch
from model.vlm import VLMConfig
from train.chat import Chat, Encoded
from train.dataset import Dataset
from train.packing import collate, lay_out
from train.records import Record


@dataclass(frozen=True)
class StepShape:
    """How a step's global batch is cut: `micro_batches` of `size` records, dealt to `world` ranks."""

    size: int
    micro_batches: int
    rank: int
    world: int

    @property
    def records(self) -> int:
        return self.size * self.micro_batches


class Loader:
    """Makes the batches of a rank."""

    def __init__(self, dataset: Dataset, chat: Chat, config: VLMConfig, seed: int) -> None:
        self.dataset = dataset
        self.config = config
        self.seed = seed
        self.pool = dataset.banks.config.pool
        self.chat = chat
        self._encoded = lru_cache(maxsize=100_000)(self._encode)

    def _encode(self, record: Record, prompt: bool) -> Encoded:
        durations = [clip.info.duration for clip in self.dataset.clips(record)]
        return self.chat.encode(record.turns, durations, prompt=prompt)

    def batch(self, records: list[Record], *, with_copy: bool, prompt: bool = False) -> Batch:
        """Return the batch of some records, features read from the banks.

        `prompt` ends each where its next answer would begin.
        """
        clips = [self.dataset.clips(record) for record in records]
        rows = [
            lay_out(
                self._encoded(record, prompt), [clip.info for clip in own], self.config, self.pool
            )
            for record, own in zip(records, clips, strict=True)
        ]
        ids = [record.id for record in records]
        return collate(rows, clips, self.config, ids, with_copy=with_copy)

    def micro_batches(self, step: int, shape: StepShape, *, with_copy: bool) -> list[Batch]:
        """Return this rank's batches of a step; every rank cuts the same global batch."""
        chosen = self.dataset.batch_records(step, shape.records, self.seed)
        records = [self.dataset.records[index] for index in chosen]
        return [
            self.batch(records[k * shape.size : (k + 1) * shape.size], with_copy=with_copy)
            for k in range(shape.rank, shape.micro_batches, shape.world)
        ]

    def steps(
        self, first: int, last: int, shape: StepShape, copy_every: int
    ) -> Iterator[tuple[int, list[Batch]]]:
        """Yield (step, batches) for steps in [first, last), two steps being prepared meanwhile.

        The copy baseline's features are read every `copy_every` steps.
        """
        with ThreadPoolExecutor(max_workers=1) as pool:

            def submit(step: int) -> "Future[list[Batch]]":
                with_copy = (step + 1) % copy_every == 0
                return pool.submit(self.micro_batches, step, shape, with_copy=with_copy)

            running = [submit(step) for step in range(first, min(first + 2, last))]
            for step in range(first, last):
                batches = running.pop(0).result()
                if step + 2 < last:
                    running.append(submit(step + 2))
                yield step, batches
