"""Towers on disk, loaded and checked against transformers' own processors and models."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import (
    AutoImageProcessor,
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    GotOcr2ImageProcessorPil,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    InternVLVisionModel,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    VideoMAEConfig,
    VideoMAEModel,
    VivitConfig,
    VivitModel,
)

from model.grid import pool
from model.tower.tower import Tower, tower_digest
from shards.errors import UserError

SIDE, PATCH = 56, 8  # 7x7 patches
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}
VISION = SMALL | {"image_size": SIDE, "patch_size": PATCH}
TEXT = SMALL | {"vocab_size": 20, "max_position_embeddings": 8}
TEXT |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
SQUARE = {"height": SIDE, "width": SIDE}
FRAME_SIZES = [(56, 56), (64, 64), (101, 57), (57, 101), (37, 203), (480, 640), (333, 77)]


@dataclass(frozen=True)
class Kind:
    make: Callable[[], Any]
    processor: Callable[[], Any]
    prefix: int
    """Tokens before the patches."""


def crop_processor(kind: Any, edge: int) -> Callable[[], Any]:
    return lambda: kind(size={"shortest_edge": edge}, crop_size=SQUARE)


def siglip_processor() -> Any:
    return SiglipImageProcessorPil(size=SQUARE)


KINDS = {
    "siglip": Kind(
        lambda: SiglipModel(SiglipConfig(vision_config=VISION, text_config=TEXT)),
        siglip_processor,
        0,
    ),
    # SigLIP 2 at a fixed resolution is published as `siglip`, with bilinear resizing
    "siglip2": Kind(
        lambda: SiglipModel(SiglipConfig(vision_config=VISION, text_config=TEXT)),
        lambda: SiglipImageProcessorPil(size=SQUARE, resample=Image.Resampling.BILINEAR),
        0,
    ),
    "siglip_vision": Kind(
        lambda: SiglipVisionModel(SiglipVisionConfig(**VISION)), siglip_processor, 0
    ),
    "clip": Kind(
        lambda: CLIPModel(CLIPConfig(vision_config=VISION, text_config=TEXT)),
        crop_processor(CLIPImageProcessorPil, SIDE),
        1,
    ),
    "clip_vision": Kind(
        lambda: CLIPVisionModel(CLIPVisionConfig(**VISION)),
        crop_processor(CLIPImageProcessorPil, SIDE),
        1,
    ),
    "dinov2": Kind(
        lambda: Dinov2Model(Dinov2Config(**VISION)), crop_processor(BitImageProcessorPil, 64), 1
    ),
    "dinov3": Kind(
        lambda: DINOv3ViTModel(DINOv3ViTConfig(**VISION, num_register_tokens=3)),
        crop_processor(BitImageProcessorPil, 64),
        4,
    ),
    "internvl_vision": Kind(
        lambda: InternVLVisionModel(InternVLVisionConfig(**VISION)),
        lambda: GotOcr2ImageProcessorPil(size=SQUARE),
        1,
    ),
    "dinov2_with_registers": Kind(
        lambda: Dinov2WithRegistersModel(
            Dinov2WithRegistersConfig(**VISION, num_register_tokens=3)
        ),
        crop_processor(BitImageProcessorPil, 64),
        4,
    ),
}


def save(folder: Path, model: Any, processor: Any = None) -> Path:
    model.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("towers")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {name: save(root / name, k.make(), k.processor()) for name, k in KINDS.items()}


def frames_of(seed: int, height: int, width: int, count: int = 2) -> np.ndarray:
    shape = (count, height, width, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("height", "width"), FRAME_SIZES)
def test_pixels_are_those_of_transformers_to_the_bit(
    towers: dict[str, Path], kind: str, height: int, width: int
) -> None:
    tower = Tower.load(str(towers[kind]))
    frames = frames_of(1, height, width)
    processor = AutoImageProcessor.from_pretrained(towers[kind], backend="pil")
    images = [Image.fromarray(frame) for frame in frames]
    theirs = processor(images=images, return_tensors="pt")["pixel_values"]
    ours = tower.normalise(tower.pixels.resize(frames))
    assert ours.dtype == torch.float32
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", [-1, -2, -4, 0, 2])
def test_patches_are_the_hidden_states_of_the_model_itself(
    towers: dict[str, Path], kind: str, layer: int
) -> None:
    tower = Tower.load(str(towers[kind]), layer=layer)
    assert tower.grid_of(480, 640) == (7, 7)
    assert tower.width == 16
    frames = frames_of(2, SIDE, SIDE, count=3)
    whole = KINDS[kind].make().from_pretrained(towers[kind]).eval()
    vision = getattr(whole, "vision_model", whole)
    with torch.no_grad():
        states = vision(pixel_values=tower.normalise(frames), output_hidden_states=True)
    expected = states.hidden_states[layer][:, KINDS[kind].prefix :]
    assert expected.shape == (3, 49, 16)
    got = tower.encode(frames, batch_frames=4)
    assert got.shape == (3, 7, 7, 16)
    torch.testing.assert_close(got.flatten(1, 2), expected, rtol=1e-5, atol=1e-5)


def test_patches_lie_in_the_order_of_the_picture(towers: dict[str, Path]) -> None:
    tower = Tower.load(str(towers["dinov2_with_registers"]), layer=0)
    frame = np.zeros((1, SIDE, SIDE, 3), np.uint8)
    before = tower.encode(frame)
    frame[:, 2 * PATCH : 3 * PATCH, 5 * PATCH : 6 * PATCH] = 255
    changed = (tower.encode(frame) != before).any(dim=-1)[0]
    assert torch.nonzero(changed).tolist() == [[2, 5]]


@pytest.mark.parametrize("kind", ["siglip_vision", "clip", "dinov2"])
def test_other_frames_of_a_batch_change_no_feature(towers: dict[str, Path], kind: str) -> None:
    tower = Tower.load(str(towers[kind]))
    frames = frames_of(3, SIDE, SIDE, count=7)
    whole = tower.encode(frames, batch_frames=4)
    for k in range(7):
        alone = tower.encode(frames[k : k + 1], batch_frames=4)
        # the place in the batch may change the last bits, the neighbours may not
        torch.testing.assert_close(alone[0], whole[k], rtol=1e-5, atol=1e-6)
    assert torch.equal(tower.encode(frames[:5], batch_frames=4), whole[:5])
    other = frames.copy()
    other[[0, 2, 3, 5, 6]] = 255 - other[[0, 2, 3, 5, 6]]
    again = tower.encode(other, batch_frames=4)
    assert torch.equal(again[[1, 4]], whole[[1, 4]])
    assert not torch.equal(again[0], whole[0])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_stored_features_are_the_pooled_patches_rounded_once(
    towers: dict[str, Path], dtype: str
) -> None:
    tower = Tower.load(str(towers["siglip"]))
    frames = frames_of(4, SIDE, SIDE)
    stored, underflowed = tower.features(frames, [2, 4], dtype=dtype, threads=2)
    assert underflowed == 0
    for stride, cells in ((2, 4), (4, 2)):
        exact = pool(tower.encode(frames), stride)
        assert exact.shape == (2, cells, cells, 16)
        if dtype == "float16":
            expected = exact.numpy().astype(np.float16)
        else:
            expected = exact.bfloat16().view(torch.uint16).numpy()
        assert stored[stride].dtype == expected.dtype
        np.testing.assert_array_equal(stored[stride], expected)


@pytest.mark.parametrize(
    ("scale", "complaint"),
    [(1e7, "does not fit float16; use --dtype bfloat16"), (float("nan"), "NaN or infinity")],
)
def test_features_that_cannot_be_stored_are_refused(
    towers: dict[str, Path], scale: float, complaint: str
) -> None:
    tower = Tower.load(str(towers["siglip_vision"]), layer=0)
    tower.model.embeddings.position_embedding.weight.data.mul_(scale)
    with pytest.raises(UserError, match=complaint):
        tower.features(frames_of(5, SIDE, SIDE), [2], threads=2)


def test_values_too_small_to_store_are_counted(towers: dict[str, Path]) -> None:
    tower = Tower.load(str(towers["siglip_vision"]), layer=0)
    for parameter in tower.model.embeddings.parameters():
        parameter.data.fill_(0.0)
    tower.model.embeddings.patch_embedding.bias.data.fill_(1e-9)
    stored, underflowed = tower.features(frames_of(5, SIDE, SIDE), [2], threads=2)
    assert underflowed == stored[2].size
    assert not stored[2].any()


@pytest.mark.parametrize("edge", [56, 64])
@pytest.mark.parametrize(("height", "width"), FRAME_SIZES)
def test_the_covered_part_is_where_the_crop_was_cut(
    tmp_path: Path, height: int, width: int, edge: int
) -> None:
    processor = crop_processor(CLIPImageProcessorPil, edge)()
    tower = Tower.load(str(save(tmp_path, CLIPVisionModel(CLIPVisionConfig(**VISION)), processor)))
    y0, x0, y1, x1 = tower.covered(height, width)
    # a frame whose red is its row and whose green is its column tells where a pixel came from
    ramp = np.zeros((1, height, width, 3), np.uint8)
    ramp[..., 0] = np.linspace(0, 255, height)[:, None]
    ramp[..., 1] = np.linspace(0, 255, width)
    seen = tower.pixels.resize(ramp)[0].astype(float) / 255
    centres = (np.arange(SIDE) + 0.5) / SIDE
    rows = (y0 + (y1 - y0) * centres) * height / (height - 1) - 0.5 / (height - 1)
    cols = (x0 + (x1 - x0) * centres) * width / (width - 1) - 0.5 / (width - 1)
    assert np.abs(seen[:, SIDE // 2, 0] - rows).max() < 0.015
    assert np.abs(seen[SIDE // 2, :, 1] - cols).max() < 0.015
    assert -1e-9 <= min(y0, x0) <= max(y1, x1) <= 1 + 1e-9
    if edge == SIDE:  # the shorter side is seen whole
        assert (y0, y1) == (0, 1) if height <= width else (x0, x1) == (0, 1)


def test_a_squeezed_frame_is_covered_whole(towers: dict[str, Path]) -> None:
    tower = Tower.load(str(towers["siglip"]))
    assert tower.covered(480, 640) == (0.0, 0.0, 1.0, 1.0)
    assert tower.pixels.output_size(480, 640) == (SIDE, SIDE)


@pytest.mark.parametrize("kind", KINDS)
def test_the_digest_does_not_depend_on_the_folder(
    towers: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    first = Tower.load(str(towers[kind])).digest
    moved = shutil.copytree(towers[kind], tmp_path / "elsewhere")
    assert Tower.load(str(moved), layer=-1, dtype="bfloat16").digest == first
    again = KINDS[kind].make().from_pretrained(moved)
    resaved = save(tmp_path / "resaved", again, KINDS[kind].processor())
    assert Tower.load(str(resaved)).digest == first


@pytest.mark.parametrize("kind", ["siglip", "clip_vision", "dinov2"])
def test_the_digest_changes_with_any_weight(
    towers: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    model = KINDS[kind].make().from_pretrained(towers[kind])
    vision = getattr(model, "vision_model", model)
    with torch.no_grad():
        list(vision.parameters())[5].flatten()[-1] += 1e-3
    save(tmp_path, model, KINDS[kind].processor())
    tower = Tower.load(str(towers[kind]))
    found = [tower.digest, Tower.load(str(tmp_path)).digest]
    for weight in tower.model.parameters():
        for place in (0, -1):
            weight.data.view(-1)[place] += 1e-3
            found.append(tower_digest(tower.model.config.to_dict(), tower.model.state_dict()))
    assert len(set(found)) == len(found)


def test_the_vision_half_of_a_pair_is_the_same_tower(
    towers: dict[str, Path], tmp_path: Path
) -> None:
    half = SiglipVisionModel.from_pretrained(towers["siglip"])
    save(tmp_path, half, siglip_processor())
    assert Tower.load(str(tmp_path)).digest == Tower.load(str(towers["siglip"])).digest


@pytest.mark.parametrize("with_processor", [True, False])
@pytest.mark.parametrize("kind", ["videomae", "vivit"])
def test_towers_that_mix_frames_are_refused(
    tmp_path: Path, kind: str, with_processor: bool
) -> None:
    if kind == "videomae":
        model: Any = VideoMAEModel(VideoMAEConfig(**VISION, num_frames=2))
    else:
        model = VivitModel(
            VivitConfig(**SMALL, image_size=SIDE, num_frames=2, tubelet_size=[2, PATCH, PATCH])
        )
    save(tmp_path, model, siglip_processor() if with_processor else None)
    with pytest.raises(
        UserError, match=rf"{tmp_path}: {kind} mixes frames, .* of them; use SigLIP"
    ):
        Tower.load(str(tmp_path))


def test_towers_of_timm_are_refused_with_a_way_out(tmp_path: Path) -> None:
    """As the vision part of PerceptionLM is: a Perception Encoder."""
    (tmp_path / "config.json").write_text('{"model_type": "perception_lm"}')
    with pytest.raises(UserError, match=r"tower of timm \(Perception Encoder .* use SigLIP 2 or D"):
        Tower.load(str(tmp_path))


def test_the_tower_inside_an_internvl_is_the_same_tower(tmp_path: Path) -> None:
    """Whose processor cuts pictures into tiles; a frame of a video is one."""
    text = SMALL | {"vocab_size": 20, "num_key_value_heads": 2, "model_type": "qwen2"}
    config = InternVLConfig(
        vision_config=VISION, text_config=text | {"bos_token_id": 0, "eos_token_id": 1}
    )
    whole = InternVLForConditionalGeneration(config)
    tiles = GotOcr2ImageProcessorPil(size=SQUARE, crop_to_patches=True)
    tower = Tower.load(str(save(tmp_path / "whole", whole, tiles)))
    half = Tower.load(str(save(tmp_path / "half", whole.model.vision_tower, tiles)))
    assert (tower.digest, tower.model_type) == (half.digest, "internvl_vision")
    frames = frames_of(8, 90, 60)
    pixels = tower.normalise(tower.pixels.resize(frames))
    one_tile = GotOcr2ImageProcessorPil(size=SQUARE)
    theirs = one_tile(images=[Image.fromarray(f) for f in frames], return_tensors="pt")
    assert torch.equal(pixels, theirs["pixel_values"])


def test_patches_that_are_not_square_are_refused(tmp_path: Path) -> None:
    config = InternVLVisionConfig(**VISION | {"patch_size": (8, 14)})
    processor = GotOcr2ImageProcessorPil(size=SQUARE)
    with pytest.raises(UserError, match="its patches are not square"):
        Tower.load(str(save(tmp_path, InternVLVisionModel(config), processor)))


def test_a_processor_that_needs_torchvision_is_read_as_its_like_with_pillow(
    tmp_path: Path,
) -> None:
    """DINOv3's own: levels are resized without rounding there, as by torch's interpolation."""
    model = DINOv3ViTModel(DINOv3ViTConfig(**VISION))
    written: dict[str, Any] = {"image_processor_type": "DINOv3ViTImageProcessorFast"}
    written |= {"size": SQUARE, "resample": 2, "do_center_crop": None, "crop_size": None}
    written |= {"do_resize": True, "do_rescale": True, "do_normalize": True}
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(written))
    tower = Tower.load(str(tmp_path))
    frames = frames_of(9, 101, 157)
    levels = torch.from_numpy(frames).permute(0, 3, 1, 2) / 255
    exact = F.interpolate(levels, (SIDE, SIDE), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(v)[:, None, None] for v in (tower.pixels.mean, tower.pixels.std))
    assert tower.pixels.mean == (0.485, 0.456, 0.406)
    ours = tower.normalise(tower.pixels.resize(frames)) * std + mean
    assert (ours - exact).abs().max() <= 1.0001 / 255
    assert (ours - exact).abs().mean() < 0.4 / 255


def test_weights_that_are_not_there_are_refused(towers: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(towers["siglip_vision"], tmp_path / "tower")
    weights = load_file(folder / "model.safetensors")
    lost = next(name for name in weights if name.endswith("layers.1.mlp.fc1.bias"))
    del weights[lost]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"1 of its weights are missing, .*1\.mlp\.fc1\.bias"):
        Tower.load(str(folder))


def test_processors_that_make_grids_of_any_size_are_refused(tmp_path: Path) -> None:
    model = CLIPVisionModel(CLIPVisionConfig(**VISION))
    for changes, complaint in (
        ({"do_center_crop": False}, "shortest_edge without a centre crop"),
        ({"do_resize": False}, "resizes to"),
    ):
        processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SQUARE, **changes)
        with pytest.raises(UserError, match=complaint):
            Tower.load(str(save(tmp_path, model, processor)))


def test_a_crop_larger_than_the_frame_is_refused(tmp_path: Path) -> None:
    processor = crop_processor(CLIPImageProcessorPil, 40)()
    tower = Tower.load(str(save(tmp_path, CLIPVisionModel(CLIPVisionConfig(**VISION)), processor)))
    with pytest.raises(UserError, match=r"crop of \(56, 56\) does not fit .* 40x40"):
        tower.pixels.resize(frames_of(6, 64, 64))


def test_unknown_models_layers_and_folders_are_refused(
    towers: dict[str, Path], make_llm: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="layer -5 of 3 layers; use -1 to -4"):
        Tower.load(str(towers["siglip"]), layer=-5)
    folder = save(tmp_path / "llm", make_llm(), siglip_processor())
    with pytest.raises(UserError, match=r"qwen2 is not supported \(have siglip,"):
        Tower.load(str(folder))
    with pytest.raises(UserError, match="nowhere: cannot be loaded"):
        Tower.load(str(tmp_path / "nowhere"))


def test_a_transformers_that_needs_torchvision_is_named(
    towers: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def as_before_5_9(*args: Any, **settings: Any) -> None:
        raise ImportError("AutoImageProcessor requires the Torchvision library")

    monkeypatch.setattr(AutoImageProcessor, "from_pretrained", as_before_5_9)
    with pytest.raises(
        UserError, match=r"siglip: transformers .* without torchvision; pip install"
    ):
        Tower.load(str(towers["siglip"]))


@pytest.mark.parametrize(("frames", "shape"), [(1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (40, 16)])
def test_a_batch_has_the_shape_that_the_length_of_its_clip_chooses(
    towers: dict[str, Path], frames: int, shape: int
) -> None:
    tower = Tower.load(str(towers["siglip"]))
    assert tower.batch_shape(frames, 16) == shape
    assert tower.batch_shape(frames, 4) == min(shape, 4)
    clip = frames_of(3, SIDE, SIDE, count=frames)
    stored, _ = tower.features(clip, (4, 8), threads=1)
    batches = [
        tower.encode_batch(clip[cut : cut + shape], shape) for cut in range(0, frames, shape)
    ]
    for stride, features in stored.items():
        pooled = torch.cat([pool(batch, stride) for batch in batches])
        assert np.array_equal(features, pooled.half().numpy())
        assert np.array_equal(features, pool(torch.cat(batches), stride).half().numpy())
