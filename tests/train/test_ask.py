"""Questions about raw videos: the same features, the same logits, the same answers as from a bank."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

from model.generate import generate, write_answer
from model.vlm import VLM
from preprocess.decode.decode_child import DecodeChild
from preprocess.decode.request import ReadRequest
from preprocess.show.answer import BAR, BELOW, TRUE
from preprocess.show.picture import Layout
from preprocess.toy_models import save_tower
from shards.errors import UserError
from shards.format.features import FeatureConfig, Sampling
from shards.read.banks import Banks
from shards.read.timeline import SplicedClip, Stretch, parts_of, splice
from train.ask import (
    Answerer,
    FreshClip,
    ask_banked,
    asked,
    banked,
    fresh_clip,
    load_tower,
    main,
    size_of,
    tower_places,
)
from train.batches.chat import Chat
from train.batches.collate import collate, lay_out
from train.data.markup import split_markup
from train.data.records import Turn
from train.scores.pointed import in_pixels
from train.shown import find_truth

CLIP = "train/clip-00000.mp4"


@pytest.fixture(scope="module")
def model(trained_run: Path) -> VLM:
    return VLM.load(trained_run).eval()


@pytest.fixture(scope="module")
def fresh(toy: Path, model: VLM) -> FreshClip:
    features = FeatureConfig.from_json(model.features)
    tower = load_tower(features, [str(toy / "tower")])
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
    questions = [turn["value"].removeprefix("<video>\n") for turn in record["conversations"][::2]]
    span = next(question for question in questions if question.startswith("When"))
    box = next(question for question in questions if question.startswith("Give the box"))
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


def test_a_banked_clip_is_asked_by_its_id_and_answers_as_the_raw_video(
    trained_run: Path,
    toy: Path,
    toy_bank: Path,
    capsys: pytest.CaptureFixture[str],
    refused: Callable[..., str],
) -> None:
    model = ["--model", str(trained_run)]
    for question in ("When is the red circle visible?", "How many objects are there?"):
        main([str(toy / "videos" / CLIP), question, *model])
        raw = capsys.readouterr().out
        main([CLIP, question, *model, "--bank", str(toy_bank)])
        assert capsys.readouterr().out == raw
    banked = [*model, "--bank", str(toy_bank)]
    line = refused(main, ["clip-00000.mp4", "?", *banked])
    assert "the clip 'clip-00000.mp4' is in no bank; did you mean " in line
    assert CLIP in line
    line = refused(main, [CLIP, "?", *banked, "--tower", "x"])
    assert "--tower: a banked clip needs no tower" in line
    assert "--max_new_tokens: must be at least 1, got 0" in refused(
        main, [CLIP, "?", *banked, "--max_new_tokens", "0"]
    )


def test_a_question_has_the_frames_that_training_had_room_for(
    trained_run: Path, toy_bank: Path, tmp_path: Path
) -> None:
    clip = Banks.open([toy_bank]).clip(CLIP)
    turns = asked("When is the red circle visible?", clip.info)
    frames = {}
    for limit in (0, 30, 5):
        run = tmp_path / str(limit)
        shutil.copytree(trained_run, run, ignore=shutil.ignore_patterns("checkpoint-*"))
        facts = json.loads((run / "run.json").read_text())
        facts["config"]["max_tokens"] = limit
        (run / "run.json").write_text(json.dumps(facts))
        answerer = Answerer.load(run)
        row = answerer.row([clip.info], turns)
        frames[limit] = len(row.frames)
        assert not limit or len(row) <= limit or len(row.frames) == 1
    assert frames[0] == 6
    assert 1 < frames[30] < 6
    assert frames[5] == 1


def test_answers_are_written_in_seconds_and_pixels() -> None:
    text = "red <t:1.2500> to <t:3.0>, at <x:0.5000><y:0.2500>"
    assert in_pixels(text, (400, 1000)) == "red 1.25 s to 3.00 s, at x 500 px y 100 px"
    assert in_pixels("yes", (400, 1000)) == "yes"
    assert in_pixels(text, None) == "red 1.25 s to 3.00 s, at x 50 % y 25 %"


def test_a_timeline_of_clips_of_several_sizes_has_no_pixels(
    make_clip: Callable[..., FreshClip],
) -> None:
    """Those of its first part would be a place beside the right one in the others."""
    wide, tall, also_wide = (
        replace(clip, info=replace(clip.info, display_size=size))
        for clip, size in ((make_clip(), size) for size in ((360, 640), (640, 360), (360, 640)))
    )

    def joined(*clips: FreshClip) -> SplicedClip:
        whole = [Stretch(None, 0, len(c.info.timestamps), 0.0, c.info.duration) for c in clips]  # type: ignore[arg-type]
        return splice(clips, whole)

    assert size_of(wide) == size_of(joined(wide, also_wide)) == (360, 640)
    assert size_of(joined(wide, tall)) is None


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


OUTSIDE = [
    (
        "What is at <t:99>?",
        "time 99 is outside [0, LAST]; times are seconds of the clip, which lasts",
    ),
    ("What is at <t:120%>?", "time 6.9 is outside [0, LAST]"),
    ("What is at <x:1.2><y:0.5>?", "coordinate 1.2 is outside [0, 1]"),
    ("What is at <t:-1>?", "time -1 is outside [0, LAST]"),
]


def test_a_time_or_a_place_that_the_clip_does_not_have_is_refused(
    trained_run: Path, toy: Path, fresh: FreshClip, refused: Callable[..., str]
) -> None:
    last = f"{fresh.info.duration:g}"
    for question, expected in OUTSIDE:
        with pytest.raises(UserError) as caught:
            asked(question, fresh.info)
        (line,) = caught.value.problems
        assert expected.replace("LAST", last) in line
    argv = [str(toy / "videos" / CLIP), OUTSIDE[0][0], "--model", str(trained_run)]
    assert OUTSIDE[0][1].replace("LAST", last) in refused(main, argv)


def test_a_share_of_the_clip_is_asked_in_seconds_of_it(fresh: FreshClip) -> None:
    half = f"What is at <t:{fresh.info.duration / 2:.6f}>?"
    assert asked("What is at <t:50%>?", fresh.info) == asked(half, fresh.info)


def test_the_tower_is_found_from_any_working_directory(
    trained_run: Path, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a run and a bank know it that were made in a project's folder, asked from elsewhere."""
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    (project / "runs" / "a" / "checkpoint-4").mkdir(parents=True)
    (project / "demo").mkdir()
    elsewhere.mkdir()
    shutil.copytree(toy / "tower", project / "demo" / "tower")
    monkeypatch.chdir(elsewhere)
    there = str(project / "demo" / "tower")
    for folder in ("runs/a", "runs/a/checkpoint-4"):
        assert tower_places("demo/tower", project / folder) == [there]
    # a run that lies elsewhere knows its bank, by a path from where it began or an absolute one
    (project / "demo" / "bank").mkdir()
    for number, bank in enumerate(("../project/demo/bank", str(project / "demo" / "bank"))):
        run = elsewhere / f"run{number}"
        run.mkdir()
        (run / "run.json").write_text(json.dumps({"config": {"bank": [bank]}}))
        assert tower_places("demo/tower", run) == [there]
    assert tower_places("google/siglip", project / "runs" / "a") == ["google/siglip"]
    assert tower_places("/none/tower", project / "runs" / "a") == ["/none/tower"]
    monkeypatch.chdir(project)
    assert tower_places("demo/tower", elsewhere) == ["demo/tower"]


