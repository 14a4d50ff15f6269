"""How long each record is: tokens of text, supervised ones, and frames - no weights, no torch.

Text is tokenised once for each (record file, tokenizer, clip durations, settings) and the counts are
kept under `$XDG_CACHE_HOME/framebank`; frames are counted from the banks' catalogues each time.
"""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path

import numpy as np

from model.config import ModelSettings
from model.lape.tokens import LAPE_AXES, LapeTokens
from model.slow_fast import exact_ratio, uniform_indices
from shards.errors import UserError
from shards.read.banks import Banks, Place
from shards.signed import canonical_json
from train.batches.chat import VERSION, Chat, Piece
from train.data.dataset import Dataset, Part
from train.data.records import Record
from train.start.templates import load_with_template

UNWRITABLE = -1
"""Tokens of a record that cannot be encoded."""
REFUSED = "refused by the chat template"
"""Why such a record is left out."""
CHUNK = 4096
"""Records tokenised together."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
VOCABULARIES = {"tokenizer.json", "vocab.json", "tokenizer.model"}
"""Those of them that hold the tokens."""


@dataclass(frozen=True)
class Clips:
    """The clips of records, one entry per use of a clip, in the order of the records."""

    record: np.ndarray
    """int64, which record uses it."""
    frames: np.ndarray
    """int64, banked frames."""
    slow_cells: np.ndarray
    fast_cells: np.ndarray
    """int64, cells of a frame on either grid."""
    duration: np.ndarray
    """float64 seconds."""
    digest: str
    """Of the ids, times and features of all of them, in order."""

    @classmethod
    def of(
        cls, records: Sequence[Record], banks: Banks, slow_stride: int, fast_stride: int
    ) -> "Clips":
        """Read from the catalogues what the records' clips are; every clip is banked."""
        record = [k for k, own in enumerate(records) for _ in own.clips]
        ids = [id_ for own in records for id_ in own.clips]
        values = np.zeros((4, len(ids)))
        found = np.zeros(len(ids), bool)
        digest = blake2b("\n".join(ids).encode(), digest_size=16)
        places = [place for own in records for place in own.places]
        for bank in banks.banks:
            here = np.asarray([place.bank is bank for place in places], bool)
            rows = np.asarray([place.row for place in places if place.bank is bank], np.int64)
            columns = bank.columns
            for name in (
                "start",
                "end",
                *(f"stride{s}_crc32c" for s in (slow_stride, fast_stride)),
            ):
                digest.update(columns[name][rows].tobytes())
            for grid, stride in ((1, slow_stride), (2, fast_stride)):
                shape = columns[f"stride{stride}_shape"].reshape(-1, 4).astype(np.int64)[rows]
                values[0, here] = shape[:, 0]
                values[grid, here] = shape[:, 1] * shape[:, 2]
            values[3, here] = (columns["end"] - columns["start"])[rows]
            found |= here
        assert found.all()
        frames, slow, fast = values[:3].astype(np.int64)
        return cls(np.asarray(record, np.int64), frames, slow, fast, values[3], digest.hexdigest())


@dataclass(frozen=True)
class Stamps:
    """The tokens of the time written before each frame."""

    tokens: np.ndarray
    """int64, of every banked frame of every use of a clip, one use after the other."""
    first: np.ndarray
    """int64 `(uses,)`, where a use's frames begin."""

    @classmethod
    def of(cls, records: Sequence[Record], chat: Chat) -> "Stamps":
        """Count what is written before the frames of the records' clips."""
        seconds: dict[Place, np.ndarray] = {}
        for place in {place: None for record in records for place in record.places}:
            info = place.clip().info
            seconds[place] = info.timestamps - info.start
        counts = {
            place: np.asarray([len(chat.stamp(t)) for t in times.tolist()], np.int64)
            for place, times in seconds.items()
        }
        uses = [counts[place] for record in records for place in record.places]
        first = np.cumsum([0, *map(len, uses)])[:-1]
        return cls(np.concatenate([*uses, np.zeros(0, np.int64)]), first)

    def taken(self, banked: np.ndarray, taken: np.ndarray) -> np.ndarray:
        """Return the stamps' tokens of each use, of so many frames taken of those banked."""
        out = np.zeros_like(taken)
        for most, count in set(zip(banked.tolist(), taken.tolist(), strict=True)):
            these = np.flatnonzero((banked == most) & (taken == count))
            places = self.first[these, None] + np.asarray(uniform_indices(most, count), np.int64)
            out[these] = self.tokens[places].sum(axis=1)
        return out


