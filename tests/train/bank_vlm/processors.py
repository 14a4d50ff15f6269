"""transformers' own processors of the tiny checkpoints, and videos, talks and pixels for them."""

from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import transformers
from PIL import Image
from transformers import AutoTokenizer

from preprocess.world import write_video
from shards import Bank
from tests.train.bank_vlm.worlds import PATCH, World

QWEN = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
LLAVA = ["<image>", "<video>"]
TEMPLATE = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% for c in m.content %}\
{% if c.type == 'text' %}{{ c.text }}{% else %}MARK{% endif %}{% endfor %}{{ '<|im_end|>\\n' }}\
{% endfor %}"""
FRAMES, FPS = {"a.mp4": 12, "b.mp4": 9}, 8


def draw_videos(folder: Path, height: int, width: int) -> None:
    """Write noise of two lengths, and a picture."""
    folder.mkdir()
    for number, (name, frames) in enumerate(FRAMES.items()):
        noise = np.random.default_rng(number)
        pixels = noise.integers(0, 256, (frames, height, width, 3), np.uint8)
        write_video(folder / name, pixels, FPS)
    Image.fromarray(pixels[0]).save(folder / "still.png")


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
                patch_size=PATCH, size=size, **({"do_sample_frames": False} | mean | video)
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
