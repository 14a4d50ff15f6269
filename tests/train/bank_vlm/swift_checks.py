"""Three steps of ms-swift from a bank are three steps with the tower, whose features are rounded alike.

Its own reader sees videos as lists of pictures; `test_registry.py` runs this where ms-swift is.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import qwen_vl_utils.vision_process as reading
import torch
import transformers
from swift.pipelines import sft_main
from swift.template.templates.qwen import Qwen2VLTemplate

from preprocess.encode.run import EncodeOptions, encode
from shards.errors import UserError
from shards.format.features import Sampling
from tests.train.bank_vlm.processors import QWEN, TEMPLATE
from tests.train.bank_vlm.worlds import IDS, MAKE
from train.bank_vlm.kinds import layer_of

ROOT = Path(__file__).resolve().parents[3]
FRAMES, STEPS = {"a": 6, "b": 4}, 3
PATCHES = {"qwen2_vl": 14, "qwen2_5_vl": 14, "qwen3_vl": 16}
"""Of a side, as swift's reader has them."""


def checkpoint(folder: Path, kind: str, tokenizer: Path) -> Path:
    """Save a tiny model whose patches are those of the published ones, and its processor."""
    patch = PATCHES[kind]
    config = MAKE[kind]().config
    config.vision_config.patch_size = patch
    if kind == "qwen2_5_vl":
        config.vision_config.window_size = 4 * patch
    words = transformers.AutoTokenizer.from_pretrained(tokenizer)
    words.add_special_tokens({"additional_special_tokens": QWEN})
    names = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    for name, token in zip(IDS, words.convert_tokens_to_ids(list(names)), strict=True):
        setattr(config, name, token)
    torch.manual_seed(0)
    model = type(MAKE[kind]())(config)
    for weight in model.model.visual.parameters():
        weight.data.normal_(std=0.1)
    model.save_pretrained(folder)
    size = {"shortest_edge": 16 * 16, "longest_edge": 6 * 256 * 256}
    norm = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    video = "Qwen3VLVideoProcessor" if kind == "qwen3_vl" else "Qwen2VLVideoProcessor"
    made = {"qwen2_vl": "Qwen2VLProcessor", "qwen2_5_vl": "Qwen2_5_VLProcessor"}
    getattr(transformers, made.get(kind, "Qwen3VLProcessor"))(
        image_processor=transformers.Qwen2VLImageProcessor(patch_size=patch, size=size, **norm),
        video_processor=getattr(transformers, video)(patch_size=patch, size=size, **norm),
        tokenizer=words,
        chat_template=TEMPLATE.replace("MARK", ""),
    ).save_pretrained(folder)
    transformers.Qwen2VLImageProcessorPil(
        patch_size=patch, min_pixels=16 * 16, max_pixels=256 * 256, **norm
    ).save_pretrained(folder)
    return folder


def draw(folder: Path, sides: tuple[int, int]) -> None:
    for number, (name, count) in enumerate(FRAMES.items()):
        (folder / name).mkdir(parents=True)
        noise = np.random.default_rng(number)
        for k in range(count):
            pixels = noise.integers(0, 256, (*sides, 3), np.uint8)
            PIL.Image.fromarray(pixels).save(folder / name / f"{k:03}.png")


