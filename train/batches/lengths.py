"""The length of each record: tokens of text, supervised ones, and frames; without weights or torch.

Text is tokenised once for each (record file, tokenizer, clip durations, settings, code) and the counts
are cached under `$XDG_CACHE_HOME/framebank`, beside what reading the file found (`train/data/known`): a
plan of 100,000 records takes ten times as long the first time. Frames are counted from the banks'
catalogues.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np

from model.lape.tokens import LapeTokens
from shards.errors import UserError
from shards.forked import cores, in_processes
from shards.progress import progress
from shards.signed import Json, canonical_json
from train.batches.augment import Looks
from train.batches.chat import Chat
from train.batches.clips import Clips, Stamps
from train.batches.turns import Count, Tally
from train.data.dataset import RecordFile
from train.data.known.facts import media_of, texts_digest
from train.data.known.sealed import cache_root, code_digest, read_sealed, versions, write_sealed
from train.data.records import Record
from train.flops import attended_pairs
from train.start.templates import load_with_template

UNWRITABLE = -1
"""Number of tokens that marks a record which cannot be encoded."""
REFUSED = "refused by the chat template"
"""The reason for which such a record is left out."""
CHUNK = 4096
"""Records that are tokenised together."""
KEPT = 2**18
"""Stretches of conversations whose counts are kept, at most."""
CODE = ("model", "shards", "train/batches", "train/data", "train/start")
"""The folders of our code that makes tokens of text."""
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
"""Those of them that hold the vocabulary."""


class Apart(NamedTuple):
    """Counts of records with independent turns: int64 `(records,)` each."""

    shared: np.ndarray
    """Tokens of text that all turns see; of a dialogue, all of its text."""
    longest: np.ndarray
    """Tokens of the longest turn; 0 for a dialogue."""
    pairs: np.ndarray
    """(query, key) pairs inside turns; 0 for a dialogue."""


class Taken(NamedTuple):
    """Frames and times that are used of each use of a clip: int64 `(uses,)` each."""

    slow: np.ndarray
    fast: np.ndarray
    """Number of frames of either stream."""
    stamps: np.ndarray
    """Tokens of the times before them."""


@dataclass(frozen=True)
class Lengths:
    """Tokens, transitions and attention pairs of each record, as functions of the frames used."""

    text: np.ndarray
    """int64 `(records,)`: tokens that are not a frame's."""
    supervised: np.ndarray
    """int64 `(records,)`: those that the loss counts."""
    clips: Clips
    slow_ratio: Fraction
    written: Stamps | None = None
    """Tokens of the times before frames, where times are written."""
    looks: Looks | None = None
    """The choice of frames, where it is drawn or media are spliced; None: evenly spaced, one pattern."""
    apart: Apart | None = None
    """Counts of independent turns, where some records have them."""
    closing: int = 1
    """Tokens after the cells of each frame."""
    _known: dict[bytes, "Taken"] = field(
        init=False, default_factory=dict, compare=False, repr=False
    )

    def total(self, frames: np.ndarray) -> np.ndarray:
        """Return all tokens of each record; frames: int64 `(records,)`, the most of a medium."""
        return self.text + self.visual(frames) + self.stamps(frames)

    def conversation(self, frames: np.ndarray) -> np.ndarray:
        """Return the tokens of each record's longest conversation: of a turn and all that it sees."""
        total = self.total(frames)
        if self.apart is None:
            return total
        return total - self.text + self.apart.shared + self.apart.longest

    def causal_pairs(self, frames: np.ndarray) -> np.ndarray:
        """Return the (query, key) pairs of each record without those that `block` attention adds."""
        total = self.total(frames)
        if self.apart is None:
            return attended_pairs(total)
        own = self.text - self.apart.shared
        # every turn sees all shared tokens, and of the others its own alone
        shared = total - own
        return attended_pairs(shared) + shared * own + self.apart.pairs

    def stamps(self, frames: np.ndarray) -> np.ndarray:
        """Return the tokens of the times written before the frames of each record."""
        return self.per_record(self._taken(frames).stamps)

    def taken(self, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (slow, fast) frames of each use; frames: int64 `(records,)`, the most of a medium.

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
        """Return how many uses of clips each record has frames of; no transition crosses them."""
        slow, fast = self.taken(frames)
        return self.per_record(slow + fast > 0)

    def transitions(self, frames: np.ndarray) -> np.ndarray:
        """Return each record's transitions, from frame to next frame of the same use."""
        slow, fast = self.taken(frames)
        return self.per_record(np.maximum(slow + fast - 1, 0))

    def frame_pairs(self, frames: np.ndarray) -> np.ndarray:
        """Return the pairs that `block` attention adds: n (n - 1) / 2 for each frame of n tokens."""
        slow, fast = self.taken(frames)
        sizes = self.clips.slow_cells + self.closing, self.clips.fast_cells + self.closing
        own = [size * (size - 1) // 2 for size in sizes]
        return self.per_record(slow * own[0] + fast * own[1])

    def _taken(self, frames: np.ndarray) -> "Taken":
        """Return the frames used of each use of a clip; the last results are kept, plans repeat them."""
        key = blake2b(np.ascontiguousarray(frames).tobytes(), digest_size=16).digest()
        if key not in self._known:
            # a plan asks for tokens, transitions and pairs of the same frames; each answer is of all uses
            if len(self._known) > 3:
                del self._known[next(iter(self._known))]
            most = frames[self.clips.record[self.clips.first]]
            self._known[key] = self._evenly(most) if self.looks is None else self._drawn(most)
        return self._known[key]

    def _evenly(self, most: np.ndarray) -> "Taken":
        """Return them for media of one use each; most: int64 `(media,)`."""
        assert self.clips.uses is None
        taken = np.minimum(self.clips.frames, most)
        # ceil in integers, as `slow_frames` does: one frame off and the row would
        # not have the planned length
        slow = -(-taken * self.slow_ratio.numerator // self.slow_ratio.denominator)
        stamps = self.written.taken(self.clips.frames, taken) if self.written else 0 * taken
        return Taken(slow, taken - slow, stamps)

    def _drawn(self, most: np.ndarray) -> "Taken":
        """Return them for drawn frames or spliced media, counted frame by frame."""
        clips = self.clips
        assert self.looks is not None
        record = clips.record[clips.first]
        seen = self.looks.choose(record, clips.place, clips.banked, most)
        # a spliced medium's frames run through its parts: the frame's place in the
        # line tells which part it is
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
    file: RecordFile,
    durations: np.ndarray,
    tokenizer: str,
    anchors: LapeTokens | None,
    make_chat: Callable[[], Chat],
    *,
    lenient: bool = False,
) -> np.ndarray:
    """Return (tokens of text, supervised tokens) of a file's records, from the cache if it has them.

    durations: float64, of the records' clips, one after the other. Returns int64 `(records, 2)`, or the
    columns of a `Count` for independent turns. Raises UserError naming the records that cannot be
    encoded; if lenient, their counts are UNWRITABLE.
    """
    facts: Json = {"code": counting_code(), "tokenizer": tokenizer, "source": file.digest}
    facts["anchors"] = [*anchors.counts, *anchors.axes] if anchors else None
    # the records of a file that are used differ with the clips that are banked
    facts["texts"] = texts_digest(file.path, file.records)
    width = 2
    if file.independent:
        facts["turns"], width = "independent", len(Count._fields)
    # durations decide how times are written without anchors, and so how many tokens they are
    key = blake2b(canonical_json(facts) + durations.tobytes(), digest_size=16)

    def count() -> np.ndarray:
        records = make_chat(), file.records, durations.tolist()
        return counted(*records, lenient=lenient)[:, :width]

    shape = len(file.records), width
    return kept_counts(key.hexdigest(), shape, count, lenient=lenient)


def counting_code() -> list[str]:
    """Return digests and versions of the code that makes tokens of text."""
    return [code_digest(*CODE), *versions(("tokenizers", "transformers", "jinja2"))]


def kept_counts(
    key: str, shape: tuple[int, int], count: Callable[[], np.ndarray], *, lenient: bool = False
) -> np.ndarray:
    """Return cached counts of records, or count and cache them."""
    file = cache_folder() / f"lengths-{key}.bin"
    counts = read_counts(file, shape)
    # cached UNWRITABLE counts serve lenient callers only: others need the error of each record
    if counts is None or not (lenient or (counts >= 0).all()):
        counts = count()
        write_sealed(file, np.ascontiguousarray(counts, np.int64).tobytes(), "lengths")
    return counts


def count_tokens(
    chat: Chat, records: Sequence[Record], durations: Sequence[float], *, lenient: bool = False
) -> np.ndarray:
    """Return int64 `(records, 2)`: tokens of text and supervised ones, exactly as `encode` makes them.

    lenient: a record that cannot be encoded has UNWRITABLE for both; else it raises UserError.
    """
    return counted(chat, records, durations, lenient=lenient)[:, :2]


def counted(
    chat: Chat, records: Sequence[Record], durations: Sequence[float], *, lenient: bool = False
) -> np.ndarray:
    """Return a `Count` of each record, int64 `(records, 5)`; lenient as in `count_tokens`."""
    # the durations of a chunk's media begin where those of the one before end
    begins = np.cumsum([0, *(one.media for one in media_of(records))])
    tally = Tally(chat)

    def count(chunk: range) -> tuple[np.ndarray, list[str]]:
        """Return the counts of a chunk, and what is wrong with those that cannot be encoded."""
        if len(tally) > KEPT:
            tally.forget()
        talks, own_turns, wrong = list[list[list[int]]](), list[bool](), dict[int, str]()
        for k, record in enumerate(records[chunk.start : chunk.stop], chunk.start):
            try:
                talks.append(tally.stretches(record, durations[begins[k] : begins[k + 1]]))
                own_turns.append(record.independent)
            except UserError as error:
                wrong[k - chunk.start] = f"{record.where} (id {record.id}): {error}"
        # in chunks: one call of a fast tokenizer takes many texts, and memory stays bounded
        found = np.full((len(chunk), len(Count._fields)), UNWRITABLE, np.int64)
        found[[k not in wrong for k in range(len(chunk))]] = tally.count(talks, own_turns)
        return found, list(wrong.values())

    counts, problems = [np.zeros((0, len(Count._fields)), np.int64)], list[str]()
    starts = range(0, len(records), CHUNK)
    chunks = [range(first, min(first + CHUNK, len(records))) for first in starts]
    with progress("counting tokens", "records", len(records)) as bar:
        for found, wrong in in_processes(count, chunks, cores(sharers=1)):
            counts.append(found)
            problems += wrong
            bar.update(len(found))
    if problems and not lenient:
        more = f"; and {len(problems) - 3} more like these" if len(problems) > 3 else ""
        raise UserError(
            "; ".join(problems[:3]) + more,
            fix="correct them, or set on_bad_record: drop, which leaves such records out",
        )
    return np.concatenate(counts)


def cache_folder() -> Path:
    """Return the folder of cached counts."""
    return cache_root() / "framebank"


def read_counts(file: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """Return cached counts, or None where they are missing or damaged."""
    body = read_sealed(file)
    # a torn or altered cache is recounted: its numbers are denominators of the loss
    if body is None or len(body) != shape[0] * shape[1] * 8:
        return None
    return np.frombuffer(body, np.int64).reshape(shape)


def tokenizer_digest(name: str) -> str:
    """Return a digest of a tokenizer's files: those of a folder, or a Hub model's in its cache."""
    if not Path(name).is_dir() and not tokenizer_files(name):
        load_with_template(name, "")  # downloads them
    files = tokenizer_files(name)
    digest = blake2b(digest_size=16)
    for path in files:
        digest.update(path.name.encode() + path.read_bytes())
    if not {path.name for path in files} & VOCABULARIES:
        # its files have other names: its vocabulary identifies it
        digest.update(canonical_json(load_with_template(name, "").get_vocab()))
    return digest.hexdigest()


def tokenizer_files(name: str) -> list[Path]:
    """Return a tokenizer's files that exist, in its folder or in the Hub's cache."""
    if Path(name).is_dir():
        paths = [Path(name) / file for file in TOKENIZER_FILES]
    else:
        from huggingface_hub import try_to_load_from_cache

        paths = [Path(str(try_to_load_from_cache(name, file))) for file in TOKENIZER_FILES]
    return [path for path in paths if path.is_file()]
