"""`--fit`: how frames get the tower's one size is the bank's, wherever features are made as there."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

from model.tower.pixels import Pixels
from preprocess.decode.decode_child import DecodeChild
from preprocess.encode.estimate import cut_away
from preprocess.encode.features import EncodeOptions, coarse_strides, load_tower
from preprocess.encode.run import encode
from preprocess.show.picture import picture
from shards.format.features import Sampling
from shards.format.plan import ClipSource, read_plan
from shards.read.bank import Bank
from train.ask import fresh_clip
from train.ask import load_tower as tower_of_model


@pytest.mark.parametrize("fit", ["pad", "crop"])
def test_a_bank_keeps_how_its_frames_were_fitted(
    toy: Path, toy_options: EncodeOptions, tmp_path: Path, fit: str
) -> None:
    """The live clip of a question, and the options of retry, repair and work, are as the bank is."""
    video = tmp_path / "wide"
    video.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (2, 40, 72, 3), dtype=np.uint8)
    for number, frame in enumerate(noise):
        Image.fromarray(frame).save(video / f"{number}.png")
    options = replace(toy_options, fit=fit, sampling=Sampling(num_frames=2))
    assert encode([str(video)], tmp_path / "bank", options).clips == 1
    plan = read_plan(tmp_path / "bank")
    assert plan is not None
    again = load_tower(EncodeOptions.of_plan(plan))
    assert again.pixels.to_json() == plan.features.processor
    assert (again.pixels.pad, again.pixels.crop is not None) == (fit == "pad", fit == "crop")
    bank = Bank.open(tmp_path / "bank")
    tower = tower_of_model(bank.config, [str(toy / "tower")])
    with DecodeChild() as child:
        live = fresh_clip(video, bank.config, tower, child)
    (row,) = range(len(bank))
    info = bank.clip(row)
    assert live.info.covered == info.covered
    y0, x0, y1, x1 = info.covered
    assert (y0 < 0 < 1 < y1) if fit == "pad" else (0 < x0 < x1 < 1)
    for stride in bank.config.strides:
        assert np.array_equal(bank.read(row, stride), live.features[stride])
    assert min(picture(tmp_path / "bank", info.id)[1].size) > 100
    kept = json.loads((tmp_path / "bank" / "plan.json").read_text())
    assert kept["features"]["processor"] == plan.features.processor
    # without --fit it goes on as it began
    assert encode([str(video)], tmp_path / "bank", EncodeOptions.of_plan(plan)).skipped == 1


class Seen:
    """What `cut_away` asks of a tower."""

    patch = 14

    def __init__(self, processor: object) -> None:
        self.pixels = Pixels.from_processor(processor)


def clip(name: str, height: int | None, width: int | None) -> ClipSource:
    return ClipSource(name, name, name, name, height=height, width=width)


def test_a_plan_says_what_is_cut_away_of_frames_of_each_size() -> None:
    clips = [clip("a", 272, 640), clip("b", 272, 640), clip("c", 720, 1280), clip("d", None, None)]
    square = {"height": 224, "width": 224}
    cropped = Seen(CLIPImageProcessorPil(size={"shortest_edge": 224}, crop_size=square))
    (line,) = cut_away(clips, cropped)  # type: ignore[arg-type]
    assert line == (
        "  cut away of each frame: 57% of 640x272 (2 clips), 44% of 1280x720 (1 clip); "
        "--fit pad or --fit stretch keeps the whole"
    )
    for fit in ("pad", "stretch"):
        cropped.pixels = cropped.pixels.fitted(fit)
        assert cut_away(clips, cropped) == []  # type: ignore[arg-type]
    # what patches leave over is not seen either
    (line,) = cut_away(clips[:1], Seen(SiglipImageProcessorPil(size={"height": 384, "width": 384})))  # type: ignore[arg-type]
    assert line == "  cut away of each frame: 3% of 640x272 (1 clip)"


@pytest.mark.parametrize(
    ("strides", "said"),
    [
        ((1, 8), None),
        ((4, 8), None),
        ((4, 64), "stride 64 is larger than the 8x8 patches of a frame: all of it is one cell"),
        ((9,), "as with stride 8"),
        ((4, 6), "strides 4, 6 make the same 2x2 cells of 8x8 patches: each stores them"),
        ((4, 16, 64), "strides 16, 64 make the same 1x1 cells of 8x8 patches"),
    ],
)
def test_strides_that_make_the_same_cells_or_go_beyond_the_frame_are_named(
    toy_options: EncodeOptions, strides: tuple[int, ...], said: str | None
) -> None:
    options = replace(toy_options, strides=strides)
    lines = coarse_strides(load_tower(options), options)
    assert len(lines) == (said is not None)
    assert said is None or said in lines[0]
