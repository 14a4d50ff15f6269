"""The run's inputs: banks and records, opened, joined and checked before torch is imported."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from itertools import chain
from pathlib import Path

from shards.annotations.files import local_copy
from shards.annotations.globs import expanded
from shards.errors import UserError
from shards.read.banks import BankedClip, Banks, arithmetic_note
from shards.read.timeline import SplicedClip
from train.data.coordinates import numbers_note, repeats_note
from train.data.drops import LIST, Drop, reason_counts
from train.data.known.facts import file_digest, has_dialogues
from train.data.mixtures import MixturePart, all_parts
from train.data.reading import Reading, shorten
from train.data.records import PLAIN, Record
from train.data.splice import Splice
from train.settings.config import DataSettings, TrainConfig
from train.settings.drawn import AugmentSettings, SpliceSettings, read_augment, read_splice
from train.settings.folders import Folders

DEFAULTS = DataSettings()
SAMPLED = 1024
"""Records of a dataset that are looked at for what is worth saying."""


@dataclass(frozen=True)
class RecordFile:
    """The records of one file or folder of a run, or drawn from it."""

    path: str
    digest: str
    """Of the file's bytes and the choice of rows."""
    records: Sequence[Record]
    """The records that are kept."""
    repeats: int
    splice: Splice | None = None
    """The drawing of records, where they are spliced and not read."""
    independent: bool = False
    """Whether its records have independent turns."""

    @property
    def count(self) -> int:
        """Records of an epoch."""
        return (self.splice.count if self.splice else len(self.records)) * self.repeats

    @property
    def has_dialogues(self) -> bool:
        """Whether some of its records have several turns that see each other."""
        if self.independent:
            return False
        if self.splice:
            return self.splice.settings.rounds > 1
        return has_dialogues(self.records)

    def record(self, epoch: int, number: int) -> Record:
        """Return a record of an epoch."""
        if self.splice:
            return self.splice.draw(epoch, number)
        return self.records[number % len(self.records)]


@dataclass(frozen=True)
class Dataset:
    """The records of a run, joined to their banks."""

    banks: Banks
    files: tuple[RecordFile, ...]
    """Spliced ones come last."""
    held_out: list[Record]
    dropped: Counter[str]
    """Reason -> records left out, counted as often as the mixture repeats them."""
    slow_stride: int
    fast_stride: int
    notes: tuple[str, ...] = ()
    """Notes on how the records were found and read, a line each."""
    drops: tuple[Drop, ...] = ()
    """Each record that was left out, held-out ones too."""
    seed: int = 0
    augment: AugmentSettings = AugmentSettings()
    warnings: tuple[str, ...] = ()
    """Properties of the records that hinder learning, a line each."""

    @cached_property
    def records(self) -> list[Record]:
        """All records of the mixture, with its repeats; drawn ones as in epoch 0."""
        return self._epoch(0)

    @property
    def count(self) -> int:
        """Records of an epoch."""
        return sum(file.count for file in self.files)

    @property
    def splices(self) -> list[Splice]:
        return [file.splice for file in self.files if file.splice]

    @property
    def turns(self) -> str:
        """The kind of turns in the records to train on: one of `TURNS`, or mixed."""
        return turns_of(self.files)

    @cached_property
    def independent(self) -> bool:
        """Whether any record, held-out ones too, has independent turns."""
        files = [file for file in self.files if file.independent]
        records = chain(*(file.records for file in files), self.held_out)
        return any(file.splice for file in files) or any(r.independent for r in records)

    @property
    def is_drawn(self) -> bool:
        """Whether each epoch differs: records are spliced, or their frames drawn."""
        return self.augment.is_on or bool(self.splices)

    def epoch(self, number: int) -> list[Record]:
        """Return all records of an epoch."""
        return self._epoch(number) if number and self.splices else self.records

    def _epoch(self, number: int) -> list[Record]:
        return [file.record(number, k) for file in self.files for k in range(file.count)]

    def record(self, number: int) -> Record:
        """Return a record of a plan: `number` counts through the epochs, `count` records each."""
        epoch, place = divmod(number, self.count)
        for file in self.files:
            if place < file.count:
                return file.record(epoch, place)
            place -= file.count
        raise IndexError(number)

    def clips(self, record: Record) -> list[BankedClip | SplicedClip]:
        """Return the media of a record."""
        return [place.clip() for place in record.places]


def turns_of(files: Sequence[RecordFile]) -> str:
    """Return the kind of turns in datasets: one of `TURNS`, or mixed."""
    if not any(file.independent for file in files):
        return "dialogue"
    return "mixed" if any(file.has_dialogues for file in files) else "independent"


