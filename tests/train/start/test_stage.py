"""What a run starts from: LLMs, runs, VILA stages and LLaVA checkpoints, and what is taken of each.

VILA's folders are written here from the names its code gives them; LLaVA's by transformers itself.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionConfig,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    SiglipVisionConfig,
)

from model.projector import build_projector
from model.vlm import VLM
from shards.errors import UserError
from train.data.dataset import open_dataset
from train.settings.config import TrainConfig
from train.start.stage import bank_problem, build, kind_of, read_config

Tensors = dict[str, torch.Tensor]
LAPE = {"num_temporal_tokens": 20, "num_spatial_tokens": 30}
TABLES = ("temporal", "spatial_height", "spatial_width")
SMALL = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}


@pytest.fixture(scope="module")
def start(run_settings: dict[str, Any]) -> Callable[..., tuple[VLM, list[str]]]:
    """A function that returns the model a run starts with, and what is said of it."""

    def make(stage: Path, **settings: Any) -> tuple[VLM, list[str]]:
        config = TrainConfig(
            stage_path=str(stage),
            bank=[str(run_settings["bank"])],
            data_path=[str(run_settings["data_path"])],
            **(LAPE | settings),
        )
        lines: list[str] = []
        model = build(config, open_dataset(config), lines.append)
        assert all(line.startswith("stage     ") for line in lines)
        return model.eval(), [line.removeprefix("stage     ") for line in lines]

    return make


@pytest.fixture(scope="module")
def width(toy_bank: Path) -> int:
    return int(json.loads((toy_bank / "bank.json").read_text())["tower_width"])


def save_llava(folder: Path, toy: Path, width: int, kind: str = "onevision") -> Tensors:
    """Save a random LLaVA over the toy LLM by transformers itself; return its tensors as written."""
    llm = AutoModelForCausalLM.from_pretrained(toy / "llm")
    vision = SMALL | {"hidden_size": width}
    text = llm.config
    text.tie_word_embeddings = False
    model: Any
    if kind == "onevision":
        tower: Any = SiglipVisionConfig(**vision)
        model = LlavaOnevisionForConditionalGeneration(
            LlavaOnevisionConfig(vision_config=tower, text_config=text)
        )
    else:
        tower = CLIPVisionConfig(**vision)
        model = LlavaNextVideoForConditionalGeneration(
            LlavaNextVideoConfig(vision_config=tower, text_config=text)
        )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(toy / "llm").save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def rewrite(folder: Path, tensors: Tensors) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def save_vila(folder: Path, toy: Path, width: int, kind: str) -> Tensors:
    """Write a VILA stage: its three folders and the config.json above them; return the projector."""
    shutil.copytree(toy / "llm", folder / "llm")
    llm_width = json.loads((toy / "llm" / "config.json").read_text())["hidden_size"]
    (folder / "vision_tower").mkdir()
    (folder / "mm_projector").mkdir()
    parts = {
        "llm_cfg": "llm",
        "vision_tower_cfg": "vision_tower",
        "mm_projector_cfg": "mm_projector",
    }
    facts: dict[str, Any] = {name: {"_name_or_path": path} for name, path in parts.items()}
    facts |= {"model_type": "llava_llama", "architectures": ["LlavaLlamaModel"]}
    (folder / "config.json").write_text(json.dumps(facts))
    own = {"model_type": "v2l_projector", "mm_projector_type": kind}
    (folder / "mm_projector" / "config.json").write_text(json.dumps(own))
    torch.manual_seed(5)
    projector = build_projector(kind, width, llm_width).state_dict()
    prefixed = {f"layers.{name}": value for name, value in projector.items()}
    save_file(prefixed, folder / "mm_projector" / "model.safetensors", metadata={"format": "pt"})
    return projector


def same(module: torch.nn.Module, tensors: Tensors) -> bool:
    own = module.state_dict()
    assert set(own) == set(tensors)
    return all(torch.equal(own[name], tensors[name]) for name in own)


def llm_of(tensors: Tensors) -> Tensors:
    """Return the LLM's tensors of a checkpoint of the older layout, as the LLM names them."""
    start = "language_model."
    return {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}


