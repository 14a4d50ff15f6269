"""Questions about raw videos: the same features, the same logits, the same answers as from a bank."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from model.generate import generate, write_answer
from model.vlm import VLM
from preprocess.decode.child import DecodeChild
from preprocess.toy_models import save_tower
from shards.format.features import FeatureConfig
from shards.read.banks import Banks
from train.ask import FreshClip, fresh_clip, in_pixels, load_tower, main
from train.batches.chat import Chat
from train.batches.collate import collate, lay_out
from train.data.markup import split_markup
from train.data.records import Turn

CLIP = "train/clip-00000.mp4"


@pytest.fixture(scope="module")
def model(trained_run: Path) -> VLM:
    return VLM.load(trained_run).eval()


@pytest.fixture(scope="module")
def fresh(toy: Path, model: VLM) -> FreshClip:
    features = FeatureConfig.from_json(model.features)
    tower = load_tower(features, str(toy / "tower"))
    with DecodeChild() as child:
        return fresh_clip(toy / "videos" / CLIP, features, tower, child)


def batch_of(model: VLM, clip: Any, *texts: str, prompt: bool = False) -> Any:
    chat = Chat.of(model)
    turns = [Turn(("user", "assistant")[k % 2], text) for k, text in enumerate(texts)]
    turns += [Turn("assistant", "")] * prompt
    encoded = chat.encode(turns, [clip.info.duration], answer=len(turns) - 1 if prompt else None)
    row = lay_out(encoded, [clip.info], model.config, "average")
    return chat, collate([row], [[clip]], model.config, ["r"])


def test_fresh_features_are_the_banked_ones_to_the_bit(fresh: FreshClip, toy_bank: Path) -> None:
    banked = Banks.open([toy_bank]).clip(CLIP)
    frames = range(len(banked.info.timestamps))
    assert len(frames) == 8
    for stride in (4, 8):
        ours, theirs = fresh.read(stride, frames), banked.read(stride, frames)
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        assert ours.tobytes() == theirs.tobytes()
    for name in ("start", "end", "display_size", "patch_grid", "covered"):
        assert getattr(fresh.info, name) == getattr(banked.info, name)
    assert fresh.info.timestamps.tolist() == banked.info.timestamps.tolist()
    assert list(fresh.info.frame_index) == list(banked.info.frame_index)


def test_fresh_and_banked_features_give_the_same_logits(
    fresh: FreshClip, toy_bank: Path, model: VLM
) -> None:
    found = []
    for clip in (fresh, Banks.open([toy_bank]).clip(CLIP)):
        _, batch = batch_of(model, clip, "<video>\nWhen is it?", "from <t:1.0> to <t:2.0>")
        with torch.no_grad():
            found.append(model.logits(model.hidden_states(batch)))
    assert (found[0] - found[1]).abs().max().item() <= 1e-4


def test_a_question_is_answered_in_seconds_and_pixels_as_from_the_bank(
    trained_run: Path,
    toy: Path,
    toy_bank: Path,
    model: VLM,
    capsys: pytest.CaptureFixture[str],
) -> None:
    record = json.loads((toy / "train.jsonl").read_text().splitlines()[0])
    assert record["video"] == CLIP
    asked = [turn["value"].removeprefix("<video>\n") for turn in record["conversations"][::2]]
    span = next(question for question in asked if question.startswith("When"))
    box = next(question for question in asked if question.startswith("Give the box"))
    clip = Banks.open([toy_bank]).clip(CLIP)
    for question, pattern in (
        (span, r"\d\.\d\d s"),
        (box, r"[xy] \d+ px"),
    ):
        main([str(toy / "videos" / CLIP), question, "--model", str(trained_run)])
        said = capsys.readouterr().out.strip()
        assert re.search(pattern, said), said
        chat, batch = batch_of(model, clip, f"<video>\n{question}", prompt=True)
        (pieces,) = generate(model, batch, stop=chat.stop, max_new_tokens=128)
        text = write_answer(model, pieces, clip.info.duration)
        marks = [piece for piece in split_markup(text) if not isinstance(piece, str)]
        for mark, number in zip(marks, re.findall(r"[\d.]+", said), strict=True):
            # toy frames are 64 pixels wide and high
            assert float(number) == pytest.approx(
                mark.value * (1 if mark.axis == 0 else 64), abs=0.51 if mark.axis else 0.0051
            )


def test_answers_are_written_in_seconds_and_pixels() -> None:
    text = "red <t:1.2500> to <t:3.0>, at <x:0.5000><y:0.2500>"
    assert in_pixels(text, (400, 1000)) == "red 1.25 s to 3.00 s, at x 500 px y 100 px"
    assert in_pixels("yes", (400, 1000)) == "yes"


def test_another_tower_is_refused_by_its_digest(
    trained_run: Path, toy: Path, model: VLM, tmp_path: Path, refused: Callable[..., str]
) -> None:
    save_tower(tmp_path / "tower", seed=1)
    video = str(toy / "videos" / CLIP)
    line = refused(
        main, [video, "?", "--model", str(trained_run), "--tower", str(tmp_path / "tower")]
    )
    assert "not the tower that the model was trained on" in line
    assert model.features["tower_digest"][:12] in line
    assert "--tower" in line


def test_another_image_processor_is_refused(
    trained_run: Path, toy: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    shutil.copytree(toy / "tower", tmp_path / "tower")
    path = tmp_path / "tower" / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_mean": [0.4, 0.5, 0.5]}))
    video = str(toy / "videos" / CLIP)
    line = refused(
        main, [video, "?", "--model", str(trained_run), "--tower", str(tmp_path / "tower")]
    )
    assert "its image processor has other values than when the bank was made" in line


def test_a_tower_that_was_moved_is_the_same_tower(
    trained_run: Path, toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(toy / "tower", tmp_path / "moved")
    argv = [str(toy / "videos" / CLIP), "How many objects are there?", "--model", str(trained_run)]
    main(argv)
    there = capsys.readouterr().out
    main([*argv, "--tower", str(tmp_path / "moved")])
    assert capsys.readouterr().out == there


def test_what_cannot_be_asked_is_refused_in_one_line(
    trained_run: Path, toy: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    video, ours = str(toy / "videos" / CLIP), ("--model", str(trained_run))
    assert "nowhere.mp4: no such file" in refused(main, ["nowhere.mp4", "?", *ours])
    assert f"{tmp_path}: no trained model" in refused(main, [video, "?", "--model", str(tmp_path)])
    (tmp_path / "empty.mp4").write_bytes(b"")
    assert "empty.mp4" in refused(main, [str(tmp_path / "empty.mp4"), "?", *ours])
    line = refused(main, [video, "Is this <video> it?", *ours])
    assert "2 <video>/<image> tags for 1 media" in line
    line = refused(main, [video, "?", *ours, "--tower", str(tmp_path / "none")])
    assert str(tmp_path / "none") in line