@dataclass(frozen=True)
class Lengths:
    """What each record costs, as a function of the frames taken of its clips."""

    text: np.ndarray
    """int64 `(records,)`: tokens that are no frame's."""
    supervised: np.ndarray
    clips: Clips
    slow_ratio: Fraction
    written: Stamps | None = None
    """Where times are written before the frames."""

    def total(self, frames: np.ndarray) -> np.ndarray:
        """Return all tokens of each record; frames: int64 `(records,)`, the most of a clip."""
        return self.text + self.visual(frames) + self.stamps(frames)

    def stamps(self, frames: np.ndarray) -> np.ndarray:
        """Return the tokens of the times written before the frames of each record."""
        if self.written is None:
            return np.zeros_like(self.text)
        taken = np.minimum(self.clips.frames, frames[self.clips.record])
        return self.per_record(self.written.taken(self.clips.frames, taken))

    def taken(self, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (slow, fast) frames of each clip use; frames: int64 `(records,)`, the most of a clip.

        ceil(ratio * n) of n frames are slow, whatever the strategy.
        """
        taken = np.minimum(self.clips.frames, frames[self.clips.record])
        slow = -(-taken * self.slow_ratio.numerator // self.slow_ratio.denominator)
        return slow, taken - slow

    def visual(self, frames: np.ndarray) -> np.ndarray:
        """Return the tokens of all frames of each record, closing tokens included."""
        slow, fast = self.taken(frames)
        return self.per_record(
            slow * (self.clips.slow_cells + 1) + fast * (self.clips.fast_cells + 1)
        )

    def transitions(self, frames: np.ndarray) -> np.ndarray:
        """Return the steps from frame to frame within a clip, of each record."""
        slow, fast = self.taken(frames)
        return self.per_record(slow + fast - 1)

    def frame_pairs(self, frames: np.ndarray) -> np.ndarray:
        """Return the (query, key) pairs that frames see beyond causal ones, seeing themselves wholly."""
        slow, fast = self.taken(frames)
        sizes = self.clips.slow_cells + 1, self.clips.fast_cells + 1
        own = [size * (size - 1) // 2 for size in sizes]
        return self.per_record(slow * own[0] + fast * own[1])

    def per_record(self, values: np.ndarray) -> np.ndarray:
        """Return the sums over each record's clips."""
        sums = np.bincount(self.clips.record, weights=values, minlength=len(self.text))
        return sums.astype(np.int64)


def measure(
    settings: ModelSettings, dataset: Dataset, llm: str, tokenizer: str, *, lenient: bool = False
) -> Lengths:
    """Return the lengths of a dataset's records.

    llm: name or folder of the model whose tokenizer is used; tokenizer: its digest. lenient: a record
    that its chat template refuses has UNWRITABLE tokens of text, and is no UserError.
    """
    spatial = settings.num_spatial_tokens
    anchors = (
        LapeTokens((settings.num_temporal_tokens, spatial, spatial), LAPE_AXES[settings.lape_axes])
        if settings.enable_lape
        else None
    )
    chat = lru_cache(
        lambda: Chat(
            load_with_template(llm, settings.chat_template), anchors, settings.template_date
        )
    )
    template = f"{tokenizer} {settings.chat_template} {settings.template_date}"
    clips = Clips.of(dataset.records, dataset.banks, dataset.slow_stride, dataset.fast_stride)
    text, supervised = [], []
    first = 0
    for part in dataset.parts:
        uses = sum(len(record.clips) for record in part.records)
        durations = clips.duration[first : first + uses]
        first += uses * part.repeats
        own = text_lengths(part, durations, template, anchors, chat, lenient=lenient)
        text.append(np.tile(own[:, 0], part.repeats))
        supervised.append(np.tile(own[:, 1], part.repeats))
    ratio = exact_ratio(settings.slow_frame_ratio)
    written = Stamps.of(dataset.records, chat()) if settings.frame_time == "text" else None
    return Lengths(np.concatenate(text), np.concatenate(supervised), clips, ratio, written)


def text_lengths(
    part: Part,
    durations: np.ndarray,
    tokenizer: str,
    anchors: LapeTokens | None,
    make_chat: Callable[[], Chat],
    *,
    lenient: bool = False,
) -> np.ndarray:
    """Return (tokens of text, supervised tokens) of a file's records, from the cache where it knows.

    durations: float64, of the records' clips, one after the other. Returns int64 `(records, 2)`;
    raises UserError naming the records that cannot be encoded, which are UNWRITABLE if lenient.
    """
    facts = {"version": VERSION, "tokenizer": tokenizer, "source": part.digest}
    facts["anchors"] = [*anchors.counts, *anchors.axes] if anchors else None
    # of the same file, other records are kept when other clips are banked
    path = str(Path(part.path))
    facts["records"] = [record.where.removeprefix(path) for record in part.records]
    facts["texts"] = texts_digest(part.records)
    key = blake2b(canonical_json(facts) + durations.tobytes(), digest_size=16)
    file = cache_folder() / f"lengths-{key.hexdigest()}.bin"
    counts = read_counts(file, len(part.records))
    if counts is None or not (lenient or (counts >= 0).all()):
        counts = count_tokens(make_chat(), part.records, durations.tolist(), lenient=lenient)
        write_counts(file, counts)
    return counts


def texts_digest(records: Sequence[Record]) -> str:
    """Return a digest of what records say: how they are read may change, and clips clip their times."""
    digest = blake2b(digest_size=16)
    for record in records:
        digest.update(
            "\0".join(part for turn in record.turns for part in (turn.role, turn.text)).encode()
        )
        digest.update(b"\1")
    return digest.hexdigest()


def count_tokens(
    chat: Chat, records: Sequence[Record], durations: Sequence[float], *, lenient: bool = False
) -> np.ndarray:
    """Return int64 `(records, 2)`: tokens of text and supervised ones, exactly as `encode` makes them.

    lenient: both are UNWRITABLE of a record that cannot be encoded; else it is a UserError.
    """
    problems: list[str] = []
    counts: list[tuple[int, int]] = []
    place = 0
    talks: list[list[Piece] | None]
    for first in range(0, len(records), CHUNK):
        talks = []
        for record in records[first : first + CHUNK]:
            own = durations[place : place + len(record.clips)]
            place += len(record.clips)
            try:
                talks.append(chat.pieces(record.turns, own))
            except UserError as error:
                problems.append(f"{record.where} (id {record.id}): {error}")
                talks.append(None)
        made = iter(chat.count([talk for talk in talks if talk is not None]))
        unwritable = (UNWRITABLE, UNWRITABLE)
        counts += [unwritable if talk is None else next(made) for talk in talks]
    if problems and not lenient:
        more = f"; and {len(problems) - 3} more like these" if len(problems) > 3 else ""
        raise UserError(
            "; ".join(problems[:3]) + more,
            fix="mend them, or set on_bad_record: drop, which leaves such records out",
        )
    return np.asarray(counts, np.int64).reshape(-1, 2)


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "framebank"


def read_counts(file: Path, num_records: int) -> np.ndarray | None:
    """Return cached counts, or None where they are not there or not whole."""
    try:
        data = file.read_bytes()
    except OSError:
        return None
    body, seal = data[:-16], data[-16:]
    if len(body) != num_records * 16 or blake2b(body, digest_size=16).digest() != seal:
        return None
    return np.frombuffer(body, np.int64).reshape(-1, 2)


def write_counts(file: Path, counts: np.ndarray) -> None:
    """Write counts so that they exist whole or not at all; without a writable cache, say so and go on."""
    body = np.ascontiguousarray(counts, np.int64).tobytes()
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(body + blake2b(body, digest_size=16).digest())
        os.replace(temporary, file)
    except OSError as error:
        print(f"lengths are not cached: {file}: {error.strerror}", file=sys.stderr)  # noqa: T201


def tokenizer_digest(name: str) -> str:
    """Return a digest of a tokenizer's files: those of a folder, or a Hub model's in its cache."""
    if not Path(name).is_dir() and not tokenizer_files(name):
        load_with_template(name, "")  # which brings them here
    files = tokenizer_files(name)
    digest = blake2b(digest_size=16)
    for path in files:
        digest.update(path.name.encode() + path.read_bytes())
    if not {path.name for path in files} & VOCABULARIES:
        # in files of other names, or nowhere, which is refused: what it knows is what tells it apart
        digest.update(canonical_json(load_with_template(name, "").get_vocab()))
    return digest.hexdigest()


def tokenizer_files(name: str) -> list[Path]:
    if Path(name).is_dir():
        paths = [Path(name) / file for file in TOKENIZER_FILES]
    else:
        from huggingface_hub import try_to_load_from_cache

        paths = [Path(str(try_to_load_from_cache(name, file))) for file in TOKENIZER_FILES]
    return [path for path in paths if path.is_file()]
