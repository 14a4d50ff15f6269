"""A footage world tells the truth: cuts, boxes and answers are checked against decoded pixels alone.

pytest tests/preprocess/test_footage.py
FRAMEBANK_CLIPS=videos pytest tests/preprocess/test_footage.py    also one cut from real clips

The videos that it is cut from say themselves what they are: the colour is the source, the grey in it
the part (first half, gap, last 40 %), and eight stripes, light or dark, are the bits of the time.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import combinations
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from click.testing import CliRunner

from preprocess.cli.main import main
from preprocess.encode.run import EncodeOptions, encode
from preprocess.footage.cuts import cut_clip, lengths
from preprocess.footage.make import make_footage
from preprocess.footage.questions import train_records
from preprocess.footage.sources import FPS, Part, Source
from shards.format.features import Sampling
from shards.format.plan import ClipSource
from shards.read.bank import Bank
from train.scores.kinds import asked
from train.scores.overlap import interval_iou

SIZE, SECONDS = 64, 6
LENGTH = 12  # seconds of a source
COLOURS = {
    "red.mp4": (1, 0, 0),
    "green.mkv": (0, 1, 0),
    "blue.mp4": (0, 0, 1),
    "yellow.avi": (1, 1, 0),
    "pink.mp4": (1, 0, 1),
    "cyan.mp4": (0, 1, 1),
}
RATES = {"green.mkv": 25, "yellow.avi": 5}  # others have 8 frames per second
LIGHT, DARK = 190, 120  # of a stripe
GREY = {"train": 0, "gap": 110, "test": 50}  # added to every channel
PHRASES = {
    name: (f"a {Path(name).stem} thing", f"what is {Path(name).stem}", f"the {Path(name).stem} one")
    for name in COLOURS
}
SPAN = re.compile(r"from <t:(\d+\.\d{3})> to <t:(\d+\.\d{3})>")
PLACE = re.compile(r"<[xy]:(\d\.\d{4})>")
SCENE_OF = {phrase: name for name, phrases in PHRASES.items() for phrase in phrases}
CLIPS = os.environ.get("FRAMEBANK_CLIPS", "")

Json = dict[str, Any]


def write_source(path: Path, colour: tuple[int, ...], rate: int) -> None:
    """Write a source: wider than high, with its picture in the middle square and black beside it."""
    with av.open(str(path), "w") as container:
        codec = "mpeg4" if path.suffix == ".avi" else "libx264"
        options = {} if codec == "mpeg4" else {"crf": "6", "bf": "2"}
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = SIZE + 32, SIZE, "yuv420p"
        stream.codec_context.bit_rate = 8_000_000
        for k in range(LENGTH * rate):
            share = k / (LENGTH * rate)
            grey = GREY["train" if share < 0.5 else "gap" if share < 0.6 else "test"]
            image = np.zeros((SIZE, SIZE + 32, 3))
            for bit in range(8):
                level = LIGHT if k * FPS // rate >> bit & 1 else DARK
                image[:, 16 + 8 * bit : 24 + 8 * bit] = np.array(colour) * level + grey
            frame = av.VideoFrame.from_ndarray(image.astype(np.uint8), format="rgb24")
            frame.pts, frame.time_base = k, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    for name, colour in COLOURS.items():
        write_source(folder / name, colour, RATES.get(name, FPS))
    return folder


@pytest.fixture(scope="module")
def phrases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("phrases") / "phrases.yaml"
    lines = [f"{name}: [{', '.join(words)}]\n" for name, words in PHRASES.items()]
    path.write_text("".join([*lines, "another.mp4: of a video that is not here\n"]))
    return path


@pytest.fixture(scope="module")
def world(inputs: Path, phrases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("footage") / "world"
    options: Json = {"train_clips": 8, "test_clips": 6, "seconds": SECONDS, "size": SIZE, "seed": 5}
    make_footage([str(inputs)], out, phrases=phrases, **options)
    return out


@pytest.fixture(scope="module")
def truth(world: Path) -> dict[str, Json]:
    return {
        clip["video"]: clip for clip in json.loads((world / "footage.json").read_text())["clips"]
    }


@pytest.fixture(scope="module")
def pixels(world: Path) -> dict[str, np.ndarray]:
    return {
        path.relative_to(world / "videos").as_posix(): decode(path)[0].astype(float)
        for path in sorted((world / "videos").rglob("*.mp4"))
    }


def decode(path: Path) -> tuple[np.ndarray, list[float]]:
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    return np.stack([frame.to_ndarray(format="rgb24") for frame in frames]), [
        frame.time for frame in frames
    ]


def read(world: Path, name: str) -> list[Json]:
    return [json.loads(line) for line in (world / f"{name}.jsonl").read_text().splitlines()]


def turns(record: Json) -> list[tuple[str, str, str]]:
    """Return (task, question, answer) of each turn."""
    values = [turn["value"] for turn in record["conversations"]]
    tasks = record["tasks"] if "tasks" in record else [record["task"]]
    return list(zip(tasks, values[::2], values[1::2], strict=True))


def every_turn(world: Path) -> Iterator[tuple[str, str, str, str]]:
    """Yield (video, task, question, answer) of all records."""
    for name in ("train", "test", "test-new-phrases"):
        for record in read(world, name):
            for turn in turns(record):
                yield record["video"], *turn


# What pixels say


def sources_of(image: np.ndarray) -> np.ndarray:
    """Return int `(height, width)`: which source each pixel `(height, width, rgb)` is from."""
    spread = image - image.min(-1, keepdims=True)
    shade = spread / np.maximum(spread.max(-1, keepdims=True), 1)
    palette = np.array(list(COLOURS.values()))
    return np.abs(shade[:, :, None] - palette).sum(-1).argmin(-1)


def inner(box: list[float]) -> tuple[slice, slice]:
    """Return the rows and columns of the inset's picture, within its edge."""
    x1, y1, x2, y2 = (round(edge * SIZE) for edge in box)
    return slice(y1 + 4, y2 - 4), slice(x1 + 4, x2 - 4)


