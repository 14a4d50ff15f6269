"""Assemble a benchmark with exact answers from a user's own videos.

    preprocess footage clips/ world --phrases phrases.yaml --train-clips 400 --seed 0

Each clip is three to five scenes of different videos, with hard cuts, and for a while a small picture of
yet another video moves over them. Written under the given folder:

    videos/{train,test}/clip-00000.mp4   h264, square, 8 frames per second
    train.jsonl                          one conversation of several turns per clip
    train-scenes.jsonl                   what each of their scenes shows, and when: to splice from
    test.jsonl                           one question per record, in phrases that training knows
    test-new-phrases.jsonl               the same clips, asked by the phrases kept for the tests
    llm/                                 a small random LLM with tokens for the words of train.jsonl
    footage.json                         every source, cut and box; written last

Training and test clips are cut from different parts of each video, with a gap between them.
Frame k of a clip is shown from k / FPS, a box is x1 y1 x2 y2 as fractions of the frame.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from tqdm import tqdm

from preprocess.decode.decode_child import DecodeChild
from preprocess.decode.source import SourceReader
from preprocess.footage.cuts import Clip, Cut, cut_clip, describe, lengths
from preprocess.footage.questions import new_phrase_records, scene_rows, test_records, train_records
from preprocess.footage.sources import FPS, SPLITS, Source, find_sources, read_parts
from preprocess.world import Json, check_empty, texts_of, write_rows, write_video
from shards.errors import UserError

CRF = 16
EDGE = (
    2  # pixels of white and of black around the small picture, so that it shows on any background
)
LEAST_SIZE, LEAST_SECONDS = 64, 4
WORDS = 2000  # tokens of the small LLM, at most

Footage = dict[str, list[np.ndarray]]
"""By split: the frames of every source's part, uint8 `(frames, size, size, 3)`."""


def make_footage(
    inputs: Sequence[str],
    out: Path,
    *,
    train_clips: int = 400,
    test_clips: int = 100,
    seconds: int = 8,
    size: int = 224,
    seed: int = 0,
    phrases: Path | None = None,
) -> list[Source]:
    """Cut a world into the empty or new folder `out`; return its sources.

    Equal arguments and videos give equal bytes. seconds: of a clip; size: of its sides, in pixels.
    """
    if train_clips < 1 or test_clips < 1:
        raise UserError(
            f"a world needs at least one clip per split, got {train_clips} and {test_clips}"
        )
    if size % 2 or size < LEAST_SIZE:
        raise UserError("bad --size", got=size, expected=f"an even number, {LEAST_SIZE} or more")
    if seconds < LEAST_SECONDS:
        raise UserError("bad --seconds", got=seconds, expected=f"{LEAST_SECONDS} or more")
    # all that can be refused before anything is written
    check_empty(out)
    sources = find_sources(inputs, phrases, lengths(seconds * FPS)[1])
    for split in SPLITS:
        (out / "videos" / split).mkdir(parents=True)
    with TemporaryDirectory(prefix=".frames-", dir=out) as folder:
        # each source is decoded once, though many clips are cut of it
        footage = read_footage(sources, size, Path(folder))
        counts = dict(zip(SPLITS, (train_clips, test_clips), strict=True))
        # all plans before the first pixel: questions need no video
        clips = cut_all(sources, counts, seed, seconds * FPS, size)
        with tqdm(total=train_clips + test_clips, desc="cutting", unit="clip") as bar:
            for video, clip, _ in clips:
                split = video.split("/")[0]
                write_video(out / "videos" / video, draw(clip, footage[split]), FPS, CRF)
                bar.update()
    records = ask(clips, sources, size)
    for name, rows in records.items():
        if rows:  # there are no new phrases where sources have one phrase each
            write_rows(out / f"{name}.jsonl", rows)
    save_small_llm(out / "llm", texts_of(records["train"]), seed)
    names = [source.file.relative for source in sources]
    world: Json = {"seed": seed, "fps": FPS, "size": size, "seconds": seconds}
    world["sources"] = [source.to_json() for source in sources]
    world["clips"] = [{"video": video} | describe(clip, names, size) for video, clip, _ in clips]
    # last: a folder without it is a world that was not completed
    (out / "footage.json").write_text(json.dumps(world), encoding="utf-8")
    return sources


