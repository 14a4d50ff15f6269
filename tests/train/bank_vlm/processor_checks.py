"""What a processor over a bank gives is what transformers' own gives for the frames in the bank.

Its video processors need torchvision: `test_processor.py` runs these tests where it is.
"""

import json
import pickle
from pathlib import Path
from typing import Any

import av
import datasets
import numpy as np
import pytest
import torch
import transformers
from transformers import AutoTokenizer

from preprocess.world import write_video
from shards import Bank
from shards.errors import UserError
from tests.readmes import python_block
from tests.train.bank_vlm.worlds import MAKE, PATCH, World, Worlds
from train.bank_vlm.processor import bank_processor
from train.bank_vlm.tower import use_bank

QWEN = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
LLAVA = ["<image>", "<video>"]
TEMPLATE = """{% for m in messages %}<{{ m.role }}>{% for c in m.content %}\
{% if c.type == 'text' %}{{ c.text }}{% else %}MARK{% endif %}{% endfor %}
{% endfor %}"""
FRAMES, FPS = {"a.mp4": 12, "b.mp4": 9}, 8


@pytest.fixture(scope="module")
def worlds(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Worlds:
    root = tmp_path_factory.mktemp("processors")
    (root / "videos").mkdir()
    for number, (name, frames) in enumerate(FRAMES.items()):
        pixels = np.random.default_rng(number).integers(0, 256, (frames, 24, 40, 3), np.uint8)
        write_video(root / "videos" / name, pixels, FPS)
    from PIL import Image

    Image.fromarray(pixels[0]).save(root / "videos" / "still.png")
    return Worlds(root, toy / "llm")


def processor_of(world: World, **video: Any) -> Any:
    """Return transformers' own processor, with a small tokenizer and template."""
    tokenizer = AutoTokenizer.from_pretrained(world.folder)
    merged = world.kind.startswith("qwen")
    tokenizer.add_special_tokens({"additional_special_tokens": QWEN if merged else LLAVA})
    mark = "<|vision_start|>{{ '<|' + c.type + '_pad|>' }}<|vision_end|>"
    template = TEMPLATE.replace("MARK", mark if merged else "{{ '<' + c.type + '>' }}")
    parts: dict[str, Any] = {"tokenizer": tokenizer, "chat_template": template}
    size = {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}
    side = {"height": 6 * PATCH, "width": 6 * PATCH}
    if merged:
        parts["image_processor"] = transformers.Qwen2VLImageProcessor(patch_size=PATCH, size=size)
        video_processor = transformers.Qwen2VLVideoProcessor(patch_size=PATCH, size=size, **video)
        made = {"qwen2_vl": "Qwen2VLProcessor", "qwen2_5_vl": "Qwen2_5_VLProcessor"}.get(world.kind)
        if world.kind == "qwen3_vl":  # its limits are of all frames together
            made, size = "Qwen3VLProcessor", {"shortest_edge": 256, "longest_edge": 6 * 64 * 64}
            mean = {"image_mean": [0.48145466, 0.4578275, 0.40821073]}
            mean["image_std"] = [0.26862954, 0.26130258, 0.27577711]
            video_processor = transformers.Qwen3VLVideoProcessor(
                patch_size=PATCH, size=size, do_sample_frames=False, **(mean | video)
            )
    elif world.kind == "llava_onevision":
        parts["image_processor"] = transformers.LlavaOnevisionImageProcessor(size=side)
        half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # as in its published checkpoints
        video_processor = transformers.LlavaOnevisionVideoProcessor(size=side, **(half | video))
        parts |= {"num_image_tokens": 36, "vision_feature_select_strategy": "full"}
        made = "LlavaOnevisionProcessor"
    else:
        parts["image_processor"] = transformers.LlavaNextImageProcessor(size=side, crop_size=side)
        video_processor = transformers.LlavaNextVideoVideoProcessor(
            size=side, crop_size=side, **video
        )
        parts |= {"patch_size": PATCH, "vision_feature_select_strategy": "default"}
        made = "LlavaNextVideoProcessor"
    return getattr(transformers, made)(video_processor=video_processor, **parts)


def model_of(world: World, processor: Any) -> Any:
    """Return the checkpoint's model, which knows the tokenizer's placeholders."""
    model = world.model()
    names = {"image_token_id": "image", "video_token_id": "video"}
    for field, kind in names.items():
        setattr(model.config, field, getattr(processor, f"{kind}_token_id"))
    return model


def banked_frames(world: World, name: str) -> tuple[torch.Tensor, dict[str, Any]]:
    """Return the pixels of the frames in the bank, `(frames, 3, height, width)`, and their facts."""
    bank = Bank.open(world.bank)
    row = bank.row(name)
    begin, end = bank.columns["frame_index_offsets"][row : row + 2].tolist()
    index = bank.columns["frame_index"][begin:end].tolist()
    with av.open(str(world.videos / name)) as file:
        frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    assert len(frames) == FRAMES[name]
    pixels = torch.from_numpy(np.stack([frames[k] for k in index])).permute(0, 3, 1, 2)
    facts = {"total_num_frames": len(frames), "fps": FPS, "frames_indices": index}
    return pixels, facts


def talk(*media: dict[str, str]) -> list[dict[str, Any]]:
    question = [*media, {"type": "text", "text": "When is it seen?"}]
    answer = [{"type": "text", "text": "from 1.5 to 2"}]
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


ASK = {
    "tokenize": True,
    "return_dict": True,
    "processor_kwargs": {"return_tensors": "pt", "padding": True},
}


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
    from PIL import Image

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
    with pytest.raises(UserError, match=r"expected 12 of them, got 6 frames, sampled by .*--fps 8"):
        made(do_sample_frames=True, fps=8).apply_chat_template(one, **ask)
    made(do_sample_frames=True, fps=4).apply_chat_template(one, **ask)
    with pytest.raises(UserError, match="another number of frames"):
        made().apply_chat_template(
            one, processor_kwargs={"do_sample_frames": True, "num_frames": 4}, **ask
        )
    with pytest.raises(UserError, match=r"of another size .*got 180 patches of 40x24 pixels"):
        made().apply_chat_template(
            one, processor_kwargs={"size": {"shortest_edge": 4096, "longest_edge": 99999}}, **ask
        )
    gone = talk({"type": "video", "video": "c.mp4"})
    with pytest.raises(UserError, match=r"'c.mp4' is not in the bank.*--layer merged --stride 1"):
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


@pytest.mark.parametrize("package", ["transformers", "trl"])
@pytest.mark.parametrize("kind", ["qwen2_5_vl", "llava_onevision"])
def test_a_trainer_trains_from_the_bank(
    worlds: Worlds,
    kind: str,
    package: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three steps, a checkpoint and its resumption: losses and weights of training with the tower."""
    world = worlds(kind)
    plain = processor_of(world)
    opened: list[str] = []
    clips = [{"type": "video", "video": name} for name in FRAMES]
    rows = [{"talk": json.dumps(talk(clips[k % 2]))} for k in range(6)]
    made: dict[str, Any] = {"arguments": transformers.TrainingArguments, "more": {}}
    made["trainer"] = transformers.Trainer
    if package == "trl":
        import trl

        made = {"arguments": trl.SFTConfig, "trainer": trl.SFTTrainer}
        made["more"] = {"dataset_kwargs": {"skip_prepare_dataset": True}}

    def collate_banked(rows: list[Any]) -> Any:
        talks = [json.loads(row["talk"]) for row in rows]
        inputs = ours.apply_chat_template(talks, **ASK)
        inputs["labels"] = inputs["input_ids"].clone()
        return inputs

    def collate_live(rows: list[Any]) -> Any:
        talks = [json.loads(row["talk"]) for row in rows]
        names = [own[0]["content"][0]["video"] for own in talks]
        pixels, facts = zip(*(banked_frames(world, name) for name in names), strict=True)
        opened.extend(names)
        inputs = plain(
            text=[plain.apply_chat_template(own) for own in talks],
            videos=list(pixels),
            video_metadata=list(facts),
            do_sample_frames=False,
            return_tensors="pt",
            padding=True,
        )
        inputs["labels"] = inputs["input_ids"].clone()
        return inputs

    def run(model: Any, collate: Any, folder: Path, steps: int = 3, resume: bool = False) -> Any:
        arguments = made["arguments"](
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_steps=2,
            report_to="none",
            remove_unused_columns=False,
            disable_tqdm=True,
            use_cpu=True,
            **made["more"],
        )
        trainer = made["trainer"](
            model=model,
            args=arguments,
            train_dataset=datasets.Dataset.from_list(rows),
            data_collator=collate,
            processing_class=plain,
        )
        trainer.train(resume_from_checkpoint=resume)
        return [line["loss"] for line in trainer.state.log_history if "loss" in line]

    live = model_of(world, plain)
    tower = live.model.visual if kind.startswith("qwen") else live.model.vision_tower
    tower.requires_grad_(False)
    expected = run(live, collate_live, tmp_path / "live")
    assert opened

    # from here on no video may be opened
    def refused(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a video was opened")

    monkeypatch.setattr(av, "open", refused)
    ours = bank_processor(plain, world.bank, model_config=world.model().config)
    banked = use_bank(model_of(world, plain), world.bank)
    assert not any(
        ".visual." in name or ".vision_tower." in name for name, _ in banked.named_parameters()
    )
    losses = run(banked, collate_banked, tmp_path / "banked")
    np.testing.assert_allclose(losses, expected, rtol=5e-3)
    again = use_bank(model_of(world, plain), world.bank)
    rest = run(again, collate_banked, tmp_path / "banked", resume=True)
    assert rest[-1] == pytest.approx(losses[-1], rel=1e-5)
    saved = type(live).from_pretrained(tmp_path / "banked" / "checkpoint-3")
    fresh = dict(world.model().named_parameters())
    for name, weight in saved.named_parameters():
        if ".visual." in name or ".vision_tower." in name:
            assert torch.equal(weight, fresh[name]), name


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