def rows(path: Path, videos: dict[str, Any]) -> str:
    """Write records in swift's form."""
    messages = [
        {"role": "user", "content": "<video>When is it?"},
        {"role": "assistant", "content": "from 1.5 to 2"},
    ]
    lines = [{"messages": messages, "videos": [videos[name]]} for name in [*FRAMES] * STEPS]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def train(folder: Path, kind: str, records: str, out: Path, *more: str) -> list[float]:
    settings = {
        "model": folder, "model_type": kind, "template": kind, "dataset": records,
        "output_dir": out, "tuner_type": "full",
        "torch_dtype": "float32", "max_steps": STEPS, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1, "learning_rate": 0.1, "optim": "sgd",
        "lr_scheduler_type": "constant", "warmup_ratio": 0, "logging_steps": 1, "save_steps": STEPS,
        "report_to": "none", "freeze_vit": "true", "freeze_aligner": "true",
        "gradient_checkpointing": "false", "dataset_num_proc": 1, "dataloader_num_workers": 0,
        "dataset_shuffle": "false", "train_dataloader_shuffle": "false", "add_version": "false",
        "split_dataset_ratio": 0, "max_length": 2048, "strict": "true",
        "use_hf": "true", "attn_impl": "sdpa", "max_grad_norm": 1e9,
    }  # fmt: skip
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    done = sft_main([*words, *more])
    return [line["loss"] for line in done["log_history"] if "loss" in line]


@pytest.mark.parametrize("kind", list(PATCHES))
def test_swift_trains_from_the_bank(
    kind: str, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint(tmp_path / "model", kind, toy / "llm")
    factor = 2 * PATCHES[kind]
    draw(tmp_path / "videos", (4 * factor, 6 * factor))  # a size that swift's reader leaves alone
    options = EncodeOptions(
        tower=str(folder), strides=(1,), sampling=Sampling(num_frames=64),
        layer=layer_of(MAKE[kind]().config.to_dict()),
    )  # fmt: skip
    summary = encode([str(tmp_path / "videos")], tmp_path / "bank", options)
    assert (summary.clips, summary.failures) == (2, [])
    pictures = {
        name: [str(tmp_path / "videos" / name / f"{k:03}.png") for k in range(count)]
        for name, count in FRAMES.items()
    }
    words = transformers.AutoTokenizer.from_pretrained(folder)
    tower = transformers.AutoModelForImageTextToText.from_pretrained(folder).model.visual
    run = type(tower).forward

    def rounded(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = run(self, *args, **kwargs)
        out["pooler_output"] = out["pooler_output"].half().float()
        if out.get("deepstack_features") is not None:
            out["deepstack_features"] = [one.half().float() for one in out["deepstack_features"]]
        return out

    with monkeypatch.context() as patch:
        patch.setattr(type(tower), "forward", rounded)
        patch.setattr(reading, "VIDEO_MIN_TOKEN_NUM", 4)  # small enough for these frames
        patch.setenv("VIDEO_MIN_TOKEN_NUM", "4")
        for media in ("image", "video"):
            token = words.convert_tokens_to_ids(f"<|{media}_pad|>")
            patch.setattr(Qwen2VLTemplate, f"{media}_token_id", token)
        expected = train(folder, kind, rows(tmp_path / "live.jsonl", pictures), tmp_path / "live")
    os.environ.pop("VIDEO_MIN_TOKEN_NUM", None)

    def refused(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a picture was opened, or the tower ran")

    monkeypatch.setattr(PIL.Image, "open", refused)
    monkeypatch.setattr(type(tower), "forward", refused)
    plug = ["--external_plugins", str(ROOT / "train" / "recipes" / "swift_bank.py")]
    named = ["--model_kwargs", json.dumps({"framebank": str(tmp_path / "bank")})]
    records = rows(tmp_path / "banked.jsonl", {name: name for name in FRAMES})
    losses = train(folder, kind, records, tmp_path / "out", *plug, *named)
    assert len(set(losses)) == STEPS
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    monkeypatch.undo()
    saved = type(MAKE[kind]()).from_pretrained(tmp_path / "out" / f"checkpoint-{STEPS}")
    for name, value in saved.model.visual.state_dict().items():
        assert torch.equal(value, tower.state_dict()[name]), name
    monkeypatch.setenv("VIDEO_MAX_PIXELS", "50176")
    with pytest.raises(
        UserError, match="frames and their size are those of the bank, got VIDEO_MAX"
    ):
        train(folder, kind, records, tmp_path / "refused", *plug, *named)