def independent_notes(files: Sequence[RecordFile]) -> tuple[str, ...]:
    """Return a line for each dataset of independent turns."""
    return tuple(
        f"{Path(file.path).name}: questions of a record do not see each other"
        for file in files
        if file.independent
    )


def sampled(file: RecordFile) -> Iterator[Record]:
    """Yield some records of a dataset, spread over the file: files are often sorted by kind."""
    size = file.count // file.repeats
    return (file.record(0, k) for k in range(0, size, size // SAMPLED + 1))


def drawn_line(dataset: Dataset) -> str:
    """Return which facts of an epoch's records are drawn for each epoch, as a part of a line."""
    spliced = sum(file.count for file in dataset.files if file.splice)
    words = [f"{spliced} records" if spliced else "", "frames" if dataset.augment.is_on else ""]
    shown = " and ".join(filter(None, words))
    return f" ({dataset.count} an epoch, {shown} drawn for each)" if shown else ""


def open_dataset(config: TrainConfig) -> Dataset:
    """Open a run's banks and records; UserError lists every problem."""
    problems: list[str] = []
    notes: list[str] = []
    folders = Folders(config.media_dir, tuple(config.strip_prefix))
    wanted = all_parts(
        config.data_path, config.data_config, config.data_mixture, folders, problems, notes
    )
    if config.splice_path:
        files = expanded(config.splice_path, problems)
        how = read_splice(config.splice)
        wanted.append(MixturePart(files, [], 1, folders=folders, name="splice_path", splice=how))
    held_out = all_parts(config.eval_path, "", "", folders, problems, notes, held_out=True)
    wanted, held_out = (local_parts(parts, problems) for parts in (wanted, held_out))
    if not config.bank and not any(part.banks for part in wanted):
        problems.append("bank: missing; give --bank BANK, made by `preprocess encode`")
    if problems:
        raise UserError.of(shorten(problems))
    pools = Pools.open(config.bank, [*wanted, *held_out])
    dataset = _join(config, wanted, held_out, pools, problems)
    return replace(dataset, notes=(*notes, *dataset.notes))


def open_records(
    folders: Sequence[str],
    paths: Sequence[str],
    slow_stride: int,
    fast_stride: int,
    settings: DataSettings = DEFAULTS,
    media: Folders = PLAIN,
    turns: str = "",
) -> Dataset:
    """Open banks and the records that a model is scored on, as held-out ones.

    settings: how records and bad records are treated. media: how names of media become ids. turns: those
    of all records, also where a mixture says others. Raises UserError that lists every problem, such as
    a clip that no bank has.
    """
    problems: list[str] = []
    pools = None
    parts = local_parts(all_parts(paths, "", "", media, problems, [], held_out=True), problems)
    try:
        pools = Pools.open(folders, parts)
    except UserError as error:
        problems += error.problems
    reading = Reading(settings, problems)
    records = [
        record
        for part in parts
        if not part.splice  # refused above: its rows are no records
        for record in reading.records(
            replace(part, turns=turns or part.turns),
            pools.of(part) if pools else None,
            held_out=True,
        )
    ]
    if not records and not problems:
        problems.append(f"no records are left of {', '.join(paths)}")
    reading.refuse()
    assert pools is not None
    notes, drops = reading.notes(""), reading.unique_drops
    banks = pools.banks
    return Dataset(banks, (), records, Counter(), slow_stride, fast_stride, notes, drops)


@dataclass(frozen=True)
class Pools:
    """The banks of a run, and the choice of those in which a dataset's clips are searched.

    These are the dataset's own banks where it names some, else the run's, else all.
    """

    banks: Banks
    numbers: dict[str, int]
    """Real path of a bank -> its number."""
    run: tuple[int, ...]
    """Numbers of the run's own banks."""
    made: dict[tuple[int, ...], Banks]

    @classmethod
    def open(cls, folders: Sequence[str], parts: Sequence[MixturePart]) -> "Pools":
        """Open all banks; UserError where one cannot be opened, or does not fit the others."""
        named: dict[str, str] = {}
        for folder in [*folders, *(bank for part in parts for bank in part.banks)]:
            named.setdefault(real(folder), folder)
        numbers = {path: k for k, path in enumerate(named)}
        own = [numbers[real(folder)] for folder in folders] or list(numbers.values())
        return cls(Banks.open(list(named.values()), apart=True), numbers, _distinct(own), {})

    def of(self, part: MixturePart) -> Banks:
        """Return the banks of a dataset; UserError where two of them hold a clip of one id."""
        chosen = _distinct([self.numbers[real(bank)] for bank in part.banks]) or self.run
        if chosen not in self.made:
            self.made[chosen] = self.banks.among(chosen)
        return self.made[chosen]


def _distinct(numbers: Sequence[int]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(numbers))


def real(place: str) -> str:
    """Return a bank's identity: the real path of a folder, a URL as it is."""
    return place if "://" in place else os.path.realpath(place)


def _join(
    config: TrainConfig,
    wanted: Sequence[MixturePart],
    evaluated: Sequence[MixturePart],
    pools: Pools,
    problems: list[str],
) -> Dataset:
    banks = pools.banks
    slow, fast = choose_strides(
        banks, config.mm_spatial_pool_stride, config.fast_stride, config.slow_frame_ratio, problems
    )
    reading = Reading(config, problems)
    files: list[RecordFile] = []
    dropped: Counter[str] = Counter()
    for part in wanted:
        if part.splice:
            files.append(_spliced(part, part.splice, reading, pools.of(part), config.seed))
            continue
        for path in part.records:
            kept = reading.records(replace(part, records=[path]), pools.of(part))
            for drop in reading.left_out:
                dropped[drop.reason] += part.repeats
            independent = reading.independent(part)
            files.append(
                RecordFile(path, reading.digest, kept, part.repeats, independent=independent)
            )
    # as `evaluate` asks after the run, so that the held-out loss is of the same prompts
    alike = turns_of(files) if files else config.turns
    alike = config.turns if alike == "mixed" else alike
    held_out = [
        record
        for part in evaluated
        for record in reading.records(
            replace(part, turns=part.turns or alike), pools.of(part), held_out=True
        )
    ]
    if not any(file.records or file.splice for file in files) and not problems:
        why = reason_counts(list(dropped.elements()))
        problems.append(
            f"no records are left to train on ({why or 'the files have none'}); see `missing` and the "
            "bank's quarantine"
        )
    reading.refuse()
    notes, drops = reading.notes(LIST), reading.unique_drops
    augment = read_augment(config.augment)
    if augment.ratio and slow == fast:
        raise UserError("augment: ratio needs two strides, and slow and fast are one")
    notes += (*independent_notes(files), *arithmetic_note(banks))
    if config.enable_lape:
        notes += numbers_note(chain.from_iterable(map(sampled, files)))
    files.sort(key=lambda file: file.splice is not None)
    own = tuple(files), held_out, dropped, slow, fast, notes, drops
    warnings = [w for f in files for w in repeats_note(Path(f.path).name, list(sampled(f)))]
    return Dataset(banks, *own, seed=config.seed, augment=augment, warnings=tuple(warnings))


def _spliced(
    part: MixturePart, how: SpliceSettings, reading: Reading, banks: Banks, seed: int
) -> RecordFile:
    """Return the splicing of records from a dataset's clips and phrases."""
    path = " + ".join(part.records)
    digest = blake2b(digest_size=16)
    for file in part.records:
        digest.update(file_digest(file, part.chosen).encode())
    sources = reading.sources(part, banks)
    splice, independent = None, reading.independent(part)
    if not reading.problems:
        try:
            splice = Splice.of(
                how,
                sources,
                Path(path).name,
                int(digest.hexdigest()[:12], 16),
                seed,
                independent=independent,
            )
        except UserError as error:
            reading.problems += error.problems
    return RecordFile(path, digest.hexdigest(), [], part.repeats, splice, independent)


def local_parts(parts: Sequence[MixturePart], problems: list[str]) -> list[MixturePart]:
    """Return datasets with local paths of their files, those of the Hub downloaded."""
    return [replace(part, records=local_copies(part.records, problems)) for part in parts]


def local_copies(names: Sequence[str], problems: list[str]) -> list[str]:
    """Return local paths of annotation files and folders, those of the Hub downloaded."""
    found = []
    for name in names:
        try:
            found.append(local_copy(name))
        except UserError as error:
            problems.append(str(error))
    return found


def choose_strides(
    banks: Banks, slow: int, fast: int, ratio: str, problems: list[str]
) -> tuple[int, int]:
    """Return the slow and the fast stride: those asked for, or the bank's own finest and coarsest."""
    banked, own, bank = banks.strides, banks.config.strides, banks.banks[0]
    for name, stride in (("mm_spatial_pool_stride", slow), ("fast_stride", fast)):
        if stride and stride not in banked:
            more = f"{','.join(map(str, sorted((*banked, stride))))} {bank.missing.get(stride, '')}"
            problems.append(
                f"{name} {stride}: {bank.where} holds the strides {', '.join(map(str, banked))}; ask "
                f"for one of them, or encode with --stride {more}".rstrip()
            )
    slow, fast = slow or own[0], fast or own[-1]
    if slow > fast:
        problems.append(f"the slow stride {slow} must be finer than the fast stride {fast}")
    if slow == fast and float(ratio) not in (0.0, 1.0):
        problems.append(
            f"slow_frame_ratio {ratio}: slow and fast are both stride {slow}, so it can only be 0 or 1"
        )
    return slow, fast