def at(clip: Json, frame: int) -> list[float] | None:
    """Return the box of the inset in a frame."""
    k = frame - clip["inset"]["first_frame"]
    return clip["inset"]["boxes"][k] if 0 <= k < len(clip["inset"]["boxes"]) else None


def scene_pixels(image: np.ndarray, box: list[float] | None, size: int = SIZE) -> np.ndarray:
    """Return bool `(height, width)`: the pixels that the inset, and the blur beside it, leave free."""
    free = np.ones(image.shape[:2], dtype=bool)
    if box:
        x1, y1, x2, y2 = (round(edge * size) for edge in box)
        free[max(y1 - 2, 0) : y2 + 2, max(x1 - 2, 0) : x2 + 2] = False
    return free


def seen(image: np.ndarray, box: list[float] | None) -> str:
    """Return the source of the scene that a frame shows."""
    found = sources_of(image)[scene_pixels(image, box)]
    counts = np.bincount(found, minlength=len(COLOURS))
    assert counts.max() > 0.95 * len(found), counts
    return list(COLOURS)[counts.argmax()]


def shown(clip: Json, images: np.ndarray) -> list[str]:
    return [seen(image, at(clip, k)) for k, image in enumerate(images)]


def time_code(image: np.ndarray) -> int:
    """Return the number of a source's frame, at 8 per second, by its stripes."""
    middle = image[16:48].reshape(32, 8, 8, 3)[:, :, 2:6].mean((0, 2))  # (stripes, rgb)
    spread = middle.max(-1) - middle.min(-1)
    return sum(1 << bit for bit in range(8) if spread[bit] > (LIGHT + DARK) / 2)


@pytest.mark.slow
def test_every_frame_is_from_the_source_that_its_scene_names(
    truth: dict[str, Json], pixels: dict[str, np.ndarray]
) -> None:
    assert len(truth) == len(pixels) == 14
    for video, clip in truth.items():
        expected = [
            scene["source"]
            for scene in clip["scenes"]
            for _ in range(round((scene["span"][1] - scene["span"][0]) * FPS))
        ]
        assert shown(clip, pixels[video]) == expected, video
        assert len({*expected, clip["inset"]["source"]}) == len(clip["scenes"]) + 1


def test_every_frame_is_the_moment_of_its_source_that_is_recorded(
    truth: dict[str, Json], pixels: dict[str, np.ndarray]
) -> None:
    checked = set()
    for video, clip in truth.items():
        for scene in clip["scenes"]:
            first, last = (round(edge * FPS) for edge in scene["span"])
            for k in range(first, last):
                if at(clip, k) is None:
                    wanted = round(scene["from"][0] * FPS) + k - first
                    if rate := RATES.get(scene["source"]):
                        # the frame that is shown then, by its own number, in eighths of a second
                        wanted = wanted * rate // FPS * FPS // rate
                    assert time_code(pixels[video][k]) == wanted, (video, k)
                    checked.add(scene["source"])
    assert checked == set(COLOURS)


