"""A processor over a bank takes a clip whose frames are those that it would sample, and refuses others.

`test_registry.py` runs these tests where torchvision is, which transformers' video processors need.
"""

import re
import shlex
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import (
    LlavaNextVideoVideoProcessor,
    LlavaOnevisionVideoProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLVideoProcessor,
)
from transformers.video_utils import VideoMetadata

from model.tower.frames import processor_frames
from preprocess.cli.main import main
from preprocess.world import write_video
from shards import Bank
from shards.errors import UserError
from tests.train.bank_vlm.processors import ASK, processor_of, talk
from tests.train.bank_vlm.worlds import World, Worlds
from train.bank_vlm.processor import bank_processor

PROCESSORS: dict[str, Any] = {
    "qwen2_vl": Qwen2VLVideoProcessor(),
    "qwen3_vl": Qwen3VLVideoProcessor(),
    "llava": LlavaOnevisionVideoProcessor(),
    "llava next": LlavaNextVideoVideoProcessor(),
}
FRAMES = {"long.mp4": 47, "short.mp4": 13}
FPS = 12


@pytest.mark.parametrize("name", PROCESSORS)
@given(
    total=st.integers(1, 20_000),
    rate=st.sampled_from([25.0, 30000 / 1001, 24.0, 59.94, 1.0, 12.5, 10.01, 2.0]),
    fps=st.none() | st.sampled_from([1, 2, 0.5, 4.0, 1.5, 29.97]),
    count=st.integers(1, 80),
    most=st.integers(4, 768),
)
def test_the_frames_are_those_of_transformers_own_processor(
    name: str, total: int, rate: float, fps: float | None, count: int, most: int
) -> None:
    processor = PROCESSORS[name]
    metadata = VideoMetadata(total_num_frames=total, fps=rate)
    settings: dict[str, Any] = {"num_frames": count} if fps is None else {"fps": fps}
    if fps is not None and name == "qwen2_vl":
        settings["max_frames"] = most
    if name == "qwen3_vl":
        processor.max_frames = most
        processor.fps = fps
        assume(fps is not None or count <= total)  # else it takes frames twice, which no bank holds
    try:
        expected = [int(k) for k in processor.sample_frames(metadata=metadata, **settings)]
    except (ValueError, ZeroDivisionError):
        return  # it has no answer: fewer frames than it wants
    expected = [k for k in expected if k < total]  # it names one more at some lengths of Qwen2-VL's
    limit = most if name.startswith("qwen") else None
    found = processor_frames(
        name.split()[0], total, rate, count if fps is None else None, fps, limit
    )
    assert found == expected


