"""The sources of footage: videos, their phrases, and two parts of each without a common frame.

Training takes the first half of a source, tests its last 40 %; of a long one only the first and the last
minute. Times are in frames of `FPS`: frame k of a source is what it shows at k / FPS.
"""

import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from tqdm import tqdm

from model.tower.pixels import Pixels
from preprocess.decode.decode_child import DecodeChild
from preprocess.decode.request import ReadRequest
from preprocess.decode.scan import VideoError
from preprocess.decode.source import Outcome, SourceReader
from preprocess.sources.find import find_clips
from preprocess.sources.skips import report
from preprocess.world import Json
from shards.errors import UserError, first_line
from shards.format.features import Sampling
from shards.format.plan import ClipSource

SPLITS = ("train", "test")
FPS = 8  # times k / 8 are exact in milliseconds
TRAIN_ENDS, TEST_BEGINS = 50, 60  # percent of a source
MOST_SECONDS = 60  # of a part: a long source must not fill the disk
FEWEST = 4
"""Sources needed: three scenes and a small picture of another one."""
MOST_WORDS = 9
"""Words of a phrase: a longer answer would be scored as a caption."""


def seconds_of(first: int, count: int) -> tuple[float, float]:
    """Return when frames `first` up to, and without, `first + count` begin and end."""
    return first / FPS, (first + count) / FPS


@dataclass(frozen=True)
class Part:
    """Frames `first` up to, and without, `first + count` of a source."""

    first: int
    count: int

    @property
    def span(self) -> tuple[float, float]:
        """Seconds of the source."""
        return seconds_of(self.first, self.count)


