"""The run's inputs: banks and records, opened, joined and checked before torch is imported."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path

from shards.annotations.files import ALL, Selection, annotation_files, local_copy
from shards.errors import UserError
from shards.read.banks import BankedClip, Banks
from shards.text import some
from train.data.drops import LIST, Drop, counted
from train.data.mixtures import MixturePart, read_mixture
from train.data.reading import Reading, shorten
from train.data.records import Record
from train.settings.config import DataSettings, TrainConfig


@dataclass(frozen=True)
class Part:
    """The records of one file or folder."""

    path: str
    digest: str
    """Of the bytes, and of which rows are taken."""
    records: list[Record]
    """Those that are kept."""
    repeats: int


@dataclass(frozen=True)
class Dataset:
    """Joined records, ready to be drawn from."""

    banks: Banks
    parts: tuple[Part, ...]
    held_out: list[Record]
    dropped: Counter[str]
    """Records left out, by reason, as often as the mixture repeats them."""
    slow_stride: int
    fast_stride: int
    drops: tuple[Drop, ...] = ()
    """Each record that was left out, of the held-out ones too."""
    clipped: int = 0
    """Records of which a span ended behind its clip, and ends with it."""
    passed_over: tuple[str, ...] = ()
    """Files of record folders that hold no records."""

    @cached_property
    def records(self) -> list[Record]:
        """All records of the mixture, repeated as it asks."""
        return [record for part in self.parts for record in part.records * part.repeats]

    def notes(self, listed: str = LIST) -> list[str]:
        """Return what was done to the records besides, a line each; listed: where drops are."""
        lines = []
        held_out = counted([drop.reason for drop in self.drops if drop.held_out])
        if held_out:
            lines.append(f"held-out records left out: {held_out}")
        if self.drops:
            lines.append(f"what is left out is listed in {listed}")
        if self.clipped:
            lines.append(f"{self.clipped} records have spans that now end with their clip")
        if self.passed_over:
            lines.append(f"without records, and not read: {some(self.passed_over)}")
        return lines

    def clips(self, record: Record) -> list[BankedClip]:
        return [self.banks.clip(id_) for id_ in record.clips]


def open_dataset(config: TrainConfig) -> Dataset:
    """Open a run's banks and records; UserError with every problem if there is any."""
    problems: list[str] = []
    folders = list(config.bank)
    wanted: list[MixturePart] = []
    for path in config.data_path:
        if Path(path).suffix.lower() in (".yaml", ".yml"):
            wanted += read_mixture(path, "", problems)
        else:
            wanted.append(MixturePart([path], [], 1))
    if config.data_config:
        wanted += read_mixture(config.data_config, config.data_mixture, problems)
    files: list[tuple[str, int, Selection]] = []
    for part in wanted:
        here = local_copies(part.records, problems)
        files += [(path, part.repeats, part.chosen) for path in here]
        folders += [bank for bank in part.banks if bank not in folders]
    if not folders:
        problems.append("bank: missing; give --bank BANK, made by `preprocess encode`")
    if problems:
        raise UserError.of(shorten(problems))
    return _join(config, files, Banks.open(folders), problems)


def open_records(
    folders: Sequence[str],
    paths: Sequence[str],
    slow_stride: int,
    fast_stride: int,
    settings: DataSettings,
) -> Dataset:
    """Open banks and the records that a model is scored on, as held-out ones.

    settings: how records are read, and what becomes of bad ones. UserError with every problem: a clip
    that no bank has is one, and a coordinate outside its clip.
    """
    problems: list[str] = []
    banks = None
    try:
        banks = Banks.open(folders)
    except UserError as error:
        problems += error.problems
    reading = Reading(settings, banks, problems)
    records = [
        record
        for path in local_copies(paths, problems)
        for record in reading.records(path, held_out=True)
    ]
    if not records and not problems:
        problems.append(f"no records are left of {', '.join(paths)}")
    reading.refuse()
    assert banks is not None
    return Dataset(banks, (), records, Counter(), slow_stride, fast_stride, **reading.facts)


def _join(
    config: TrainConfig,
    files: Sequence[tuple[str, int, Selection]],
    banks: Banks,
    problems: list[str],
) -> Dataset:
    slow, fast = choose_strides(
        banks, config.mm_spatial_pool_stride, config.fast_stride, config.slow_frame_ratio, problems
    )
    reading = Reading(config, banks, problems)
    parts: list[Part] = []
    dropped: Counter[str] = Counter()
    for path, repeats, chosen in files:
        kept = reading.records(path, chosen)
        for drop in reading.left_out:
            dropped[drop.reason] += repeats
        parts.append(Part(path, file_digest(path, chosen), kept, repeats))
    held_out = []
    for path in local_copies(config.eval_path, problems):
        held_out += reading.records(path, held_out=True)
    if not any(part.records for part in parts) and not problems:
        problems.append("no records are left to train on; see `missing` and the bank's quarantine")
    reading.refuse()
    return Dataset(banks, tuple(parts), held_out, dropped, slow, fast, **reading.facts)


def local_copies(names: Sequence[str], problems: list[str]) -> list[str]:
    """Return where annotation files and folders lie, those of the Hub after download."""
    found = []
    for name in names:
        try:
            found.append(local_copy(name))
        except UserError as error:
            problems.append(str(error))
    return found


def file_digest(path: str, chosen: Selection = ALL) -> str:
    """Return a digest of the bytes of a file or of a folder's annotations, and of the rows chosen.

    Of what cannot be read, which is a problem by then, it is that of nothing.
    """
    digest = blake2b(digest_size=16)
    try:
        for file in annotation_files(Path(path)):
            digest.update(file.read_bytes())
    except (OSError, UserError):
        pass
    if chosen != ALL:
        digest.update(repr(chosen).encode())
    return digest.hexdigest()


def choose_strides(
    banks: Banks, slow: int, fast: int, ratio: str, problems: list[str]
) -> tuple[int, int]:
    """Return the slow and the fast stride: as asked, or the bank's finest and coarsest."""
    banked = banks.config.strides
    for name, stride in (("mm_spatial_pool_stride", slow), ("fast_stride", fast)):
        if stride and stride not in banked:
            problems.append(
                f"{name} {stride}: {banks.banks[0].where} holds the strides "
                f"{', '.join(map(str, banked))}; ask for one of them, or encode with --stride "
                f"{','.join(map(str, sorted({*banked, stride})))}"
            )
    slow, fast = slow or banked[0], fast or banked[-1]
    if slow > fast:
        problems.append(f"the slow stride {slow} must be finer than the fast stride {fast}")
    if slow == fast and float(ratio) not in (0.0, 1.0):
        problems.append(
            f"slow_frame_ratio {ratio}: slow and fast are both stride {slow}, so it can only be 0 or 1"
        )
    return slow, fast