def test_train_and_test_share_no_frame_and_leave_a_gap(
    truth: dict[str, Json], pixels: dict[str, np.ndarray]
) -> None:
    for video, clip in truth.items():
        split = video.split("/")[0]
        for k, image in enumerate(pixels[video]):
            places = [image[scene_pixels(image, at(clip, k))]]
            if box := at(clip, k):
                places.append(image[inner(box)].reshape(-1, 3))
            for place in places:
                assert abs(np.median(place.min(-1)) - GREY[split]) < 20, (video, k)


def test_the_small_picture_is_where_its_boxes_say(
    truth: dict[str, Json], pixels: dict[str, np.ndarray]
) -> None:
    moved = 0
    for video, clip in truth.items():
        boxes = clip["inset"]["boxes"]
        start, end = clip["inset"]["span"]
        assert len(boxes) == (end - start) * FPS
        assert clip["inset"]["first_frame"] == start * FPS
        moved += boxes[0] != boxes[-1]
        for k, image in enumerate(pixels[video]):
            # nothing in a scene is white: the edge is
            white = image.min(-1) > 200
            box = at(clip, k)
            if box is None:
                assert not white.any(), (video, k)
                continue
            rows, columns = np.flatnonzero(white.any(1)), np.flatnonzero(white.any(0))
            found = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            assert np.abs(np.array(found) - np.array(box) * SIZE).max() <= 1, (video, k)
            inside = sources_of(image[inner(box)])
            name = list(COLOURS)[np.bincount(inside.ravel()).argmax()]
            assert name == clip["inset"]["source"], (video, k)
    assert moved > len(truth) / 2


def test_answers_agree_with_the_pixels(
    world: Path, truth: dict[str, Json], pixels: dict[str, np.ndarray]
) -> None:
    tasks = set()
    said = {video: shown(clip, pixels[video]) for video, clip in truth.items()}
    for video, task, question, answer in every_turn(world):
        tasks.add(task)
        clip, names = truth[video], said[video]
        named = sorted(
            (question.index(phrase), SCENE_OF[phrase]) for phrase in SCENE_OF if phrase in question
        )
        time = re.search(r"<t:([\d.]+)>", question)
        if task == "span":
            first = names.index(named[0][1])
            last = first + names.count(named[0][1])
            assert SPAN.fullmatch(answer)
            assert SPAN.findall(answer) == [(f"{first / FPS:.3f}", f"{last / FPS:.3f}")]
        elif task == "seen":
            assert time
            assert PHRASES[names[round(float(time[1]) * FPS)]][0] == answer
        elif task == "first":
            assert SCENE_OF[answer] == min((name for _, name in named), key=names.index)
        elif task == "order":
            in_order = [named["ABCDE".index(letter)][1] for letter in answer.split(", ")]
            assert in_order == list(dict.fromkeys(names))
        elif task == "count":
            assert answer == str(len(set(names)))
        else:
            assert time
            box = at(clip, round(float(time[1]) * FPS))
            assert box
            assert np.allclose([float(value) for value in PLACE.findall(answer)], box, atol=1e-4)
    assert tasks == {"span", "seen", "first", "order", "count", "box"}


def test_scores_read_each_answer_as_what_it_is(world: Path) -> None:
    kinds = {"span": "span", "seen": "text", "first": "text", "order": "order"}
    kinds |= {"count": "number", "box": "box"}
    for _, task, question, answer in every_turn(world):
        assert asked(answer, SECONDS, question=question, task=task).kind == kinds[task]


def test_scenes_of_training_clips_go_by_every_phrase_that_training_knows(
    world: Path, truth: dict[str, Json]
) -> None:
    rows = read(world, "train-scenes")
    assert len({row["id"] for row in rows}) == len(rows)
    told = [(row["video"], [row["start"], row["end"]], row["phrase"]) for row in rows]
    assert told == [
        (video, scene["span"], list(PHRASES[scene["source"]][:-1]))
        for video, clip in truth.items()
        if video.startswith("train/")
        for scene in clip["scenes"]
    ]


def test_kept_phrases_are_asked_in_their_own_file_alone(world: Path) -> None:
    kept = {words[-1] for words in PHRASES.values()}
    for name in ("train", "test"):
        assert not [phrase for phrase in kept if phrase in (world / f"{name}.jsonl").read_text()]
    records = read(world, "test-new-phrases")
    assert {record["task"] for record in records} == {"span", "first"}
    text = (world / "test-new-phrases.jsonl").read_text()
    assert all(phrase in text for phrase in kept)
    known = [phrase for words in PHRASES.values() for phrase in words[:-1]]
    assert not [phrase for phrase in known if phrase in text]
    ids = [record["id"] for name in ("test", "test-new-phrases") for record in read(world, name)]
    assert len(set(ids)) == len(ids)