@pytest.mark.parametrize("layout", ["older", "newer"])
@pytest.mark.parametrize("kind", ["onevision", "next_video"])
def test_a_llava_checkpoint_gives_its_llm_and_its_projector(
    start: Callable[..., tuple[VLM, list[str]]],
    toy: Path,
    width: int,
    tmp_path: Path,
    kind: str,
    layout: str,
) -> None:
    tensors = save_llava(tmp_path, toy, width, kind)
    if layout == "newer":
        renamed = {
            f"model.{n}".replace("model.language_model.model.", "model.language_model.").replace(
                "model.language_model.lm_head", "lm_head"
            ): t
            for n, t in tensors.items()
        }
        assert "model.language_model.embed_tokens.weight" in renamed
        rewrite(tmp_path, renamed)
    assert kind_of(str(tmp_path)) == "llava"
    model, lines = start(tmp_path)
    assert same(model.llm, llm_of(tensors))
    projector = {"0": "linear_1", "2": "linear_2"}
    assert same(
        model.projector,
        {
            f"{place}.{part}": tensors[f"multi_modal_projector.{name}.{part}"]
            for place, name in projector.items()
            for part in ("weight", "bias")
        },
    )
    towers = sum(name.startswith("vision_tower") for name in tensors)
    assert lines == [
        f"LLM: Qwen2ForCausalLM from {tmp_path}",
        "projector: from the stage (mlp2x_gelu, 4 tensors); features are pooled before it here, so "
        "it has to be tuned again",
        "lape: new, the stage has no coordinate tables",
        "visual: new, the stage has none",
        "frame_causal: new, the stage has none",
        "ignored: image_newline (1 tensor)",
        f"ignored: vision_tower ({towers} tensors): the bank's features replace it",
    ]
    # saved, its LLM is one that transformers knows by itself
    model.save(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "llm")
    assert same(again, llm_of(tensors))


@pytest.mark.parametrize("tune", ["lora", "frozen"])
def test_a_checkpoint_over_a_llava_stage_names_it_and_comes_back(
    train_here: Callable[..., Path],
    toy: Path,
    width: int,
    tmp_path: Path,
    tune: str,
) -> None:
    save_llava(tmp_path / "stage", toy, width)
    settings = {"tune_llm": tune, "lora_r": 4, "max_steps": 1, "stage_path": tmp_path / "stage"}
    out = train_here(tmp_path / "out", **settings)
    base = json.loads((out / "checkpoint-1" / "llm" / "base.json").read_text())
    assert (base["path"], base["merged"]) == (str(tmp_path / "stage"), False)
    ours, theirs = VLM.load(out).state_dict(), VLM.load(out / "checkpoint-1").state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert "stage     projector: from the stage" in (out / "train.log").read_text()


def save_llava_st(folder: Path, toy: Path, width: int) -> Tensors:
    """Write a checkpoint as LLaVA's own code does, with LLaVA-ST's coordinate tables."""
    shutil.copytree(toy / "llm", folder)
    facts = json.loads((folder / "config.json").read_text())
    facts |= {"model_type": "llava_qwen", "architectures": ["LlavaQwenForCausalLM"]}
    facts |= {"mm_projector_type": "mlp2x_gelu", "mm_vision_tower": "x", "mm_hidden_size": width}
    (folder / "config.json").write_text(json.dumps(facts))
    tensors = load_file(folder / "model.safetensors")
    torch.manual_seed(6)
    for name, value in (
        build_projector("mlp2x_gelu", width, facts["hidden_size"]).state_dict().items()
    ):
        tensors[f"model.mm_projector.{name}"] = value
    for where, rows in zip(TABLES, (20, 30, 30), strict=True):
        for role in ("input", "output"):
            name = f"model.{where}_{role}_embeddings.weight"
            tensors[name] = torch.randn(rows, facts["hidden_size"])
    tensors["model.vision_resampler.x"] = torch.zeros(2)
    rewrite(folder, tensors)
    return tensors


