"""P13: logits from a bank and from pixels agree, for every family of towers.

Each tower is random, small, and loaded from a folder as a user's would be. Its bank is made as
`preprocess encode` makes one; the live path starts from the video again, as `train/ask.py` does.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    GotOcr2ImageProcessorPil,
    InternVLVisionConfig,
    InternVLVisionModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Siglip2ImageProcessorPil,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    VJEPA2Config,
    VJEPA2Model,
)

from model.vlm import VLM
from preprocess.decode.decode_child import DecodeChild
from preprocess.decode.request import ReadRequest
from preprocess.encode.features import load_tower
from preprocess.encode.run import EncodeOptions, encode
from preprocess.show.picture import picture
from shards.care.verify import verify
from shards.format.features import Sampling
from shards.read.bank import Bank
from shards.read.banks import BankedClip, Banks
from train.ask import FreshClip, fresh_clip
from train.batches.lengths import Clips
from train.data.records import Record, join

CLIPS = os.environ.get("FRAMEBANK_CLIPS", "")
WIDTH, PATCH, LAYER = 12, 8, -2
SMALL = {"hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 3}
VISION = SMALL | {"intermediate_size": 20, "image_size": 64, "patch_size": PATCH}
TEXT = SMALL | {"intermediate_size": 20, "vocab_size": 20, "bos_token_id": 0, "eos_token_id": 1}
TEXT |= {"pad_token_id": 2, "max_position_embeddings": 8}
LLM = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "vocab_size": 20}
LLM |= {"num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": 0, "eos_token_id": 1}
LLM |= {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}
QWEN = {"depth": 3, "num_heads": 3, "patch_size": PATCH}
SQUARE = {"height": 64, "width": 64}
SIZES = {"wide": (72, 128), "tall": (96, 64), "square": (80, 80)}
FRAMES = 5
"""Of a clip: odd, so that Qwen's last unit has one frame."""

Made = tuple[Any, Any]


def siglip(resample: Image.Resampling) -> Made:
    model = SiglipModel(SiglipConfig(vision_config=VISION, text_config=TEXT))
    return model, SiglipImageProcessorPil(size=SQUARE, resample=resample)


def clip() -> Made:
    config = CLIPConfig(vision_config=VISION, text_config=TEXT)
    return CLIPModel(config), CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size=SQUARE)


def dino(model: Any) -> Made:
    return model, BitImageProcessorPil(size={"shortest_edge": 80}, crop_size=SQUARE)


def qwen2() -> Made:
    vision = QWEN | {"embed_dim": WIDTH, "hidden_size": 16, "mlp_ratio": 2}
    config = Qwen2VLConfig(text_config=LLM, vision_config=vision)
    return Qwen2VLForConditionalGeneration(config), qwen_processor()


def qwen2_5() -> Made:
    vision = QWEN | {"hidden_size": WIDTH, "out_hidden_size": 16, "intermediate_size": 20}
    vision |= {"window_size": 4 * PATCH, "fullatt_block_indexes": [1]}
    config = Qwen2_5_VLConfig(text_config=LLM, vision_config=vision)
    return Qwen2_5_VLForConditionalGeneration(config), qwen_processor()


def qwen3() -> Made:
    vision = QWEN | {"hidden_size": WIDTH, "out_hidden_size": 16, "intermediate_size": 20}
    vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
    text = {k: v for k, v in LLM.items() if k not in ("bos_token_id", "eos_token_id")}
    config = Qwen3VLConfig(text_config=text | {"head_dim": 8}, vision_config=vision)
    return Qwen3VLForConditionalGeneration(config), qwen_processor()


def naflex() -> Made:
    vision = SMALL | {"intermediate_size": 20, "patch_size": PATCH, "num_patches": 16}
    model = Siglip2VisionModel(Siglip2VisionConfig(**vision))
    return model, Siglip2ImageProcessorPil(patch_size=PATCH, max_num_patches=71)


