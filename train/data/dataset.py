"""The run's inputs: banks and records, opened, joined and checked before torch is imported."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path

from shards.annotations.files import ALL, Selection, annotation_files, local_copy
from shards.errors import UserError
from shards.read.banks import BankedClip, Banks
from train.data.markup import MARKUP
from train.data.mixtures import MixturePart, read_mixture
from train.data.records import Record, check_coordinates, join, read_records
from train.settings.config import TrainConfig

SHOWN = 30
"""Problems that are printed; a file of the wrong form has one for each of its rows."""


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

    @cached_property
    def records(self) -> list[Record]:
        """All records of the mixture, repeated as it asks."""
        return [record for part in self.parts for record in part.records * part.repeats]

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
    dataset = _join(config, files, Banks.open(folders), problems)
    if problems:
        raise UserError.of(shorten(problems))
    return dataset


def open_records(
    folders: Sequence[str],
    paths: Sequence[str],
    slow_stride: int,
    fast_stride: int,
    *,
    allow_outside: bool = False,
) -> Dataset:
    """Open banks and the records that a model is scored on, as held-out ones.

    UserError with every problem: a clip that no bank has is one, and a coordinate outside its clip.
    """
    problems: list[str] = []
    banks = None
    try:
        banks = Banks.open(folders)
    except UserError as error:
        problems += error.problems
    records: list[Record] = []
    for path in local_copies(paths, problems):
        read = read_records(path, problems, allow_outside=allow_outside)
        records += join(read, banks, "error", problems) if banks else []
    if banks:
        _check_times_and_places(records, banks, problems)
    if banks is None or problems:
        raise UserError.of(shorten(problems))
    return Dataset(banks, (), records, Counter(), slow_stride, fast_stride)


def _join(
    config: TrainConfig,
    files: Sequence[tuple[str, int, Selection]],
    banks: Banks,
    problems: list[str],
) -> Dataset:
    slow, fast = choose_strides(
        banks, config.mm_spatial_pool_stride, config.fast_stride, config.slow_frame_ratio, problems
    )
    parts: list[Part] = []
    dropped: Counter[str] = Counter()
    for path, repeats, chosen in files:
        left_out: Counter[str] = Counter()
        without_answer = left_out if config.unsupervised == "drop" else None
        read = read_records(
            path, problems, without_answer, allow_outside=config.allow_outside, chosen=chosen
        )
        kept = join(read, banks, config.missing, problems, left_out)
        dropped.update({reason: count * repeats for reason, count in left_out.items()})
        parts.append(Part(path, file_digest(path, chosen), kept, repeats))
    held_out = []
    for path in local_copies(config.eval_path, problems):
        read = read_records(path, problems, allow_outside=config.allow_outside)
        held_out += join(read, banks, config.missing, problems)
    own = [record for part in parts for record in part.records]
    # a file that is taken in two parts is checked once
    once = {record.where: record for record in [*own, *held_out]}
    _check_times_and_places(once.values(), banks, problems)
    if not own and not problems:
        problems.append("no records are left to train on; see `missing` and the bank's quarantine")
    return Dataset(banks, tuple(parts), held_out, dropped, slow, fast)


def _check_times_and_places(records: Iterable[Record], banks: Banks, problems: list[str]) -> None:
    for record in records:
        if MARKUP.search("".join(turn.text for turn in record.turns)):
            seconds = [banks.clip(id_).info.duration for id_ in record.clips]
            check_coordinates(record, seconds, problems)


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


def shorten(problems: Sequence[str]) -> list[str]:
    """Return the first problems, and how many more there are."""
    if len(problems) <= SHOWN:
        return list(problems)
    return [*problems[:SHOWN], f"... and {len(problems) - SHOWN} more like these"]
