"""The toy world tells the truth: its answers are checked against decoded pixels alone.

pytest tests/preprocess/test_toyworld.py
"""

import hashlib
import json
import re
import unicodedata
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen2ForCausalLM,
    SiglipVisionModel,
)

from preprocess import toyworld
from preprocess.toy_models import SIZE
from preprocess.toyworld import COLOURS, FPS, make_toyworld
from preprocess.world import places
from shards.errors import UserError

TASKS = {"span", "point", "box", "seen", "first", "count"}
COORDINATE = re.compile(r"<([txy]):(\d+\.\d+)>")
NAME = re.compile(rf"({'|'.join(COLOURS)}) (circle|square|triangle)")
FILL = {"circle": np.pi / 4, "square": 1.0, "triangle": 0.5}  # of the shape's box
PRESENT, ABSENT = 30, 6  # pixels of a colour: an object's least, and coding noise's most
PIXELS = 2.0  # by how much half-resolution chroma may move an edge
BLUNT = np.array([3.0, 5.0, 3.0, 3.0])  # inwards also corners, and a triangle's tip on top

Record = dict[str, Any]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("toy") / "world"
    make_toyworld(out, train_clips=6, test_clips=6, seed=3)
    return out


@pytest.fixture(scope="module")
def masks(world: Path) -> dict[str, np.ndarray]:
    """Per video, bool `(frames, colours, height, width)`: where the decoded picture shows each."""
    palette = np.array(list(COLOURS.values()), dtype=np.float32)
    found = {}
    for path in sorted((world / "videos").rglob("*.mp4")):
        clip = decode(path)[0].astype(np.float32)
        distance = np.linalg.norm(clip[:, None] - palette[:, None, None], axis=-1)
        nearest = distance.argmin(1)[:, None] == np.arange(len(palette))[:, None, None]
        found[path.relative_to(world / "videos").as_posix()] = nearest & (distance < 90)
    return found


def decode(path: Path) -> tuple[np.ndarray, list[float]]:
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    return np.stack([frame.to_ndarray(format="rgb24") for frame in frames]), [
        frame.time for frame in frames
    ]


def read(world: Path, split: str) -> list[Record]:
    return [json.loads(line) for line in (world / f"{split}.jsonl").read_text().splitlines()]


def turns(record: Record) -> list[tuple[str, str, str]]:
    """Return (task, question, answer) of each turn."""
    values = [turn["value"] for turn in record["conversations"]]
    tasks = record["tasks"] if "tasks" in record else [record["task"]]
    return list(zip(tasks, values[::2], values[1::2], strict=True))


def numbers(text: str, axis: str) -> list[float]:
    return [float(value) for name, value in COORDINATE.findall(text) if name in axis]