def vjepa2() -> Made:
    """Clips of five frames pass in windows of four and of one, which is there twice."""
    predictor = {"pred_hidden_size": 6, "pred_num_attention_heads": 1, "pred_num_hidden_layers": 1}
    config = VJEPA2Config(
        **SMALL | {"num_attention_heads": 2},
        **predictor,
        patch_size=PATCH,
        crop_size=64,
        frames_per_clip=4,
        mlp_ratio=2,
    )
    return dino(VJEPA2Model(config))


def qwen_processor() -> Any:
    return Qwen2VLImageProcessorPil(patch_size=PATCH, min_pixels=32 * 32, max_pixels=80 * 96)


KINDS: dict[str, Callable[[], Made]] = {
    "siglip": lambda: siglip(Image.Resampling.BICUBIC),
    "siglip2": lambda: siglip(Image.Resampling.BILINEAR),
    "clip": clip,
    "dinov2": lambda: dino(Dinov2Model(Dinov2Config(**VISION))),
    "dinov2_with_registers": lambda: dino(
        Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**VISION, num_register_tokens=2))
    ),
    "dinov3_vit": lambda: dino(DINOv3ViTModel(DINOv3ViTConfig(**VISION, num_register_tokens=2))),
    "internvl": lambda: (
        InternVLVisionModel(InternVLVisionConfig(**VISION)),
        GotOcr2ImageProcessorPil(size=SQUARE),
    ),
    "siglip2_naflex": naflex,
    "vjepa2": vjepa2,
    "qwen2_vl": qwen2,
    "qwen2_5_vl": qwen2_5,
    "qwen3_vl": qwen3,
}
QWENS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
LONG = ("siglip2", "dinov2_with_registers", "dinov3_vit", "internvl", "qwen2_vl", "qwen3_vl")
"""What differs little from another family; `make test-all` has them."""
PATCHES = {"wide": (8, 14), "tall": (12, 8), "square": (10, 10)}
"""Of Qwen's towers: sides in multiples of 16, shrunk where there are more than 7,680 pixels."""
PREFIX = {"clip": 1, "dinov2": 1, "dinov2_with_registers": 3, "dinov3_vit": 3, "internvl": 1}


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drawn clip of each size: blocks of colour that move to the right over a gradient."""
    folder = tmp_path_factory.mktemp("videos")
    for seed, (name, (height, width)) in enumerate(SIZES.items()):
        noise = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3))
        blocks = noise.repeat(8, 0).repeat(8, 1)
        with av.open(str(folder / f"{name}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=8, options={"crf": "12"})
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for number in range(12):
                image = np.roll(blocks, 5 * number, axis=1).astype(np.uint8)
                frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                frame.pts, frame.time_base = number, Fraction(1, 8)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    return folder


class Family:
    """One kind of tower, its bank, and the same clips read live."""

    def __init__(
        self,
        kind: str,
        root: Path,
        videos: Path,
        child: DecodeChild,
        window_index: Callable[..., torch.Tensor],
    ) -> None:
        self.kind, self.videos, self.child, self.window_index = kind, videos, child, window_index
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model, processor = KINDS[kind]()
            for weight in self.model.eval().parameters():
                weight.data.normal_(std=0.3)  # else every patch is much like the next
        self.model.save_pretrained(root / "tower")
        processor.save_pretrained(root / "tower")
        self.processor = AutoImageProcessor.from_pretrained(root / "tower", backend="pil")
        self.options = EncodeOptions(
            tower=str(root / "tower"),
            strides=(2, 4),
            sampling=Sampling(num_frames=FRAMES),
            layer=LAYER,
        )
        self.path = root / "bank"
        summary = encode([str(videos)], self.path, self.options)
        assert (summary.clips, summary.failures) == (3, [])
        self.bank = Bank.open(self.path)
        self.tower = load_tower(self.options)

    @cached_property
    def banked(self) -> list[BankedClip]:
        banks = Banks.open([self.path])
        return [banks.clip(f"{name}.mp4") for name in SIZES]

    @cached_property
    def live(self) -> list[FreshClip]:
        return [
            fresh_clip(self.videos / f"{name}.mp4", self.bank.config, self.tower, self.child)
            for name in SIZES
        ]

    def by_transformers(self, frames: np.ndarray) -> np.ndarray:
        """Return patches of frames as they were decoded: `(units, rows, cols, width)`."""
        images = [Image.fromarray(frame) for frame in frames]
        inputs = self.processor(images=images, return_tensors="pt")
        with torch.no_grad():
            if self.kind in QWENS:
                return self._qwen_by_transformers(inputs)
            if self.kind == "siglip2_naflex":
                return self._naflex_by_transformers(inputs)
            if self.kind == "vjepa2":
                return self._windows_by_transformers(inputs["pixel_values"])
            vision = getattr(self.model, "vision_model", self.model)
            output = vision(pixel_values=inputs["pixel_values"], output_hidden_states=True)
        patches = output.hidden_states[LAYER][:, PREFIX.get(self.kind, 0) :]
        return patches.unflatten(1, (8, 8)).numpy()

    def _naflex_by_transformers(self, inputs: Any) -> np.ndarray:
        """All patches of a frame, and behind them what fills its row up."""
        rows, cols = inputs["spatial_shapes"][0].tolist()
        assert inputs["pixel_values"].shape[1] == 71 > rows * cols > 50
        hidden = self.model(**inputs, output_hidden_states=True).hidden_states[LAYER]
        return hidden[:, : rows * cols].unflatten(1, (rows, cols)).numpy()

    def _windows_by_transformers(self, pixels: torch.Tensor) -> np.ndarray:
        whole = torch.cat([pixels, pixels[-1:]])  # the last unit lacks a frame
        states = [
            self.model(
                pixel_values_videos=part[None], skip_predictor=True, output_hidden_states=True
            ).hidden_states
            for part in whole.split(4)
        ]
        return torch.cat([own[LAYER][0] for own in states]).unflatten(0, (-1, 8, 8)).numpy()

    def _qwen_by_transformers(self, inputs: Any) -> np.ndarray:
        (_, rows, cols), count = inputs["image_grid_thw"][0].tolist(), len(inputs["image_grid_thw"])
        # a picture's patches hold it twice: take each frame's once, the last one's again
        once = inputs["pixel_values"].view(count, rows * cols, 3, 2, PATCH * PATCH)[:, :, :, 0]
        once = torch.cat([once, once[-1:]]) if count % 2 else once
        pairs = torch.stack([once[0::2], once[1::2]], dim=3).flatten(0, 1).flatten(1)
        sizes = torch.tensor([[len(once) // 2, rows, cols]])
        visual = self.model.model.visual
        hidden = visual(pairs, grid_thw=sizes, output_hidden_states=True).hidden_states[LAYER]
        in_blocks = [
            (row, col)
            for top, left in np.ndindex(rows // 2, cols // 2)
            for row in (2 * top, 2 * top + 1)
            for col in (2 * left, 2 * left + 1)
        ]
        places = torch.tensor(in_blocks * (len(once) // 2))
        if self.kind == "qwen2_5_vl":
            blocks = self.window_index(sizes, 2, visual.window_size, PATCH)
            places = places.unflatten(0, (-1, 4))[blocks].flatten(0, 1)
        # windows of one unit come before those of the next
        units = torch.arange(len(once) // 2).repeat_interleave(rows * cols)
        out = np.full((len(once) // 2, rows, cols, WIDTH), np.nan, np.float32)
        out[units, places[:, 0], places[:, 1]] = hidden
        return out


@pytest.fixture(scope="module")
def make_family(
    tmp_path_factory: pytest.TempPathFactory,
    videos: Path,
    window_index: Callable[..., torch.Tensor],
) -> Iterator[Callable[[str], Family]]:
    def make(kind: str) -> Family:
        return Family(kind, tmp_path_factory.mktemp(kind), videos, child, window_index)

    with DecodeChild() as child:
        yield cache(make)


def marked(kinds: Iterable[str]) -> list[Any]:
    return [pytest.param(k, marks=pytest.mark.slow if k in LONG else ()) for k in kinds]


@pytest.fixture(params=marked(KINDS))
def family(request: pytest.FixtureRequest, make_family: Callable[[str], Family]) -> Family:
    return make_family(request.param)


@pytest.fixture(params=marked(QWENS))
def qwen(request: pytest.FixtureRequest, make_family: Callable[[str], Family]) -> Family:
    return make_family(request.param)


def talks(clips: list[Any]) -> list[tuple[Any, ...]]:
    return [([clip], "<video>\nWhen is it?", "from <t:0.50> to <t:1.00>") for clip in clips]


def test_banked_features_are_what_transformers_makes_of_the_frames(family: Family) -> None:
    for name, banked in zip(SIZES, family.banked, strict=True):
        request = ReadRequest(family.videos / f"{name}.mp4", family.options.sampling)
        decoded = family.child.read_clip(request)
        assert decoded.frames.shape == (FRAMES, *SIZES[name], 3)
        patches = family.by_transformers(decoded.frames)
        grid = PATCHES[name] if family.kind in QWENS else (8, 8)
        assert banked.info.patch_grid == patches.shape[1:3]
        assert family.kind == "siglip2_naflex" or patches.shape[1:3] == grid
        for stride in (2, 4):
            features = banked.read(stride, range(len(patches)))
            expected = np.full(features.shape, np.nan)
            for row, col in np.ndindex(features.shape[1:3]):
                cell = patches[:, row * stride :, col * stride :][:, :stride, :stride]
                expected[:, row, col] = cell.mean(axis=(1, 2))
            np.testing.assert_allclose(features, expected, rtol=2**-10, atol=2e-5)


def test_cached_and_live_logits_agree(
    family: Family,
    make_model: Callable[..., VLM],
    make_batch: Callable[..., Any],
) -> None:
    assert_same_answers(make_model(), make_batch, family.banked, family.live)


@pytest.mark.skipif(not CLIPS, reason="FRAMEBANK_CLIPS does not name the test videos")
def test_cached_and_live_logits_agree_on_real_clips(
    family: Family,
    tmp_path: Path,
    make_model: Callable[..., VLM],
    make_batch: Callable[..., Any],
) -> None:
    paths = [Path(CLIPS) / name for name in ("bikes.mp4", "nasa_rotated.mp4", "mpeg1_ps.mpg")]
    assert encode([str(path) for path in paths], tmp_path / "bank", family.options).clips == 3
    banks = Banks.open([tmp_path / "bank"])
    banked = [banks.clip(path.name) for path in paths]
    live = [fresh_clip(path, banks.config, family.tower, family.child) for path in paths]
    assert_same_answers(make_model(), make_batch, banked, live)


def assert_same_answers(
    model: VLM, make_batch: Callable[..., Any], banked: list[Any], live: list[Any]
) -> None:
    found, losses = [], []
    for clips in (banked, live):
        batch = make_batch(model, *talks(clips))
        with torch.no_grad():
            found.append(model.logits(model.hidden_states(batch)))
            losses.append(model(batch))
    assert found[0].shape == found[1].shape
    assert (found[0] - found[1]).abs().max().item() <= 1e-4
    assert set(losses[0]) == set(losses[1])
    for name, value in losses[0].items():
        torch.testing.assert_close(value, losses[1][name], rtol=0, atol=1e-4)
    # the clips are told apart, so a wrong clip would not have passed
    assert (found[0][0] - found[0][1]).abs().max().item() > 1e-2


def test_live_clips_know_what_banked_ones_do(family: Family) -> None:
    for live, banked in zip(family.live, family.banked, strict=True):
        for name in ("start", "end", "display_size", "patch_grid", "covered"):
            assert getattr(live.info, name) == getattr(banked.info, name)
        assert live.info.timestamps.tolist() == banked.info.timestamps.tolist()
        assert live.info.frame_index.tolist() == banked.info.frame_index.tolist()
    covered = [clip.info.covered for clip in family.banked]
    if family.kind == "clip":  # the centre square of the shorter side
        assert covered[0] == pytest.approx((0, (113 - 64) // 2 / 113, 1, (24 + 64) / 113))
        assert covered[1] == pytest.approx((16 / 96, 0, 80 / 96, 1))
    elif family.kind in (*QWENS, "siglip2_naflex"):
        assert covered == [(0, 0, 1, 1)] * 3


def test_a_unit_has_the_mean_time_of_its_frames(
    qwen: Family, make_model: Callable[..., VLM], make_batch: Callable[..., Any]
) -> None:
    for banked in qwen.banked:
        row = qwen.bank.row(banked.info.id)
        meta = qwen.bank.meta(row)
        assert (meta.frames_per_unit, len(meta.timestamps)) == (2, FRAMES)
        assert meta.frame_index == [0, 2, 5, 8, 11]
        assert meta.timestamps == [k / 8 for k in meta.frame_index]
        assert qwen.bank.shape(row, 2)[0] == qwen.bank.shape(row, 4)[0] == 3
        assert banked.info.timestamps.tolist() == [1 / 8, 6.5 / 8, 11 / 8]
        assert banked.info.frame_index.tolist() == [0, 5, 11]
    batch = make_batch(make_model(), *talks(qwen.banked[:1]))
    times = [time for group in batch.groups for time in group.time.tolist()]
    assert sorted(times) == pytest.approx([1 / 12, 6.5 / 12, 11 / 12])
    banks = Banks.open([qwen.path])
    (record,) = join([Record("r", ("wide.mp4",), (), "", "here")], banks, "error", [])
    clips = Clips.of([record], banks, 2, 4)
    assert clips.frames.tolist() == [3]
    assert (clips.slow_cells.tolist(), clips.fast_cells.tolist()) == ([4 * 7], [2 * 4])


def test_a_frame_is_seen_from_its_unit_on(
    qwen: Family, make_model: Callable[..., VLM], make_batch: Callable[..., Any]
) -> None:
    """Another frame 2 leaves the states of unit 0, and so the prediction of unit 1, as they were."""
    model = make_model()
    video, sampling = qwen.videos / "wide.mp4", qwen.options.sampling
    frames = qwen.child.read_clip(ReadRequest(video, sampling, pixels=qwen.tower.pixels)).frames
    info = qwen.banked[0].info
    changed = frames.copy()
    changed[2] = 255 - changed[2]
    states, batches = [], []
    for seen in (frames, changed):
        stored, _ = qwen.tower.features(seen, (2, 4), threads=2)
        batches.append(make_batch(model, *talks([FreshClip(info, stored)])))
        with torch.no_grad():
            states.append(model.hidden_states(batches[-1]))
    same = (states[0] == states[1]).all(dim=1)
    first = sorted(int(at) for group in batches[0].groups for at in group.token_index[:, 0])
    assert len(first) == 3
    assert same[: first[1]].all()
    assert not same[first[1] :].any()


@pytest.mark.slow
def test_a_bank_of_many_grids_is_told_checked_and_drawn(qwen: Family, tmp_path: Path) -> None:
    assert verify(qwen.path, deep=True) == []
    for name in SIZES:
        _, drawn = picture(qwen.path, f"{name}.mp4")
        assert min(drawn.size) > 100
    for codec in ("int8", "blosc"):
        options = EncodeOptions(**{**vars(qwen.options), "codec": codec})
        encode([str(qwen.videos)], tmp_path / codec, options)
        for row in range(3):
            plain = qwen.bank.read(row, 2).astype(np.float32)
            packed = Bank.open(tmp_path / codec).read(row, 2).astype(np.float32)
            assert np.abs(packed - plain).max() <= (0.1 if codec == "int8" else 0)