@pytest.fixture(scope="module")
def worlds(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Worlds:
    root = tmp_path_factory.mktemp("frames")
    (root / "videos").mkdir()
    for number, (name, frames) in enumerate(FRAMES.items()):
        noise = np.random.default_rng(number)
        pixels = noise.integers(0, 256, (frames, 24, 24, 3), np.uint8)
        write_video(root / "videos" / name, pixels, FPS)
    from PIL import Image

    Image.fromarray(pixels[0]).save(root / "videos" / "still.png")
    return Worlds(root, toy / "llm")


WAYS: list[tuple[str, dict[str, Any]]] = [
    ("qwen2_vl", {"fps": 2}),
    ("qwen2_5_vl", {"fps": 5.0, "max_frames": 12}),
    ("qwen2_5_vl", {"num_frames": 10}),
    ("qwen3_vl", {"fps": 2}),
    ("qwen3_vl", {"fps": 5}),
    ("llava_onevision", {"num_frames": 8}),
    ("llava_next_video", {"fps": 3}),
]


def encode_as_told(world: World, told: str, out: Path) -> None:
    """Run the command of a refusal, on the videos of the world."""
    words = shlex.split(re.search(r"preprocess (encode .*? --out ANOTHER)", told)[1])  # type: ignore[index]
    at = words.index("VIDEOS")
    words[at : at + 1] = [str(world.videos / name) for name in FRAMES]
    words[words.index("ANOTHER")] = str(out)
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(("kind", "way"), WAYS)
def test_a_refusal_names_the_command_that_makes_it_right(
    worlds: Worlds, kind: str, way: dict[str, Any], tmp_path: Path
) -> None:
    world = worlds(kind)
    plain = processor_of(world, do_sample_frames=True, **way)
    config = world.model().config
    ours = bank_processor(plain, world.bank, model_config=config)
    told = set()
    for name in FRAMES:
        with pytest.raises(
            UserError, match="holds other frames than this processor takes"
        ) as caught:
            ours.apply_chat_template(talk({"type": "video", "video": name}), **ASK)
        told.add(str(caught.value))
        assert f"--frames-like {world_kind(kind)}" in str(caught.value)
    encode_as_told(world, max(told, key=len), tmp_path / "bank")
    again = bank_processor(plain, tmp_path / "bank", model_config=config)
    for name in FRAMES:
        inputs = again.apply_chat_template(talk({"type": "video", "video": name}), **ASK)
        assert torch.isfinite(inputs["pixel_values_videos"]).all()


def world_kind(kind: str) -> str:
    return {"qwen2_5_vl": "qwen2_vl", "llava_onevision": "llava", "llava_next_video": "llava"}.get(
        kind, kind
    )


def test_frames_of_the_same_number_are_compared_one_by_one(worlds: Worlds) -> None:
    world = worlds("qwen2_5_vl")
    ours = bank_processor(
        processor_of(world, do_sample_frames=True, num_frames=6),
        world.bank,
        model_config=world.model().config,
    )
    with pytest.raises(
        UserError, match=r"expected frame 7 at place 1, got frame 9 at place 1, by --frames 6"
    ):
        ours.apply_chat_template(talk({"type": "video", "video": "long.mp4"}), **ASK)
    taken = ours.apply_chat_template(
        talk({"type": "video", "video": "long.mp4"}),
        **ASK | {"processor_kwargs": {"do_sample_frames": False, **ASK["processor_kwargs"]}},  # type: ignore[dict-item]
    )
    assert taken["video_grid_thw"].tolist() == [[3, 6, 6]]


def test_a_way_to_sample_that_encode_lacks_is_called_so(worlds: Worlds) -> None:
    world = worlds("qwen2_5_vl")
    plain = processor_of(world, do_sample_frames=True, fps=1, min_frames=8)
    ours = bank_processor(plain, world.bank, model_config=world.model().config)
    with pytest.raises(
        UserError, match="encode has no flags for its way to sample: pass do_sample"
    ):
        ours.apply_chat_template(talk({"type": "video", "video": "short.mp4"}), **ASK)
    plain = processor_of(world, do_sample_frames=True, num_frames=99)
    ours = bank_processor(plain, world.bank, model_config=world.model().config)
    with pytest.raises(UserError, match="this processor cannot sample it: Video can't be sampled"):
        ours.apply_chat_template(talk({"type": "video", "video": "short.mp4"}), **ASK)


def test_frames_of_a_part_count_from_its_first(worlds: Worlds, tmp_path: Path) -> None:
    world = worlds("qwen3_vl")
    rows = tmp_path / "parts.jsonl"
    turns = [{"from": "human", "value": "<video>\nWhy?"}, {"from": "gpt", "value": "So."}]
    row = {"id": "1", "video": "long.mp4", "start": 1.04, "end": 3.1, "conversations": turns}
    import json

    rows.write_text(json.dumps(row))
    words = f"encode {rows} --video-root {world.videos} --tower {world.folder} --layer "
    words += f"{Bank.open(world.bank).config.layer} --stride 1 --fps 3 --frames-like qwen3_vl --out"
    done = CliRunner().invoke(main, [*shlex.split(words), str(tmp_path / "bank")])
    assert done.exit_code == 0, done.output
    plain = processor_of(world, do_sample_frames=True, fps=3)
    ours = bank_processor(plain, tmp_path / "bank", model_config=world.model().config)
    name = "long.mp4#1.04-3.1"
    found = ours.source.video(name, plain.video_processor, {"do_sample_frames": True, "fps": 3})
    assert found.metadata.total_num_frames == 26  # 12 to 37, those on the screen from 1.04 to 3.1 s
    assert found.metadata.frames_indices == [0, 5, 10, 15, 20, 25]


def test_what_a_bank_at_a_url_lacks_is_made_live(worlds: Worlds, tmp_path: Path) -> None:
    world = worlds("qwen2_5_vl")
    memory = fsspec.filesystem("memory")
    memory.put(str(world.bank), "/lab/bank", recursive=True)
    settings = {"model_config": world.model().config}
    plain = processor_of(world)
    try:
        ours = bank_processor(plain, "memory://lab/bank", missing="live", **settings)
        (tmp_path / "moved.mp4").write_bytes((world.videos / "long.mp4").read_bytes())
        banked = ours.apply_chat_template(talk({"type": "video", "video": "long.mp4"}), **ASK)
        moved = talk({"type": "video", "video": str(tmp_path / "moved.mp4")})
        fresh = ours.apply_chat_template(moved, **ASK)
        assert ours.source.live == 1
        assert torch.equal(banked["pixel_values_videos"], fresh["pixel_values_videos"])
        refusing = bank_processor(plain, "memory://lab/bank", **settings)
        with pytest.raises(UserError, match=r"not in the bank.*--out A-COPY-OF-IT"):
            refusing.apply_chat_template(moved, **ASK)
        lost = bank_processor(
            plain, "memory://lab/bank", missing="live", tower=tmp_path / "nowhere", **settings
        )
        with pytest.raises(UserError, match=r"bank lacks cannot be made.*tower=FOLDER"):
            lost.apply_chat_template(moved, **ASK)
    finally:
        memory.rm("/lab", recursive=True)