@dataclass(frozen=True)
class Source:
    """A video that scenes are cut from."""

    file: ClipSource
    size: int
    digest: str
    """Of the file's size, first and last 64 KiB."""
    duration: float
    phrases: tuple[str, ...]
    """Phrases in training and tests; the first is the answer to what is shown."""
    kept: str | None
    """The phrase that only tests use."""

    @property
    def parts(self) -> dict[str, Part]:
        frames, most = int(self.duration * FPS), MOST_SECONDS * FPS
        train = min(frames * TRAIN_ENDS // 100, most)
        begins = max(-(-frames * TEST_BEGINS // 100), frames - most)
        return {"train": Part(0, train), "test": Part(begins, frames - begins)}

    def to_json(self) -> Json:
        return {
            "video": self.file.relative,
            "path": self.file.path,
            "size": self.size,
            "digest": self.digest,
            "duration": self.duration,
            "phrases": self.phrases,
            "kept": self.kept,
            **{split: part.span for split, part in self.parts.items()},
        }


def find_sources(inputs: Sequence[str], phrases: Path | None, longest: int) -> list[Source]:
    """Return the videos of files and folders; raises UserError with a line for each unsuitable one.

    phrases: a YAML of phrases per source, see `read_phrases`. longest: frames of the longest scene.
    """
    problems: list[str] = []
    known = read_phrases(phrases) if phrases else {}
    sources = []
    found = find_clips(inputs)
    for line in [*found.notes, *report(found.skips)]:
        tqdm.write(line, file=sys.stderr)
    with SourceReader(DecodeChild(), Path()) as reader:
        for file in tqdm(found.clips, desc="looking", unit="video", leave=False):
            if (file.start, file.end, file.offset) != (None, None, None):
                problems.append(f"{file.where}: footage can only be cut from whole video files")
                continue
            names = phrases_of(file, known, phrases, problems)
            outcome = reader.read(file, ReadRequest(Path(file.path), Sampling(num_frames=1)))
            if outcome.clip is None:
                problems.append(str(outcome.error))
            elif names:
                kept = names[-1] if len(names) > 1 else None
                known_phrases = names[:-1] or names
                size, digest = outcome.size, outcome.digest
                source = Source(file, size, digest, outcome.clip.end, tuple(known_phrases), kept)
                problems += too_short(source, longest)
                sources.append(source)
    problems += twins(sources)
    if not problems and len(sources) < FEWEST:
        expected = f"at least {FEWEST}"
        problems.append(str(UserError("too few videos", got=len(sources), expected=expected)))
    if problems:
        raise UserError.of(problems)
    return sources


# -- phrases


def read_phrases(path: Path) -> dict[str, tuple[str, ...]]:
    """Return the phrases of each source, by its name, its name without suffix, or its path.

        bikes.mp4: [cyclists in a city, people on bikes, a ride through the streets]
        garden:    [a robin at a feeder]

    The last of two or more is kept for the tests.
    """
    fix = "write `clip.mp4: [a phrase, another, one kept for the tests]`"
    try:
        data: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"no YAML ({first_line(error)})", where=path, fix=fix) from None
    if not isinstance(data, dict):
        raise UserError("no phrases", got=type(data).__name__, where=path, fix=fix)
    problems = []
    for name, value in data.items():
        values = [value] if isinstance(value, str) else value
        sound = isinstance(values, list) and values and all(isinstance(v, str) for v in values)
        if not isinstance(name, str) or not sound:
            problems.append(
                UserError("no list of phrases", got=repr(value), where=f"{path} {name}")
            )
            continue
        data[name] = tuple(values)
        faults = [bad_phrase(text, f"{path} {name}") for text in values]
        problems += [fault for fault in faults if fault]
    if problems:
        raise UserError.of(problems)
    return data


def phrases_of(
    file: ClipSource, known: Mapping[str, Any], path: Path | None, problems: list[str]
) -> tuple[str, ...]:
    """Return the phrases of a source: from the YAML file, or without one its file name."""
    name, stem = Path(file.relative).name, Path(file.relative).stem
    for key in (file.relative, name, stem):
        if key in known:
            return tuple(known[key])
    if path:
        problems.append(f"{path}: no phrases for {name}; add a line `{name}: [a phrase, another]`")
        return ()
    if fault := bad_phrase(stem, file.where):
        problems.append(f"{fault}, or say what it shows with --phrases")
        return ()
    return (stem,)


def bad_phrase(text: str, where: str) -> UserError | None:
    """Return the error of a phrase that cannot be used in questions; None if it can."""
    words = len(text.split())
    if text != text.strip() or "\n" in text or "<" in text:
        what = "a phrase is one line without `<`, and without blanks around it"
    elif not 1 <= words <= MOST_WORDS:
        what = f"a phrase has 1 to {MOST_WORDS} words"
    else:
        return None
    return UserError(what, got=repr(text), where=where, fix="write another")


# -- videos that cannot be used


def too_short(source: Source, longest: int) -> list[str]:
    """Return a line if a part of a source is shorter than the longest scene."""
    if min(part.count for part in source.parts.values()) >= longest:
        return []
    error = UserError(
        "too short",
        got=f"{source.duration:.2f} s",
        expected=f"at least {-(-longest * 100 // (100 - TEST_BEGINS)) / FPS:g} s, so that training "
        f"and tests have {longest / FPS:g} s each",
        where=source.file.where,
        fix="leave it out, or lower --seconds",
    )
    return [str(error)]


def twins(sources: Sequence[Source]) -> list[str]:
    """Return a line for each phrase and each video that occurs twice: a question needs one answer."""
    owners: dict[str, list[str]] = defaultdict(list)
    for source in sources:
        names = [*source.phrases, source.kept] if source.kept else source.phrases
        for key in [*(f"the phrase {str(name).casefold()!r}" for name in names), source.digest]:
            owners[key].append(source.file.where)
    return [
        f"{' and '.join(dict.fromkeys(places))}: "
        + (f"{key} means more than one thing" if key.startswith("the ") else "the same video twice")
        for key, places in owners.items()
        if len(places) > 1
    ]


# -- frames


def read_parts(source: Source, reader: SourceReader, side: int) -> dict[str, np.ndarray]:
    """Return the middle squares of both parts' frames, uint8 `(frames, side, side, 3)`, by split."""
    bicubic = int(Image.Resampling.BICUBIC)
    plain = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    square = Pixels(side, side, True, bicubic, (side, side), 1.0, *plain)
    found = {}
    for split, part in source.parts.items():
        start, end = part.span
        request = ReadRequest(
            Path(source.file.path), Sampling(fps=str(FPS)), start=start, end=end, pixels=square
        )
        clip = had(reader.read(source.file, request))
        # A source may have fewer frames per second: repeat the one on screen, at first the first one.
        times = (part.first + np.arange(part.count)) / FPS
        shown = np.searchsorted(clip.timestamps, times, side="right") - 1
        found[split] = clip.frames[np.maximum(shown, 0)]
    return found


def had(outcome: Outcome) -> Any:
    """Return the clip that was read; raises its VideoError if there is none."""
    if outcome.clip is None:
        assert isinstance(outcome.error, VideoError)
        raise outcome.error
    return outcome.clip