def test_llavas_own_checkpoints_give_llava_sts_tables_too(
    start: Callable[..., tuple[VLM, list[str]]], toy: Path, width: int, tmp_path: Path
) -> None:
    stage = tmp_path / "stage"
    tensors = save_llava_st(stage, toy, width)
    model, lines = start(stage, lape_preset="st")
    plain = load_file(toy / "llm" / "model.safetensors")
    assert all(torch.equal(model.llm.state_dict()[name], plain[name]) for name in plain)
    for part in ("0.weight", "2.bias"):
        assert torch.equal(
            model.projector.state_dict()[part], tensors[f"model.mm_projector.{part}"]
        )
    assert model.lape
    assert model.calibrated
    assert model.lape.gamma.tolist() == [1, 1, 1]
    for axis, where in enumerate(TABLES):
        for role in ("input", "output"):
            table = getattr(model.lape, f"{role}_tables")[axis]
            assert torch.equal(table, tensors[f"model.{where}_{role}_embeddings.weight"])
    assert "lape: from the stage, 20 temporal, 30 spatial anchors (LLaVA-ST)" in lines
    assert "ignored: vision_resampler (1 tensor)" in lines
    with pytest.raises(UserError, match=r"preset st \(LLaVA-ST\), asked plus; set lape_preset: st"):
        start(stage)
    with pytest.raises(
        UserError,
        match=r"input_tables.0 is \(20, 128\), the config asks for \(25, 128\).*; set "
        "num_temporal_tokens 20, num_spatial_tokens 30",
    ):
        start(stage, lape_preset="st", num_temporal_tokens=25)
    _, lines = start(stage, enable_lape=False)
    assert "ignored: coordinate tables, enable_lape is off" in lines


@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu", "mlp3x_gelu"])
def test_a_vila_stage_gives_its_llm_and_its_projector(
    start: Callable[..., tuple[VLM, list[str]]], toy: Path, width: int, tmp_path: Path, kind: str
) -> None:
    stage = tmp_path / "stage"
    projector = save_vila(stage, toy, width, kind)
    (stage / "lape_embeddings.bin").write_bytes(b"pickle")
    assert kind_of(str(stage)) == "vila"
    model, lines = start(stage, mm_projector_type=kind)
    assert same(model.projector, projector)
    assert lines[0] == f"LLM: Qwen2ForCausalLM from {stage / 'llm'}"
    assert lines[1].startswith(f"projector: from the stage ({kind}, {len(projector)} tensors)")
    assert lines[-2:] == [
        "ignored: lape_embeddings.bin: pickles are not read",
        "ignored: vision_tower: the bank's features replace it",
    ]


def test_a_stage_of_another_projector_is_taken_without_it(
    start: Callable[..., tuple[VLM, list[str]]], toy: Path, width: int, tmp_path: Path
) -> None:
    save_vila(tmp_path / "stage", toy, width, "mlp_downsample_3x3_fix")
    _, lines = start(tmp_path / "stage")
    assert lines[1] == (
        "projector: new (mlp2x_gelu), the stage's is mlp_downsample_3x3_fix: set mm_projector_type to it"
    )
    shutil.rmtree(tmp_path / "stage" / "mm_projector")
    _, lines = start(tmp_path / "stage")
    assert lines[1] == "projector: new (mlp2x_gelu), the stage has none"


def test_a_tensor_of_another_shape_is_refused_by_name(
    start: Callable[..., tuple[VLM, list[str]]], toy: Path, width: int, tmp_path: Path
) -> None:
    save_vila(tmp_path / "vila", toy, width + 2, "mlp2x_gelu")
    save_llava(tmp_path / "llava", toy, width + 2)
    for stage in ("vila", "llava"):
        with pytest.raises(UserError, match=rf"{stage}: projector \(mlp2x_gelu\)") as caught:
            start(tmp_path / stage)
        wrong = f"0.weight is (128, {width + 2}), the config asks for (128, {width})"
        assert wrong in str(caught.value)
        assert f"the bank's tower has width {width}; use a bank of the tower" in str(caught.value)


def test_an_llm_that_its_config_does_not_fit_is_refused_by_name(
    start: Callable[..., tuple[VLM, list[str]]], toy: Path, width: int, tmp_path: Path
) -> None:
    tensors = save_llava(tmp_path, toy, width)
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    rewrite(tmp_path, tensors | {name: tensors[name][:5].clone()})
    with pytest.raises(
        UserError,
        match=r"model.layers.1.mlp.up_proj.weight is \(5, 128\), the config asks for \(384",
    ):
        start(tmp_path)
    rewrite(tmp_path, {n: t for n, t in tensors.items() if n != name})
    with pytest.raises(UserError, match=r"weights are missing: model.layers.1.mlp.up_proj.weight"):
        start(tmp_path)
    # what the config does not count would be left out, and the LLM be another one
    for other in (name.replace(".1.", ".7."), name.replace("weight", "bias")):
        rewrite(tmp_path, tensors | {other: tensors[name].clone()})
        with pytest.raises(UserError, match=f"{other} has no place in the LLM that its config"):
            start(tmp_path)
    frequencies = "language_model.model.layers.1.self_attn.rotary_emb.inv_freq"
    rewrite(tmp_path, tensors | {frequencies: torch.ones(4)})
    start(tmp_path)


