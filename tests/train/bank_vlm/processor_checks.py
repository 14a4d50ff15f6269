"""What a processor over a bank gives is what transformers' own gives for the frames in the bank.

Its video processors need torchvision: `test_processor.py` runs these tests where it is.
"""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from shards.errors import UserError
from tests.readmes import python_block
from tests.train.bank_vlm.processors import (
    ASK,
    banked_frames,
    draw_videos,
    model_of,
    processor_of,
    talk,
)
from tests.train.bank_vlm.worlds import MAKE, Worlds, of_another_tower
from train.bank_vlm.processor import bank_processor
from train.bank_vlm.tower import use_bank


@pytest.fixture(scope="module")
def worlds(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Worlds:
    root = tmp_path_factory.mktemp("processors")
    draw_videos(root / "videos", 24, 40)
    return Worlds(root, toy / "llm")


@pytest.mark.parametrize("kind", list(MAKE))
def test_its_inputs_are_those_of_the_plain_one_for_the_frames_in_the_bank(
    worlds: Worlds, kind: str
) -> None:
    world = worlds(kind)
    plain = processor_of(world)
    ours = bank_processor(plain, world.bank, model_config=world.model().config)
    assert type(ours).__name__ == type(plain).__name__
    assert isinstance(ours, type(plain))
    names = ["a.mp4", "b.mp4"]
    pixels, facts = zip(*(banked_frames(world, name) for name in names), strict=True)
    talks = [talk({"type": "video", "video": name}) for name in names]
    texts = [plain.apply_chat_template(own) for own in talks]
    expected = plain(
        text=texts,
        videos=list(pixels),
        video_metadata=list(facts),
        do_sample_frames=False,
        return_tensors="pt",
        padding=True,
    )
    found = ours.apply_chat_template(talks, **ASK)
    # no file is opened: there is none of these names from here
    assert not Path(names[0]).exists()
    assert found.keys() == expected.keys()
    for name in expected.keys() - {"pixel_values_videos"}:
        torch.testing.assert_close(found[name], expected[name], atol=0, rtol=0, msg=name)
    model = use_bank(model_of(world, plain), world.bank)
    with torch.no_grad():
        logits = model(**found).logits
    # a step through pickle, as to a worker that is spawned
    again = pickle.loads(pickle.dumps(ours)).apply_chat_template(talks, **ASK)
    assert torch.equal(again["pixel_values_videos"], found["pixel_values_videos"])
    # and the unchanged model, with its tower, on the pixels: equal to the bank's rounding
    with torch.no_grad():
        theirs = model_of(world, plain)(**expected).logits
    keep = found["attention_mask"].bool()
    off = (logits - theirs)[keep].abs().max()
    assert off < 0.02 * theirs[keep].square().mean().sqrt(), off


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_pictures_and_videos_in_one_talk(worlds: Worlds, kind: str) -> None:
    world = worlds(kind)
    plain = processor_of(world)
    ours = bank_processor(plain, world.bank, model_config=world.model().config)
    media = [{"type": "image", "image": "still.png"}, {"type": "video", "video": "b.mp4"}]
    pixels, facts = banked_frames(world, "b.mp4")
    with Image.open(world.videos / "still.png") as file:
        still = file.convert("RGB")
    expected = plain(
        text=[plain.apply_chat_template(talk(*media))],
        images=[still],
        videos=[pixels],
        video_metadata=[facts],
        do_sample_frames=False,
        return_tensors="pt",
    )
    found = ours.apply_chat_template(talk(*media), **ASK)
    assert found.keys() == expected.keys()
    for name in expected.keys() - {"pixel_values_videos", "pixel_values"}:
        torch.testing.assert_close(found[name], expected[name], atol=0, rtol=0, msg=name)
    with torch.no_grad():
        logits = use_bank(model_of(world, plain), world.bank)(**found).logits
        theirs = model_of(world, plain)(**expected).logits
    assert (logits - theirs).abs().max() < 0.02 * theirs.square().mean().sqrt()


def test_what_it_would_take_otherwise_is_refused(worlds: Worlds) -> None:
    world, llava = worlds("qwen2_5_vl"), worlds("llava_onevision")
    config = world.model().config
    one = talk({"type": "video", "video": "a.mp4"})

    def made(**video: Any) -> Any:
        return bank_processor(processor_of(world, **video), world.bank, model_config=config)

    ask = {"tokenize": True, "return_dict": True}
    with pytest.raises(UserError, match=r"of another size .*got 180 patches of 40x24 pixels"):
        made().apply_chat_template(
            one, processor_kwargs={"size": {"shortest_edge": 4096, "longest_edge": 99999}}, **ask
        )
    gone = talk({"type": "video", "video": "c.mp4"})
    with pytest.raises(
        UserError, match=r"'c.mp4' is not in the bank.*merged --stride 1 --frames 6 "
    ):
        made().apply_chat_template(gone, **ask)
    with pytest.raises(UserError, match="takes names of clips, and got pixels"):
        made()(text=["<|video_pad|>"], videos=[torch.zeros(2, 3, 24, 40)])
    with pytest.raises(UserError, match="must be one of refuse, live"):
        bank_processor(processor_of(world), world.bank, model_config=config, missing="skip")
    with pytest.raises(UserError, match=r"other pixels than the bank was made of: mean: \(0.1,"):
        made(image_mean=[0.1] * 3)
    processor = bank_processor(processor_of(llava), llava.bank, model_config=llava.model().config)
    with pytest.raises(UserError, match="pictures of llava_onevision are cut into crops"):
        processor.apply_chat_template(talk({"type": "image", "image": "still.png"}), **ask)


def test_a_clip_that_is_not_banked_is_made_live_and_counted(worlds: Worlds, tmp_path: Path) -> None:
    world = worlds("qwen2_5_vl")
    settings = {"model_config": world.model().config, "missing": "live"}
    ours = bank_processor(processor_of(world), world.bank, **settings)
    (tmp_path / "moved.mp4").write_bytes((world.videos / "a.mp4").read_bytes())
    banked = ours.apply_chat_template(talk({"type": "video", "video": "a.mp4"}), **ASK)
    assert ours.source.live == 0
    name = str(tmp_path / "moved.mp4")
    fresh = ours.apply_chat_template(talk({"type": "video", "video": name}), **ASK)
    assert ours.source.live == 1
    assert torch.equal(banked["pixel_values_videos"], fresh["pixel_values_videos"])
    assert torch.equal(banked["input_ids"], fresh["input_ids"])


def test_names_may_stand_below_a_folder_and_it_is_saved_as_the_plain_one(
    worlds: Worlds, tmp_path: Path
) -> None:
    world = worlds("qwen2_5_vl")
    plain = processor_of(world)
    settings = {"model_config": world.model().config, "media_dir": "/data/videos"}
    ours = bank_processor(plain, world.bank, **settings)
    one = talk({"type": "video", "video": "/data/videos/a.mp4"})
    assert ours.apply_chat_template(one, **ASK)["video_grid_thw"].tolist() == [[3, 6, 10]]
    for own, where in ((plain, "plain"), (ours, "ours")):
        own.save_pretrained(tmp_path / where)
    for path in (tmp_path / "plain").iterdir():
        same = tmp_path / "ours" / path.name
        if path.suffix == ".json":
            assert json.loads(same.read_text()) == json.loads(path.read_text()), path.name
        else:
            assert same.read_bytes() == path.read_bytes(), path.name


def test_it_is_refused_beside_a_model_that_reads_another_towers_bank(
    worlds: Worlds, tmp_path: Path
) -> None:
    world = worlds("qwen2_5_vl")
    plain = processor_of(world)
    model = use_bank(model_of(world, plain), world.bank)
    other = of_another_tower(world.bank, tmp_path / "other")
    with pytest.raises(UserError, match="banks of different towers"):
        bank_processor(plain, other, model_config=model.config)
    assert bank_processor(plain, world.bank, model_config=model.config)


def test_the_lines_of_the_readme_run(worlds: Worlds, tmp_path: Path) -> None:
    world = worlds("qwen2_5_vl")
    plain = processor_of(world)
    model_of(world, plain).save_pretrained(tmp_path)
    plain.save_pretrained(tmp_path)
    code = python_block("train/README.md", "transformers' own video models")
    names = {"checkpoint": str(tmp_path), "bank": str(world.bank)}
    exec(compile(code, "README.md", "exec"), names)
    one = talk({"type": "video", "video": "a.mp4"})
    inputs = names["processor"].apply_chat_template(one, **ASK)  # type: ignore[attr-defined]
    logits = names["model"](**inputs).logits  # type: ignore[operator]
    assert torch.isfinite(logits).all()