def test_videos_and_sources_are_recorded(world: Path, inputs: Path) -> None:
    told = json.loads((world / "footage.json").read_text())
    assert [source["video"] for source in told["sources"]] == sorted(COLOURS)
    for source in told["sources"]:
        path = inputs / source["video"]
        assert (source["path"], source["size"]) == (str(path), path.stat().st_size)
        assert source["duration"] == pytest.approx(LENGTH)
        assert source["train"] == [0, 6]
        assert source["test"] == [7.25, 12]
        assert (*source["phrases"], source["kept"]) == PHRASES[source["video"]]
    for clip in told["clips"]:
        frames, times = decode(world / "videos" / clip["video"])
        assert frames.shape == (SECONDS * FPS, SIZE, SIZE, 3)
        assert times == [k / FPS for k in range(len(frames))]
    assert sorted(path.name for path in world.iterdir()) == [
        "footage.json",
        "llm",
        "test-new-phrases.jsonl",
        "test.jsonl",
        "train-scenes.jsonl",
        "train.jsonl",
        "videos",
    ]


# Determinism


def hashes(out: Path) -> dict[str, str]:
    return {
        path.relative_to(out).as_posix(): hashlib.blake2b(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }


def test_a_clip_depends_on_the_seed_and_its_index_alone(
    world: Path, inputs: Path, phrases: Path, tmp_path: Path
) -> None:
    options: Json = {"seconds": SECONDS, "size": SIZE, "phrases": phrases, "test_clips": 6}
    for name, count, seed in (("again", 8, 5), ("few", 2, 5), ("other", 2, 6)):
        make_footage([str(inputs)], tmp_path / name, train_clips=count, seed=seed, **options)
    full, again, few, other = (
        hashes(path) for path in (world, *(tmp_path / name for name in ("again", "few", "other")))
    )
    assert again == full
    assert read(tmp_path / "few", "train") == read(world, "train")[:2]
    assert read(tmp_path / "few", "test") == read(world, "test")
    videos = [name for name in few if name.endswith(".mp4")]
    assert len(videos) == 8
    assert all(few[name] == full[name] for name in videos)
    assert all(few[name] != other[name] for name in videos)


# No answer is given away


def drawn(count: int) -> list[tuple[Any, Json]]:
    """Return cuts and their training records, of which no pixel is drawn."""
    sources = []
    for name, words in PHRASES.items():
        file = ClipSource(name, name, name, name)
        sources.append(Source(file, 1, name, 60.0, words[:-1], words[-1]))
    parts = [source.parts for source in sources]
    found = []
    for index in range(count):
        rng = np.random.default_rng([1, index])
        clip = cut_clip(rng, parts, "train", 64, 224)
        (record,) = train_records(rng, "train/a.mp4", clip, sources, 224)
        found.append((clip, record))
    return found


def agreement(orders: list[list[float]]) -> float:
    """Return Kendall's tau of sequences, over all their pairs: 1 where all rise, about 0 by chance."""
    signs = [np.sign(b - a) for order in orders for a, b in combinations(order, 2)]
    assert len(signs) > 1000
    return float(np.mean(signs))


def test_where_a_question_stands_says_nothing_about_its_answer() -> None:
    spans, options, firsts, kinds = [], [], [], []
    for clip, record in drawn(600):
        starts = {list(PHRASES)[scene.source]: scene.first for scene in clip.scenes}
        asked_of = turns(record)
        kinds.append(asked_of[0][0])
        spans.append([float(SPAN.findall(a)[0][0]) for task, _, a in asked_of if task == "span"])
        for task, question, answer in asked_of:
            if task == "order":
                letters = answer.split(", ")
                options.append([float(letters.index(letter)) for letter in sorted(letters)])
            elif task == "first":
                firsts += [[0.0, 1.0] if answer in question.split(" or ")[0] else [1.0, 0.0]]
        assert sorted(spans[-1]) == sorted(first / FPS for first in starts.values())
    assert agreement([sorted(order) for order in spans]) == 1  # so it would be in order of time
    assert abs(agreement(spans)) < 0.06  # 0.02 is one sigma
    assert abs(agreement(options)) < 0.06
    assert abs(np.mean([order[0] for order in firsts]) - 0.5) < 0.12
    assert set(kinds) == {"span", "seen", "first", "order", "count", "box"}


def test_cuts_are_of_any_length_and_no_constant_answer_is_good() -> None:
    cuts = [clip for clip, _ in drawn(600)]
    shortest, longest = lengths(64)
    counts = [scene.count for clip in cuts for scene in clip.scenes]
    assert (min(counts), max(counts)) == (shortest, longest)
    assert {len(clip.scenes) for clip in cuts} == {3, 4, 5}
    spans = [scene.span for clip in cuts for scene in clip.scenes]
    grid = [k / 2 for k in range(17)]
    best = max(
        np.mean([interval_iou(span, (start, end)) for span in spans])
        for start in grid
        for end in grid
        if start < end
    )
    assert best < 0.35
    places = np.concatenate([clip.inset.places / (224 - clip.inset.side) for clip in cuts])
    assert (places.min(), places.max()) == (0, 1)
    assert np.abs(places.mean(0) - 0.5).max() < 0.05


@pytest.mark.parametrize("duration", [7.875, 8.0, 9.99, 60.0, 119.9, 200.0, 3600.0])
def test_parts_never_meet(duration: float) -> None:
    file = ClipSource("a.mp4", "a", "a.mp4", "a.mp4")
    parts = Source(file, 1, "", duration, ("a",), None).parts
    train, test = parts["train"], parts["test"]
    assert isinstance(train, Part)
    assert train.first == 0
    assert train.span[1] <= 0.5 * duration
    assert test.span[0] >= 0.6 * duration
    assert duration - 1 / FPS < test.span[1] <= duration
    assert max(train.count, test.count) <= 60 * FPS


# It can be trained on


def test_a_world_is_encoded_and_trained_on(
    world: Path, toy: Path, train_here: Callable[..., Path], tmp_path: Path
) -> None:
    options = EncodeOptions(
        tower=str(toy / "tower"), strides=(4, 8), sampling=Sampling(num_frames=8)
    )
    summary = encode([str(world / "videos")], tmp_path / "bank", options)
    assert (summary.clips, summary.failures) == (14, [])
    assert {record["video"] for record in read(world, "train")} <= set(
        Bank.open(tmp_path / "bank").ids
    )
    out = tmp_path / "run"
    train_here(out, bank=tmp_path / "bank", data_path=world / "train.jsonl", max_steps=1)
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert np.isfinite(steps[-1]["ce_loss"])


# Refusals


def footage(*words: object) -> tuple[int, list[str]]:
    result = CliRunner().invoke(main, ["footage", *map(str, words)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, [x for x in result.stderr.splitlines() if x.startswith("error: ")]


def test_a_source_that_will_not_do_is_refused_by_name_and_nothing_is_written(
    inputs: Path, phrases: Path, tmp_path: Path
) -> None:
    clips = shutil.copytree(inputs, tmp_path / "clips")
    out = tmp_path / "out"
    (clips / "broken.mp4").write_bytes((clips / "red.mp4").read_bytes()[:5000])  # its index is gone
    shutil.copy(clips / "red.mp4", clips / "twin.mp4")
    code, lines = footage(clips, out, "--seconds", 13)
    assert code == 2
    short = [line for line in lines if "too short" in line]
    assert len(short) == 7  # 0.4 x 13 s of a scene need 13 s of a source
    assert f"{clips}/red.mp4: too short, expected at least 12.875 s" in "\n".join(lines)
    assert "got 12.00 s; leave it out, or lower --seconds" in short[0]
    assert [line for line in lines if "broken.mp4: not a readable video" in line]
    assert f"error: {clips}/red.mp4 and {clips}/twin.mp4: the same video twice" in lines
    assert len(lines) == 9
    (clips / "broken.mp4").unlink()
    code, lines = footage(clips, out, "--phrases", phrases)
    assert code == 2
    assert lines[0].startswith(f"error: {phrases}: no phrases for twin.mp4; add a line `twin.mp4: ")
    code, lines = footage(clips / "red.mp4", clips / "blue.mp4", out)
    assert (code, lines) == (2, ["error: too few videos, expected at least 4, got 2"])
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--size", 65], "bad --size, expected an even number, 64 or more, got 65"),
        (["--size", 32], "bad --size, expected an even number, 64 or more, got 32"),
        (["--seconds", 3], "bad --seconds, expected 4 or more, got 3"),
        (["--train-clips", 0], "--train-clips"),
        (["--seed", -1], "--seed"),
        (["--phrases", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_an_option_that_cannot_be_is_refused(
    inputs: Path, tmp_path: Path, words: list[object], expected: str
) -> None:
    code, (line,) = footage(inputs, tmp_path / "out", *words)
    assert code == 2
    assert expected in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("red: [a", "no YAML"),
        ("- a", "no phrases, got list"),
        ("red: 3", "red: no list of phrases, got 3"),
        ("red: []", "red: no list of phrases"),
        ("red: [a, 3]", "red: no list of phrases"),
        ("7: [a]", "7: no list of phrases"),
        ("red: [see <t:3>]", "red: a phrase is one line without `<`"),
        ("red: [' a']", "red: a phrase is one line without `<`"),
        (
            "red: [one two three four five six seven eight nine ten]",
            "red: a phrase has 1 to 9 words",
        ),
        ("red: ['']", "red: a phrase has 1 to 9 words"),
        ("red: [it]\nblue: [IT]", "the phrase 'it' means more than one thing"),
        ("red: [it, It]", "the phrase 'it' means more than one thing"),
    ],
)
def test_phrases_that_cannot_be_asked_are_refused(
    inputs: Path, tmp_path: Path, text: str, expected: str
) -> None:
    path = tmp_path / "phrases.yaml"
    others = [f"{name}: {name}\n" for name in COLOURS if Path(name).stem not in text]
    path.write_text("".join(others) + text if text[0] in "rb" else text)
    code, lines = footage(inputs, tmp_path / "out", "--phrases", path)
    assert code == 2
    assert expected in "\n".join(lines)
    assert not (tmp_path / "out").exists()


def test_without_phrases_a_video_goes_by_its_name_and_that_is_said(
    inputs: Path, tmp_path: Path
) -> None:
    words = ["--train-clips", 1, "--test-clips", 1, "--size", SIZE, "--seconds", SECONDS]
    result = CliRunner().invoke(
        main, ["footage", str(inputs), str(tmp_path / "w"), *map(str, words)]
    )
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [
        f"{tmp_path}/w: 1 training and 1 test clips of 6 s, cut from 6 videos",
        "videos are described by their file names; say what they show with --phrases",
    ]
    spans = [q for r in read(tmp_path / "w", "train") for task, q, _ in turns(r) if task == "span"]
    stems = {Path(name).stem for name in COLOURS}
    assert {question.split()[-1].rstrip("?") for question in spans} <= stems
    assert not (tmp_path / "w" / "test-new-phrases.jsonl").exists()
    code, (line,) = footage(inputs, tmp_path / "w")
    assert (code, "not an empty folder" in line) == (2, True)


@pytest.mark.skipif(not CLIPS, reason="FRAMEBANK_CLIPS does not name the test videos")
@pytest.mark.slow
def test_real_clips_are_cut_at_their_times(tmp_path: Path) -> None:
    """Scenes are compared with frames that PyAV decodes from the start of each source."""
    names = (
        "bikes.mp4",
        "pancake.mkv",
        "hiker_vp9_720p.webm",
        "mpeg4_bframes.avi",
        "bunny_720p.mp4",
    )
    inputs = [str(Path(CLIPS) / name) for name in names]
    make_footage(inputs, tmp_path / "w", train_clips=2, test_clips=1, seconds=5, size=128)
    told = json.loads((tmp_path / "w" / "footage.json").read_text())
    sources = {}
    for name, path in zip(names, inputs, strict=True):
        with av.open(path) as container:
            frames = [frame.to_image() for frame in container.decode(video=0)]
            rate = container.streams.video[0].average_rate
        assert rate
        sources[name] = frames, np.arange(len(frames)) / float(rate)  # their frames come evenly
    for clip in told["clips"]:
        images, _ = decode(tmp_path / "w" / "videos" / clip["video"])
        for scene in clip["scenes"]:
            frames, times = sources[scene["source"]]
            first, last = (round(edge * FPS) for edge in scene["span"])
            for k in range(first, last):
                time = scene["from"][0] + (k - first) / FPS
                image = frames[int(np.searchsorted(times, time + 1e-6, side="right")) - 1]
                image = image.resize((image.width * 128 // image.height, 128))  # none is upright
                left = (image.width - 128) // 2
                square = image.crop((left, 0, left + 128, 128))
                free = scene_pixels(images[k], at(clip, k), 128)
                error = np.abs(np.asarray(square, dtype=float) - images[k])[free].mean()
                assert error < 4, (clip["video"], scene, k, error)