def test_a_model_without_a_causal_llm_is_refused_in_a_line(
    start: Callable[..., tuple[VLM, list[str]]], toy: Path, tmp_path: Path
) -> None:
    shutil.copytree(toy / "llm", tmp_path / "stage")
    shutil.copy(toy / "tower" / "config.json", tmp_path / "stage")
    with pytest.raises(
        UserError, match=r"stage: not a causal LLM, nor a LLaVA checkpoint"
    ) as caught:
        start(tmp_path / "stage")
    assert len(str(caught.value).splitlines()) == 1
    assert "Siglip" in str(caught.value)


CURES: list[tuple[Callable[[Any], Any], str]] = [
    (
        lambda facts: facts["features"].update(tower_digest="00" * 16),
        ", another tower; set bank to one that was made with its tower (preprocess encode --tower ",
    ),
    (lambda facts: facts["features"].update(layer=-1), "of layer -1 of "),
    (
        lambda facts: facts.update(tower_width=96),
        "its projector takes features of width 96 of layer",
    ),
    (
        lambda facts: facts["model"].update(mm_projector_type="linear"),
        "its projector is linear, asked mlp2x_gelu; set mm_projector_type: linear, or start from its "
        "LLM alone: stage_path: ",
    ),
]


@pytest.mark.parametrize(("change", "expected"), CURES)
def test_a_runs_projector_that_does_not_fit_names_the_setting_that_cures_it(
    start: Callable[..., tuple[VLM, list[str]]],
    trained_run: Path,
    tmp_path: Path,
    change: Callable[[Any], Any],
    expected: str,
) -> None:
    stage = tmp_path / "run"
    shutil.copytree(trained_run, stage, ignore=shutil.ignore_patterns("checkpoint-*"))
    facts = json.loads((stage / "config.json").read_text())
    change(facts)
    (stage / "config.json").write_text(json.dumps(facts))
    with pytest.raises(UserError) as caught:
        start(stage)
    assert expected in str(caught.value)
    # the LLM alone starts anew, as the message says
    assert f"stage_path: {stage}/llm" in str(caught.value)
    start(stage / "llm")


def test_a_stages_own_tower_is_named_where_it_is_another(
    start: Callable[..., tuple[VLM, list[str]]], toy: Path, width: int, tmp_path: Path
) -> None:
    kinds = (("ok", width), ("wide", width + 1))
    for name, wide in kinds:
        save_vila(tmp_path / name, toy, wide, "mlp2x_gelu")
        path = tmp_path / name / "config.json"
        tower = {"vision_tower_cfg": {"_name_or_path": "google/siglip-so400m-patch14-384"}}
        path.write_text(json.dumps(json.loads(path.read_text()) | tower))
    _, lines = start(tmp_path / "ok")
    (line,) = [line for line in lines if line.startswith("projector: ")]
    assert "it was trained behind google/siglip-so400m-patch14-384, the bank's tower is " in line
    with pytest.raises(
        UserError, match=r"preprocess encode --tower google/siglip-so400m-patch14-384\)"
    ):
        start(tmp_path / "wide")


def test_an_llm_and_a_run_are_told_what_they_gave(
    start: Callable[..., tuple[VLM, list[str]]], toy: Path, trained_run: Path
) -> None:
    assert start(toy / "llm")[1] == [f"LLM: Qwen2ForCausalLM from {toy / 'llm'}"]
    lines = start(trained_run, num_spatial_tokens=20)[1]
    assert lines[0] == f"LLM: Qwen2ForCausalLM from {trained_run / 'llm'}"
    assert f"projector.safetensors: from {trained_run}" in lines


def of_pool(features: Any) -> None:
    features["pool"] = "max"


def of_pixels(features: Any) -> None:
    features["processor"]["image_mean"] = [0.25, 0.25, 0.25]