def test_a_moved_projects_model_answers_from_another_directory(
    trained_run: Path,
    toy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = [str(toy / "videos" / CLIP), "How many objects are there?", "--model"]
    main([*argv, str(trained_run)])
    said = capsys.readouterr().out
    shutil.copytree(
        trained_run, tmp_path / "p" / "runs" / "a", ignore=shutil.ignore_patterns("c*-*")
    )
    shutil.copytree(toy / "tower", tmp_path / "p" / "demo" / "tower")
    config = tmp_path / "p" / "runs" / "a" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tower": "demo/tower"}))
    monkeypatch.chdir(tmp_path)
    main([*argv, str(tmp_path / "p" / "runs" / "a")])
    assert capsys.readouterr().out == said


def test_a_tower_is_known_by_its_digest_wherever_it_was_moved_to(
    toy: Path, toy_bank: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of the same name lies nearer; the whole path of the right one is that of another machine."""
    features = Banks.open([str(toy_bank)]).config
    (tmp_path / "moved" / "run").mkdir(parents=True)
    save_tower(tmp_path / "moved" / "tower", seed=1)
    (tmp_path / "moved" / "models").mkdir()
    shutil.copytree(toy / "tower", tmp_path / "moved" / "models" / "tower")
    run, there = tmp_path / "moved" / "run", "/elsewhere/models/tower"
    places = tower_places(there, run)
    assert places == [str(tmp_path / "moved" / name) for name in ("models/tower", "tower")]
    assert load_tower(features, places[::-1]).name == places[0]
    monkeypatch.chdir(tmp_path / "moved")
    assert (
        load_tower(features, tower_places("tower", tmp_path / "moved" / "models" / "a")).name
        == (places[0])
    )
    with pytest.raises(UserError, match="not the tower that the model was trained on"):
        load_tower(features, tower_places("tower", run))


def test_the_answer_is_drawn_over_the_frames_and_the_true_one_with_it(
    trained_run: Path, toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = json.loads((toy / "test.jsonl").read_text().splitlines()[0])
    question = record["conversations"][0]["value"].removeprefix("<video>\n")
    truth = record["conversations"][1]["value"]
    video = str(toy / "videos" / record["video"])
    argv = [video, question, "--model", str(trained_run)]
    main(argv)
    said = capsys.readouterr().out
    drawn = {}
    for name, given in (("file", str(toy / "test.jsonl")), ("text", truth), ("none", "")):
        out = tmp_path / f"{name}.png"
        main([*argv, "--show", str(out), *(["--truth", given] if given else [])])
        assert capsys.readouterr().out == f"{said}{out}\n"
        drawn[name] = np.asarray(Image.open(out))
    assert (drawn["file"] == drawn["text"]).all()
    start, end = (float(value) for value in re.findall(r"<t:([\d.]+)>", truth))
    green = (drawn["file"] == ImageColor.getrgb(TRUE)).all(-1)
    assert not (drawn["none"] == ImageColor.getrgb(TRUE)).all(-1).any()
    # 8 frames of a clip side by side: the line under them is its time, each share to its own scale
    layout = Layout.of(8, 1, 64, 64)
    clip = json.loads((toy / "world.json").read_text())["clips"]
    duration = next(c["duration"] for c in clip if c["video"] == record["video"])
    with DecodeChild() as child:
        read = child.read_clip(ReadRequest(Path(video), Sampling(num_frames=8)))
    edges = [0.0, *read.timestamps.tolist()[1:], duration]
    for k, (first, last) in enumerate(pairwise(edges)):
        x, y = layout.place(k, 0)
        row = y + layout.tile[1] + BELOW + BAR + BELOW + BAR // 2
        share = green[row, x : x + layout.tile[0]].mean()
        expected = max(0.0, min(end, last) - max(start, first)) / (last - first)
        assert share == pytest.approx(expected, abs=0.02)


def test_what_cannot_be_drawn_is_refused_before_the_model_is_asked(
    toy: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    argv = [str(toy / "videos" / CLIP), "When is the sun visible?", "--model", str(tmp_path / "no")]
    shown = ["--show", str(tmp_path / "a.png")]
    for words, expected in (
        (["--truth", "from <t:1> to <t:2>"], "--truth is drawn, and nothing is; name a picture"),
        (["--show", str(tmp_path / "no" / "a.png")], f"make {tmp_path}/no"),
        (
            [*shown, "--bank", str(tmp_path)],
            "--show: frames can be drawn of a file only; leave out --bank",
        ),
        (["--show", str(tmp_path / "a.txt")], "--show: no format of pictures, expected a .png"),
        ([*shown, "--truth", "test.jsonl"], "--truth: no such file, and no answer with times"),
        ([*shown, "--truth", str(toy / "test.jsonl")], "no answers to this question about this"),
    ):
        assert expected in refused(main, [*argv, *words])


def test_a_true_answer_outside_the_clip_is_refused(
    trained_run: Path, toy: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    argv = [str(toy / "videos" / CLIP), "When?", "--model", str(trained_run)]
    line = refused(main, [*argv, "--show", str(tmp_path / "a.png"), "--truth", "<t:1> to <t:99>"])
    assert "time 99 is outside" in line


def test_what_cannot_be_asked_is_refused_in_one_line(
    trained_run: Path, toy: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    video, ours = str(toy / "videos" / CLIP), ("--model", str(trained_run))
    # before a model is looked for: loading one takes far longer
    assert "nowhere.mp4: no such file" in refused(main, ["nowhere.mp4", "?", "--model", "none"])
    (tmp_path / "folder").mkdir()
    assert "without pictures; name a video" in refused(main, [str(tmp_path / "folder"), "?", *ours])
    assert f"{tmp_path}: no trained model" in refused(main, [video, "?", "--model", str(tmp_path)])
    (tmp_path / "empty.mp4").write_bytes(b"")
    assert "empty.mp4" in refused(main, [str(tmp_path / "empty.mp4"), "?", *ours])
    line = refused(main, [video, "Is this <video> it?", *ours])
    assert "2 <video>/<image> tags for 1 media" in line
    line = refused(main, [video, "?", *ours, "--tower", str(tmp_path / "none")])
    assert str(tmp_path / "none") in line


def test_a_bracket_may_begin_the_name_of_a_banked_clip(
    make_bank: Callable[..., Path], tmp_path: Path
) -> None:
    cells = {4: np.zeros((2, 2, 2, 64), np.float16), 8: np.zeros((2, 1, 1, 64), np.float16)}
    folder = make_bank(tmp_path / "bank", {"[a].mp4": cells})
    assert banked("[a].mp4", Banks.open([folder])).info.id == "[a].mp4"


def test_a_banked_timeline_is_asked_as_it_is_trained_on(trained_run: Path, toy_bank: Path) -> None:
    banks = Banks.open([toy_bank])
    first, second = banks.banks[0].ids[0], banks.banks[0].ids[1]
    whole = banked(first, banks)
    assert whole.info.id == first
    parts = [{"video": first, "start": 1}, {"video": second, "end": 2}]
    medium = banked(json.dumps(parts), banks)
    assert medium.info.duration == pytest.approx(whole.info.duration - 1 + 2)
    (one, two) = parts_of([medium])
    assert (one.info.id, two.info.id) == (first, second)
    end = medium.info.duration
    question = f"What is seen at <t:{end - 0.1:.1f}>?"
    assert ask_banked(json.dumps(parts), question, trained_run, [str(toy_bank)], 8)
    with pytest.raises(UserError, match=f"which lasts {end:.2f}"):
        ask_banked(json.dumps(parts), f"And at <t:{end + 2}>?", trained_run, [str(toy_bank)], 8)
    with pytest.raises(UserError, match=r"the clip 'x\.mp4' is in no bank"):
        banked('[{"video": "x.mp4"}]', banks)


OF_THIS_VIDEO: dict[str, tuple[dict[str, Any], bool]] = {
    "its own": ({"video": "a/clip.mp4"}, True),
    "a later question": ({"video": "a/clip.mp4", "later": True}, True),
    "a timeline": ({"timeline": [{"video": "a/clip.mp4", "start": 3, "end": 4}]}, False),
    "two videos": ({"video": ["b.mp4", "a/clip.mp4"]}, False),
    "a part": ({"video": "a/clip.mp4", "start": 1, "end": 4}, False),
    "another video": ({"video": "a/other-clip.mp4"}, False),
}
"""Of other media the times of an answer are others."""


@pytest.mark.parametrize("kind", OF_THIS_VIDEO)
def test_the_truth_is_an_answer_about_this_video_alone(tmp_path: Path, kind: str) -> None:
    row, known = OF_THIS_VIDEO[kind]
    row = dict(row)
    tags = "<video>\n" * len(row["video"] if isinstance(row.get("video"), list) else [0])
    asked = [("How many?", "2")] * bool(row.pop("later", False)) + [("When?", "<t:1> to <t:2>")]
    texts = [text for pair in asked for text in pair]
    texts[0] = tags + texts[0]
    says = [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(texts)]
    path = tmp_path / "records.json"
    path.write_text(json.dumps([row | {"id": "r", "conversations": says}]))
    video = tmp_path / "a" / "clip.mp4"
    if known:
        assert find_truth(str(path), video, "When?") == "<t:1> to <t:2>"
    else:
        with pytest.raises(UserError, match="no answers to this question about this video"):
            find_truth(str(path), video, "When?")