def hashes(out: Path) -> dict[str, str]:
    return {
        path.relative_to(out).as_posix(): hashlib.blake2b(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }


def test_same_seed_gives_the_same_bytes_and_leaves_global_randomness_alone(
    world: Path, tmp_path: Path
) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    make_toyworld(tmp_path / "again", train_clips=6, test_clips=6, seed=3)
    assert hashes(tmp_path / "again") == hashes(world)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002


def test_a_clip_depends_on_the_seed_and_its_index_not_on_how_many_there_are(
    world: Path, tmp_path: Path
) -> None:
    make_toyworld(tmp_path / "small", train_clips=2, test_clips=1, seed=3)
    make_toyworld(tmp_path / "other", train_clips=2, test_clips=1, seed=4)
    assert read(tmp_path / "small", "train") == read(world, "train")[:2]
    small, other, full = (hashes(path) for path in (tmp_path / "small", tmp_path / "other", world))
    videos = [name for name in small if name.endswith(".mp4")]
    assert len(videos) == 3
    assert all(small[name] == full[name] for name in videos)
    assert all(small[name] != other[name] for name in (*videos, "tower/model.safetensors"))


def test_no_clip_occurs_twice(world: Path) -> None:
    clips = json.loads((world / "world.json").read_text())["clips"]
    assert len({json.dumps(clip["objects"]) for clip in clips}) == len(clips) == 12
    assert len({digest for name, digest in hashes(world).items() if name.endswith("mp4")}) == 12


def test_videos_decode_to_the_frames_and_times_that_were_drawn(world: Path) -> None:
    for clip in json.loads((world / "world.json").read_text())["clips"]:
        frames, times = decode(world / "videos" / clip["video"])
        assert frames.shape == (clip["frames"], SIZE, SIZE, 3)
        assert times == [k / FPS for k in range(clip["frames"])]
        assert clip["duration"] == clip["frames"] / FPS
        with av.open(str(world / "videos" / clip["video"])) as container:
            assert container.streams.video[0].codec_context.name == "h264"
            assert container.duration == clip["duration"] * av.time_base


def test_every_pixel_count_is_clearly_an_object_or_clearly_noise(
    masks: dict[str, np.ndarray],
) -> None:
    for video, mask in masks.items():
        counts = mask.sum((2, 3))
        assert not ((counts > ABSENT) & (counts < PRESENT)).any(), video


@pytest.mark.parametrize("split", ["train", "test"])
def test_answers_agree_with_the_pixels(
    world: Path, masks: dict[str, np.ndarray], split: str
) -> None:
    asked = set()
    for record in read(world, split):
        mask = masks[record["video"]]
        shown = mask.sum((2, 3)) >= PRESENT  # (frames, colours)
        for task, question, answer in turns(record):
            asked.add(task)
            named = [list(COLOURS).index(colour) for colour, _ in NAME.findall(question)]
            frame = round(numbers(question, "t")[0] * FPS) if "<t:" in question else -1
            if task == "span":
                present = np.flatnonzero(shown[:, named[0]])
                assert present.tolist() == list(range(present[0], present[-1] + 1))
                assert numbers(answer, "t") == [present[0] / FPS, (present[-1] + 1) / FPS]
                assert len(present) >= 0.15 * len(shown)
            elif task in ("point", "box"):
                check_place(mask[frame], named[0], task, answer)
            elif task == "seen":
                colours = [
                    name for name, is_shown in zip(COLOURS, shown[frame], strict=True) if is_shown
                ]
                assert [colour for colour, _ in NAME.findall(answer)] == colours
                assert colours or answer == "nothing"
            elif task == "first":
                first = min(named, key=lambda index: int(np.flatnonzero(shown[:, index])[0]))
                assert answer.split()[0] == list(COLOURS)[first]
            else:
                assert answer == str(shown.any(0).sum())
    assert asked == TASKS if split == "test" else "span" in asked


def check_place(mask: np.ndarray, colour: int, task: str, answer: str) -> None:
    """Check a stated place against one frame's masks `(colours, height, width)`."""
    rows, columns = np.nonzero(mask[colour])
    seen = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    stated = np.array(numbers(answer, "xy")) * SIZE
    others = mask.any(0) & ~mask[colour]
    low, high = np.maximum(seen[:2] - 3, 0), seen[2:] + 3
    alone = not others[low[1] : high[1], low[0] : high[0]].any()
    if task == "point":
        assert (seen[:2] - PIXELS < stated).all()
        assert (stated < seen[2:] + PIXELS).all()
        if alone:
            assert (abs((seen[:2] + seen[2:]) / 2 - stated) <= (BLUNT[:2] + BLUNT[2:]) / 2).all()
    else:
        assert (seen[:2] >= stated[:2] - PIXELS).all()
        assert (seen[2:] <= stated[2:] + PIXELS).all()
        if alone:
            assert (abs(seen - stated) <= BLUNT).all()


def test_truth_agrees_with_the_pixels_in_every_frame(
    world: Path, masks: dict[str, np.ndarray]
) -> None:
    filled: dict[str, list[float]] = {shape: [] for shape in FILL}
    for clip in json.loads((world / "world.json").read_text())["clips"]:
        mask = masks[clip["video"]]
        assert 2 <= len(clip["objects"]) <= 4
        for thing in clip["objects"]:
            colour, shape = thing["name"].split()
            first, last = thing["frames"]
            assert thing["span"] == [first / FPS, (last + 1) / FPS]
            for frame, centre, box in zip(
                range(first, last + 1), thing["centres"], thing["boxes"], strict=True
            ):
                index = list(COLOURS).index(colour)
                check_place(mask[frame], index, "point", places(centre))
                check_place(mask[frame], index, "box", places(box))
                if mask[frame].any(0).sum() == mask[frame, index].sum():
                    area = (box[2] - box[0]) * (box[3] - box[1]) * SIZE**2
                    filled[shape].append(mask[frame, index].sum() / area)
    for shape, values in filled.items():
        assert np.mean(values) == pytest.approx(FILL[shape], abs=0.09)


@pytest.mark.parametrize("split", ["train", "test"])
def test_records_have_the_agreed_form(world: Path, split: str) -> None:
    clips = {c["video"]: c for c in json.loads((world / "world.json").read_text())["clips"]}
    records = read(world, split)
    assert len({record["id"] for record in records}) == len(records)
    for record in records:
        clip = clips[record["video"]]
        names = {thing["name"] for thing in clip["objects"]}
        assert record["video"].startswith(f"{split}/")
        speakers = [turn["from"] for turn in record["conversations"]]
        assert speakers == ["human", "gpt"] * (len(speakers) // 2)
        opening = record["conversations"][0]["value"]
        assert opening.startswith("<video>\n")
        text = " ".join(turn["value"] for turn in record["conversations"])
        assert re.findall(r"<[^>]*>", COORDINATE.sub("", text)) == ["<video>"]
        assert all(0 <= t <= clip["duration"] for t in numbers(text, "t"))
        assert all(0 <= u <= 1 for u in numbers(text, "xy"))
        for task, question, answer in turns(record):
            assert {" ".join(pair) for pair in NAME.findall(question + answer)} <= names
            axes = [axis for axis, _ in COORDINATE.findall(answer)]
            assert axes == list({"span": "tt", "point": "xy", "box": "xyxy"}.get(task, ""))
            if task == "box":
                x1, y1, x2, y2 = numbers(answer, "xy")
                assert x1 < x2
                assert y1 < y2
        if split == "train":
            spans = [question for task, question, _ in turns(record) if task == "span"]
            assert record["tasks"].count("span") == len(names)
            assert {" ".join(NAME.findall(question)[0]) for question in spans} == names
            assert len(record["tasks"]) > len(names)
        else:
            assert len(speakers) == 2
            assert record["task"] in TASKS


@pytest.mark.slow
def test_tower_loads_and_tells_the_colours_of_a_frame(world: Path) -> None:
    tower = AutoModel.from_pretrained(world / "tower").eval()
    processor = AutoImageProcessor.from_pretrained(world / "tower", backend="pil")
    assert isinstance(tower, SiglipVisionModel)
    features, present = [], []
    for index in range(160):
        rng = np.random.default_rng([99, index])
        things = toyworld.plan_things(rng, 32)
        frames = range(0, 32, 4)
        clip = toyworld.draw(rng, things, 32)[frames]
        pixels = processor(images=list(clip), return_tensors="pt")["pixel_values"]
        assert pixels.shape == (len(clip), 3, SIZE, SIZE)
        with torch.no_grad():
            hidden = tower(pixels, output_hidden_states=True).hidden_states[-2]
        grid = hidden.unflatten(1, (2, 4, 2, 4))  # (frames, row, y, column, x, dim)
        features.append(grid.mean((2, 4)).flatten(1))
        shown = [{thing.colour for thing in things if thing.shown(k)} for k in frames]
        present.append(torch.tensor([[colour in here for colour in COLOURS] for here in shown]))
    x, y = torch.cat(features).double(), torch.cat(present)
    x = torch.cat([x, torch.ones(len(x), 1)], 1)
    train, held_out = slice(None, 1000), slice(1000, None)
    ridge = x[train].T @ x[train] + torch.eye(x.shape[1])
    weight = torch.linalg.solve(ridge, x[train].T @ y[train].double())
    accuracy = ((x[held_out] @ weight > 0.5) == y[held_out]).double().mean()
    assert accuracy > 0.9  # a least-squares probe of 1000 frames; logistic on 6000 gives 0.985


def test_llm_and_tokenizer_load_and_agree(world: Path) -> None:
    llm = AutoModelForCausalLM.from_pretrained(world / "llm")
    tokenizer = AutoTokenizer.from_pretrained(world / "llm")
    assert isinstance(llm, Qwen2ForCausalLM)
    assert llm.config.tie_word_embeddings
    assert llm.get_input_embeddings().num_embeddings > len(tokenizer)
    assert llm.config.eos_token_id == llm.generation_config.eos_token_id == tokenizer.eos_token_id
    assert llm.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.eos_token == "<|im_end|>"
    assert len(tokenizer("<|im_start|><|im_end|><|endoftext|>").input_ids) == 3
    words = tokenizer("When is the red circle visible?").input_ids
    assert len(words) <= 10
    assert torch.isfinite(llm(torch.tensor([words])).logits).all()


def test_chat_template_renders_chatml(world: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(world / "llm")
    messages = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "red"}]
    asked = "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template(messages, tokenize=False) == f"{asked}red<|im_end|>\n"
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == asked


def test_tokenizer_gives_back_any_text(world: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(world / "llm")

    @settings(max_examples=200, deadline=None)
    @given(st.text())
    def check(text: str) -> None:
        composed = unicodedata.normalize("NFC", text)  # as every Qwen2 tokenizer does
        assert tokenizer.decode(tokenizer(text).input_ids) == composed

    check()


def test_a_folder_in_use_and_an_empty_split_are_refused(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(UserError, match="not an empty folder"):
        make_toyworld(tmp_path, train_clips=1, test_clips=1)
    with pytest.raises(UserError, match="at least one clip"):
        make_toyworld(tmp_path / "new", train_clips=0, test_clips=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["note.txt"]