Numbered = tuple[str, Clip, np.random.Generator]
"""A clip's id, its plan, and the generator that its questions are drawn with."""


def cut_all(
    sources: Sequence[Source], counts: Mapping[str, int], seed: int, frames: int, size: int
) -> list[Numbered]:
    """Return the plan of every clip: a function of (seed, split, index), not of the number of clips."""
    parts = [source.parts for source in sources]
    clips = []
    for number, (split, count) in enumerate(counts.items()):
        for index in range(count):
            # a stream for each clip: more clips leave the first ones as they are
            rng = np.random.default_rng([seed, number, index])
            clip = cut_clip(rng, parts, split, frames, size)
            clips.append((f"{split}/clip-{index:05d}.mp4", clip, rng))
    return clips


def read_footage(sources: Sequence[Source], size: int, folder: Path) -> Footage:
    """Read every source once, into memory-mapped files, so that any number of sources fits."""
    footage: Footage = {split: [] for split in SPLITS}
    with SourceReader(DecodeChild(), folder) as reader:
        for number, source in enumerate(tqdm(sources, desc="reading", unit="video")):
            for split, frames in read_parts(source, reader, size).items():
                path = folder / f"{number}-{split}.npy"
                np.save(path, frames)
                footage[split].append(np.load(path, mmap_mode="r"))
    return footage


def draw(clip: Clip, footage: Sequence[np.ndarray]) -> np.ndarray:
    """Return a clip's frames, uint8 `(frames, size, size, 3)`. footage: of its split."""

    def shown(cut: Cut) -> np.ndarray:
        offset = cut.begins - cut.part.first
        return footage[cut.source][offset : offset + cut.count]

    frames = np.concatenate([shown(scene) for scene in clip.scenes])
    inset, side = clip.inset, clip.inset.side
    left, top = inset.corner
    # a copy: its border would be painted into the source
    square = shown(inset.cut)[:, top : top + side, left : left + side].copy()
    # white outside, black within: one of them shows on any ground
    for edge, grey in ((0, 255), (EDGE, 0)):
        paint_edge(square[:, edge : side - edge, edge : side - edge], grey)
    for frame, picture, (x, y) in zip(
        frames[inset.cut.first :], square, inset.places.tolist(), strict=False
    ):
        frame[y : y + side, x : x + side] = picture
    return frames


def paint_edge(pictures: np.ndarray, grey: int) -> None:
    """Draw a border inside the pictures `(frames, height, width, 3)`, in place."""
    for rows in (pictures, pictures.swapaxes(1, 2)):
        rows[:, :EDGE] = rows[:, -EDGE:] = grey


def save_small_llm(folder: Path, texts: Sequence[str], seed: int) -> None:
    """Save an LLM with random weights, small enough to learn these worlds in minutes on a CPU."""
    from transformers.utils.logging import disable_progress_bar

    from preprocess.toy_models import save_llm

    disable_progress_bar()
    save_llm(folder, texts, seed, WORDS)


def ask(clips: Sequence[Numbered], sources: Sequence[Source], size: int) -> dict[str, list[Json]]:
    """Return the rows of each annotation file, by its name."""
    names = ("train", "train-scenes", "test", "test-new-phrases")
    records: dict[str, list[Json]] = {name: [] for name in names}
    for video, clip, rng in clips:
        if video.startswith("train/"):
            records["train"] += train_records(rng, video, clip, sources, size)
            records["train-scenes"] += scene_rows(video, clip, sources)
        else:
            records["test"] += test_records(rng, video, clip, sources, size)
            records["test-new-phrases"] += new_phrase_records(rng, video, clip, sources)
    return records
