"""How long each record is: tokens of text, supervised ones, and frames - no weights, no torch.

Text is tokenised once for each (record file, tokenizer, clip durations, settings) and the counts are
kept under `$XDG_CACHE_HOME/framebank`; frames are counted from the banks' catalogues each time.
"""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np

from model.lape.tokens import LapeTokens
from shards.errors import UserError
from shards.signed import canonical_json
from train.batches.augment import Looks
from train.batches.chat import VERSION, Chat
from train.batches.clips import Clips, Stamps
from train.batches.turns import Count, Talk, count_talks
from train.cost import attended_pairs
from train.data.dataset import Part
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


class Apart(NamedTuple):
    """The turns that do not see each other: int64 `(records,)`."""

    shared: np.ndarray
    """Tokens that all turns see and that are no frame's; of a dialogue all of its text."""
    longest: np.ndarray
    """Tokens of the longest turn; 0 of a dialogue."""
    pairs: np.ndarray
    """(query, key) pairs inside turns; 0 of a dialogue."""


class Taken(NamedTuple):
    """What is taken of each use of a clip: int64 `(uses,)`."""

    slow: np.ndarray
    fast: np.ndarray
    """Frames."""
    stamps: np.ndarray
    """Tokens of the times before them."""


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
    looks: Looks | None = None
    """How frames are seen, where that is not even and by one pattern, or media are spliced."""
    apart: Apart | None = None
    """Where turns of some records do not see each other."""
    closing: int = 1
    """Tokens behind the cells of each frame."""
    _known: dict[bytes, "Taken"] = field(
        init=False, default_factory=dict, compare=False, repr=False
    )

    def total(self, frames: np.ndarray) -> np.ndarray:
        """Return all tokens of each record; frames: int64 `(records,)`, the most of a medium."""
        return self.text + self.visual(frames) + self.stamps(frames)

    def conversation(self, frames: np.ndarray) -> np.ndarray:
        """Return the tokens of the longest conversation in each record: of one turn and what it sees."""
        total = self.total(frames)
        if self.apart is None:
            return total
        return total - self.text + self.apart.shared + self.apart.longest

    def causal_pairs(self, frames: np.ndarray) -> np.ndarray:
        """Return the (query, key) pairs of each record, but for what frames see beyond causal ones."""
        total = self.total(frames)
        if self.apart is None:
            return attended_pairs(total)
        own = self.text - self.apart.shared
        shared = total - own
        return attended_pairs(shared) + shared * own + self.apart.pairs

    def stamps(self, frames: np.ndarray) -> np.ndarray:
        """Return the tokens of the times written before the frames of each record."""
        return self.per_record(self._taken(frames).stamps)

    def taken(self, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (slow, fast) frames of each clip use; frames: int64 `(records,)`, the most of a medium.

        ceil(ratio * n) of n frames are slow, whatever the strategy.
        """
        taken = self._taken(frames)
        return taken.slow, taken.fast

    def visual(self, frames: np.ndarray) -> np.ndarray:
        """Return the tokens of all frames of each record, closing tokens included."""
        slow, fast = self.taken(frames)
        return self.per_record(
            slow * (self.clips.slow_cells + self.closing)
            + fast * (self.clips.fast_cells + self.closing)
        )

    def seen_uses(self, frames: np.ndarray) -> np.ndarray:
        """Return how many uses of clips each record has frames of; no step leads from one to another."""
        slow, fast = self.taken(frames)
        return self.per_record(slow + fast > 0)

    def transitions(self, frames: np.ndarray) -> np.ndarray:
        """Return the steps from frame to frame within a clip, of each record."""
        slow, fast = self.taken(frames)
        return self.per_record(np.maximum(slow + fast - 1, 0))

    def frame_pairs(self, frames: np.ndarray) -> np.ndarray:
        """Return the (query, key) pairs that frames see beyond causal ones, seeing themselves wholly."""
        slow, fast = self.taken(frames)
        sizes = self.clips.slow_cells + self.closing, self.clips.fast_cells + self.closing
        own = [size * (size - 1) // 2 for size in sizes]
        return self.per_record(slow * own[0] + fast * own[1])

    def _taken(self, frames: np.ndarray) -> "Taken":
        """Return what is taken of each use; the last answers are kept, as each is asked for often."""
        key = blake2b(np.ascontiguousarray(frames).tobytes(), digest_size=16).digest()
        if key not in self._known:
            if len(self._known) > 3:
                del self._known[next(iter(self._known))]
            most = frames[self.clips.record[self.clips.first]]
            self._known[key] = self._evenly(most) if self.looks is None else self._drawn(most)
        return self._known[key]

    def _evenly(self, most: np.ndarray) -> "Taken":
        """Return what is taken of media of one use each; most: int64 `(media,)`."""
        assert self.clips.uses is None
        taken = np.minimum(self.clips.frames, most)
        slow = -(-taken * self.slow_ratio.numerator // self.slow_ratio.denominator)
        stamps = self.written.taken(self.clips.frames, taken) if self.written else 0 * taken
        return Taken(slow, taken - slow, stamps)

    def _drawn(self, most: np.ndarray) -> "Taken":
        """Return what is taken of each use, frame by frame."""
        clips = self.clips
        assert self.looks is not None
        record = clips.record[clips.first]
        seen = self.looks.choose(record, clips.place, clips.banked, most)
        frame = clips.line[clips.first][seen.medium] + seen.frame
        use = np.searchsorted(clips.line, frame, side="right") - 1
        stamps = self.written.tokens[frame] if self.written else np.zeros(len(frame))
        slow, fast, written = (
            np.bincount(use, weights=weights, minlength=len(clips.frames)).astype(np.int64)
            for weights in (seen.slow, ~seen.slow, stamps)
        )
        return Taken(slow, fast, written)

    def per_record(self, values: np.ndarray) -> np.ndarray:
        """Return the sums over each record's clips."""
        sums = np.bincount(self.clips.record, weights=values, minlength=len(self.text))
        return sums.astype(np.int64)


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

    durations: float64, of the records' clips, one after the other. Returns int64 `(records, 2)`, or as
    many columns as a `Count` has where turns do not see each other; raises UserError naming the records
    that cannot be encoded, which are UNWRITABLE if lenient.
    """
    facts = {"version": VERSION, "tokenizer": tokenizer, "source": part.digest}
    facts["anchors"] = [*anchors.counts, *anchors.axes] if anchors else None
    # of the same file, other records are kept when other clips are banked
    path = str(Path(part.path))
    facts["records"] = [record.where.removeprefix(path) for record in part.records]
    facts["texts"] = texts_digest(part.records)
    width = 2
    if part.independent:
        facts["turns"], width = "independent", len(Count._fields)
    key = blake2b(canonical_json(facts) + durations.tobytes(), digest_size=16)

    def count() -> np.ndarray:
        told = make_chat(), part.records, durations.tolist()
        return counted(*told, lenient=lenient)[:, :width]

    shape = len(part.records), width
    return kept_counts(key.hexdigest(), shape, count, lenient=lenient)


def kept_counts(
    key: str, shape: tuple[int, int], count: Callable[[], np.ndarray], *, lenient: bool = False
) -> np.ndarray:
    """Return what the cache knows of some records, or count them, and keep that."""
    file = cache_folder() / f"lengths-{key}.bin"
    counts = read_counts(file, shape)
    if counts is None or not (lenient or (counts >= 0).all()):
        counts = count()
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
    return counted(chat, records, durations, lenient=lenient)[:, :2]


def counted(
    chat: Chat, records: Sequence[Record], durations: Sequence[float], *, lenient: bool = False
) -> np.ndarray:
    """Return a `Count` of each record, int64 `(records, 5)`; lenient as of `count_tokens`."""
    problems: list[str] = []
    counts: list[Count] = []
    place = 0
    for first in range(0, len(records), CHUNK):
        talks: list[Talk | None] = []
        for record in records[first : first + CHUNK]:
            own = durations[place : place + record.media]
            place += record.media
            try:
                talks.append(Talk.of(chat, record, own))
            except UserError as error:
                problems.append(f"{record.where} (id {record.id}): {error}")
                talks.append(None)
        made = iter(count_talks(chat, [talk for talk in talks if talk is not None]))
        unwritable = Count(*[UNWRITABLE] * len(Count._fields))
        counts += [unwritable if talk is None else next(made) for talk in talks]
    if problems and not lenient:
        more = f"; and {len(problems) - 3} more like these" if len(problems) > 3 else ""
        raise UserError(
            "; ".join(problems[:3]) + more,
            fix="mend them, or set on_bad_record: drop, which leaves such records out",
        )
    return np.asarray(counts, np.int64).reshape(-1, len(Count._fields))


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "framebank"


def read_counts(file: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """Return cached counts, or None where they are not there or not whole."""
    try:
        data = file.read_bytes()
    except OSError:
        return None
    body, seal = data[:-16], data[-16:]
    if len(body) != shape[0] * shape[1] * 8 or blake2b(body, digest_size=16).digest() != seal:
        return None
    return np.frombuffer(body, np.int64).reshape(shape)


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