def of_arithmetic(features: Any) -> None:
    features["tower_dtype"] = "bfloat16"


def of_sampling(features: Any) -> None:
    features["sampling"]["max_frames"] = 3


def of_strides(features: Any) -> None:
    features["strides"] = [4]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (of_pool, "pool: 'average' here, 'max' there"),
        (of_pixels, "processor.image_mean: "),
        (of_arithmetic, "tower_dtype: 'float32' here, 'bfloat16' there"),
        (of_sampling, ""),
        (of_strides, ""),
    ],
)
def test_features_of_the_runs_own_tower_that_were_made_otherwise_are_told(
    start: Callable[..., tuple[VLM, list[str]]],
    trained_run: Path,
    tmp_path: Path,
    change: Callable[[Any], None],
    expected: str,
) -> None:
    stage = tmp_path / "run"
    shutil.copytree(trained_run, stage, ignore=shutil.ignore_patterns("checkpoint-*"))
    facts = json.loads((stage / "config.json").read_text())
    change(facts["features"])
    (stage / "config.json").write_text(json.dumps(facts))
    told = [
        line for line in start(stage, num_spatial_tokens=20)[1] if line.startswith("features: ")
    ]
    assert len(told) == bool(expected)
    assert all(expected in line for line in told)


def test_a_joining_projector_needs_finer_strides_in_the_bank(
    run_settings: dict[str, Any], toy: Path
) -> None:
    def problem(**settings: Any) -> str | None:
        config = TrainConfig(
            stage_path=str(toy / "llm"),
            bank=[str(run_settings["bank"])],
            data_path=[str(run_settings["data_path"])],
            **settings,
        )
        return bank_problem(config, open_dataset(config))

    assert problem() is None
    assert problem(mm_projector_type="mlp3x_gelu") is None
    slow = {"mm_projector_type": "mlp_downsample_2x2_fix"}
    assert problem(**slow, mm_spatial_pool_stride=8, fast_stride=8, slow_frame_ratio="1") is None
    assert problem(**slow) == (
        "mm_projector_type mlp_downsample_2x2_fix: joins 2x2 cells into a token, so that tokens of "
        "stride 4 take cells of stride 4/2, and the bank holds the strides 4, 8; encode with --stride "
        "2,4,8, or use mlp2x_gelu"
    )
    assert str(problem(mm_projector_type="mlp_downsample_3x3_fix")).endswith(
        "take an mm_spatial_pool_stride and fast_stride that are multiples of 3, or use mlp2x_gelu"
    )


def test_a_run_learns_through_a_joining_projector(
    train_here: Callable[..., Path], toy: Path, width: int, tmp_path: Path
) -> None:
    kind = "mlp_downsample_2x2_fix"
    projector = save_vila(tmp_path / "stage", toy, width, kind)
    settings = {"mm_projector_type": kind, "mm_spatial_pool_stride": 8, "slow_frame_ratio": "1"}
    out = train_here(tmp_path / "out", stage_path=tmp_path / "stage", max_steps=2, **settings)
    after = VLM.load(out).projector.state_dict()
    assert all(not torch.equal(after[name], projector[name]) for name in projector)


def test_a_norm_is_measured_by_the_first_run_and_stays_with_the_model(
    toy: Path, train_here: Callable[..., Path], tmp_path: Path
) -> None:
    """On the records that LAPE's gamma is set from; a run that starts from a run measures nothing."""
    made = {"mm_projector_type": "norm_mlp2x_gelu", "max_steps": 2, "lape_share": 0.5}
    first = train_here(tmp_path / "first", stage_path=toy / "llm", **made)
    second = train_here(tmp_path / "second", stage_path=first, seed=5, **made)
    bare = train_here(tmp_path / "bare", stage_path=toy / "llm", enable_lape=False, **made)
    one, two, three = (VLM.load(folder) for folder in (first, second, bare))
    for norm in (model.projector[0] for model in (one, two, three)):
        assert norm.measured
        assert torch.equal(norm.mean, one.projector[0].mean)
        assert torch.equal(norm.std, one.projector[0].std)
    assert not torch.equal(one.projector[1].weight, two.projector[1].weight)


def test_a_folder_that_is_gone_has_no_config_and_is_no_hub_name() -> None:
    assert read_config("gone/toy/tower") is None
    assert read_config("/nowhere/at/all") is None
