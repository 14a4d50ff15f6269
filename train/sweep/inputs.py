"""What the runs of a sweep read: opened once before the first one trains, and known by digests."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

from shards.errors import UserError
from shards.read.banks import joint
from shards.signed import Json
from train.batches.clips import Clips
from train.batches.plan import drawn_facts
from train.data.dataset import Dataset, open_dataset
from train.data.known.facts import Media, media_of
from train.data.records import Record, records_digest
from train.settings.config import DataSettings, TrainConfig
from train.start.stage import bank_problem
from train.start.stage_files import stage_problem
from train.sweep.runs import Run

ENDS = 1 << 20
"""Bytes at either end of a file of weights that it is known by, beside its size."""

Key = tuple[object, ...]


class Inputs:
    """Datasets that were opened, by the settings that make them."""

    def __init__(self) -> None:
        self._known: dict[Key, tuple[Dataset, Json]] = {}

    def of(self, run: Run) -> Json:
        """Return what a run learns from, and under `test` what it is scored on.

        UserError with what is wrong with its stage, banks, records or test set.
        """
        config = run.config
        problems = []
        stage = None if run.stage else stage_problem(config.stage_path)
        if stage:
            problems.append(stage)
        if run.sweep.test_path and not config.bank:
            problems.append("bank: missing; the test set is read from it")
        try:
            dataset, facts = self._opened(config, run.sweep.test_path)
            problems += filter(None, [bank_problem(config, dataset)])
        except UserError as error:
            problems += error.problems
        if problems:
            raise UserError.of(problems)
        plan = facts["plan"] | {"stage": weights_digest(config.stage_path)}
        return facts | {"plan": plan}

    def asked(self, run: Run) -> Json:
        """Return what a run's scores are to be of: its test records, and how many of them."""
        facts = self._opened(run.config, run.sweep.test_path)[1]
        return facts["test"] | {"max_records": run.sweep.max_records}

    def _opened(self, config: TrainConfig, test_path: tuple[str, ...]) -> tuple[Dataset, Json]:
        names = [item.name for item in fields(DataSettings)] + ["slow_frame_ratio"]
        drawn = config.splice_path or config.data_config or config.augment
        # what is drawn (spliced records, augmented frames, mixtures) depends on
        # the seed, all else does not
        names += ["seed"] if drawn else []
        # runs that differ in rates or steps alone share what was read: records are opened once
        key: Key = (test_path, *(repr(getattr(config, name)) for name in names))
        if key not in self._known:
            # test records are checked as held-out ones: before the first run trains, not after the last
            eval_path = [*config.eval_path, *(p for p in test_path if p not in config.eval_path)]
            opened = open_dataset(replace(config, eval_path=eval_path))
            self._known[key] = opened, facts_of(opened)
        return self._known[key]


def facts_of(dataset: Dataset) -> Json:
    """Return what identifies the inputs of a run: features, records and clips by digests."""
    strides = dataset.slow_stride, dataset.fast_stride

    def clips(records: Sequence[Record | Media]) -> str:
        return Clips.of(records, dataset.banks, *strides).digest

    records = {
        f"{k} {Path(file.path).name}": f"{file.digest} {file.count // file.repeats} x {file.repeats}"
        for k, file in enumerate(dataset.files)
    }
    kept = [media for file in dataset.files for media in media_of(file.records)]
    # a mixture's YAML says these things of its datasets, and is compared by what it gives
    said = drawn_facts(dataset) | {
        "independent": [k for k, file in enumerate(dataset.files) if file.independent]
    }
    return {
        "bank": joint(dataset.banks.config),
        "plan": {"records": records, "clips": clips(kept), "datasets": said},
        # apart from the plan: scores are made again where the test set changed, training is not
        "test": {"records": records_digest(dataset.held_out), "clips": clips(dataset.held_out)},
    }


def weights_digest(stage: str) -> str:
    """Return what the weights of a stage are known by; empty where they are not on this disk."""
    folder = Path(stage)
    files = sorted(
        path
        for path in folder.rglob("*.safetensors")
        # a run that is a stage may leave checkpoints behind, which nothing starts from
        if not path.relative_to(folder).parts[0].startswith("checkpoint-")
    )
    whole = hashlib.blake2b(digest_size=16)
    # not the whole files: a model of many gigabytes would be read for every sweep
    for path in files:
        size = path.stat().st_size
        with open(path, "rb") as file:
            whole.update(f"{path.relative_to(folder).as_posix()} {size}\n".encode())
            whole.update(file.read(ENDS))
            file.seek(max(size - ENDS, 0), os.SEEK_SET)
            whole.update(file.read(ENDS))
    return whole.hexdigest() if files else ""
