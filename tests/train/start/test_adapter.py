"""LoRA over each kind of LLM family: which matrices have an adapter, how it is saved and merged."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from model.adapter.targets import adapted_weights
from model.family.__main__ import class_and_config
from model.family.head import decoder_of
from model.family.twin import make_twin, shrunk
from model.llm import load_llm, save_llm
from model.vlm import VLM, VLMConfig
from shards.errors import UserError
from train.settings.config import TrainConfig
from train.start.prepare_llm import llm_dtype, prepare_llm

pytestmark = pytest.mark.usefixtures("quiet_thread")
CPU = torch.device("cpu")
STAYS: dict[str, tuple[str, ...]] = {
    "llama": (),
    "qwen2": (),
    "gemma2": (),
    "gemma3": (),
    "phi3": (),
    "cohere": (),
    "granite": (),
    "gpt2": (),
    "mixtral": (".mlp.gate.weight",),
    "qwen2_moe": (".mlp.gate.weight",),
    "qwen3_moe": (".mlp.gate.weight",),
    "deepseek_v3": (".mlp.gate.weight",),
    "hunyuan_v1_moe": (".mlp.gate.wg.weight",),
    "gpt_oss": (".mlp.router.weight",),
    "granitemoe": (".block_sparse_moe.router.weight",),
    "llama4_text": (".feed_forward.router.weight",),
    "longcat_flash": (".mlp.router.classifier.weight",),
    "phimoe": (".mlp.router.weight",),
    "jetmoe": (".router.layer.weight",),
    "doge": (".self_attn.dt_proj.weight",),
    "laguna": (".mlp.gate.weight",),
}
"""Family -> what stays as it is of the matrices in its layers: dense ones, fused ones, experts."""
FIRST = ("gemma3", "phi3", "qwen3_moe", "deepseek_v3", "gpt_oss", "llama4_text", "laguna")
FAMILIES = [
    family if family in FIRST else pytest.param(family, marks=pytest.mark.slow) for family in STAYS
]
TABLES = ("embed_tokens.weight", "wte.weight", "wpe.weight", "lm_head.weight")


def prepared(family: str, **settings: Any) -> VLM:
    """Return a model over a tiny random LLM of a family, as a run of these settings prepares it."""
    config = TrainConfig(lora_r=4, lora_alpha=8, **settings)
    llm = make_twin(*class_and_config(family), seed=1).to(llm_dtype(config))
    facts: dict[str, Any] = {"width": 4, "features": {"pool": "average"}, "tower": "none"}
    kind = VLMConfig(enable_lape=False, loss_weight=0, mm_projector_type="linear")
    model = VLM.assemble(kind, llm, None, **facts)
    torch.manual_seed(3)
    prepare_llm(model, config, "eager", CPU)
    return model.eval()


def with_adapter(family: str, **settings: Any) -> Any:
    """Return a family's LLM whose adapter changes what it says."""
    llm = prepared(family, tune_llm="lora", **settings).llm
    for name, weight in llm.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.1)
    return llm


def logits(llm: Any) -> Tensor:
    ids = torch.randint(8, 90, (2, 24), generator=torch.Generator().manual_seed(5))
    out: Tensor = llm(input_ids=ids).logits.float()
    return out


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_of_the_layers_has_an_adapter_that_learns(family: str) -> None:
    llm = with_adapter(family)
    plain = make_twin(*class_and_config(family), seed=1)
    decoder = {id(p) for p in decoder_of(plain).parameters()}
    expected = {
        name
        for name, p in plain.named_parameters()
        if id(p) in decoder
        and p.ndim > 1
        and not name.endswith((*TABLES, *STAYS[family]))
        and "_bias" not in name
    }
    assert adapted_weights(llm) == expected
    # with `mean`, gradients of so small a network are lost in nothing
    logits(llm).square().sum().backward()
    trained = {name: p for name, p in llm.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(expected)
    assert all(p.grad is not None and p.grad.any() for p in trained.values())


EXPERTS: dict[str, tuple[str, ...]] = {
    "qwen2": (),
    "qwen2_moe": (".mlp.experts.",),
    "qwen3_moe": (".mlp.experts.",),
    "mixtral": (".mlp.experts.",),
    "deepseek_v3": (".mlp.experts.",),
    "gpt_oss": (".mlp.experts.",),
    "llama4_text": (".feed_forward.experts.",),
    "granitemoe": (".block_sparse_moe.experts.",),
    "jetmoe": (".input_linear.weight", ".output_linear.weight"),
    "laguna": (".mlp.experts.",),
    "phimoe": (".mlp.experts.",),
}
"""Family -> parts of the names of its routed experts' weights."""


@pytest.mark.parametrize("family", EXPERTS)
def test_routed_experts_alone_have_no_adapter_where_they_are_left_out(family: str) -> None:
    whole = adapted_weights(prepared(family, tune_llm="lora").llm)
    model = prepared(family, tune_llm="lora", lora_experts=False)
    left = {name for name in whole if any(part in name for part in EXPERTS[family])}
    assert bool(left) == bool(EXPERTS[family])
    assert adapted_weights(model.llm) == whole - left
    # a run that starts from it goes on with it, and not with another
    config = TrainConfig(lora_r=4, lora_alpha=8, tune_llm="lora")
    prepare_llm(model, replace(config, lora_experts=False), "eager", CPU)
    if left:
        with pytest.raises(UserError, match=r"lora_experts false, expected .* lora_experts true"):
            prepare_llm(model, config, "eager", CPU)
        model = prepared(family, tune_llm="lora")
        with pytest.raises(UserError, match=r"set lora_r: 4, .* lora_experts: true"):
            prepare_llm(model, replace(config, lora_experts=False), "eager", CPU)
    else:
        prepare_llm(model, config, "eager", CPU)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_an_adapter_comes_back_to_the_bit_and_merged_it_says_the_same(
    family: str, tmp_path: Path
) -> None:
    llm = with_adapter(family)
    own = logits(llm)
    assert not torch.allclose(own, logits(make_twin(*class_and_config(family), seed=1)), rtol=0.1)
    save_llm(llm, tmp_path / "llm")
    again = load_llm(tmp_path / "llm").eval()
    again.set_attn_implementation("eager")
    assert torch.equal(logits(again), own)
    save_llm(again, tmp_path / "again")
    files = [tmp_path / name / "lora" / "adapter_config.json" for name in ("llm", "again")]
    targets, later = (json.loads(file.read_text()) for file in files)
    # a twin is of no folder
    assert later | {"base_model_name_or_path": None} == targets
    for part in (targets["target_modules"], targets["target_parameters"] or []):
        assert part == sorted(part), "in the order of a set it is another file in each process"
    trained = {name for name, p in llm.named_parameters() if p.requires_grad}
    assert {name for name, p in again.named_parameters() if p.requires_grad} == trained
    merged = logits(llm.merge_and_unload())
    assert (merged - own).abs().max() < 1e-4 * own.square().mean().sqrt()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_run_over_experts_resumes_to_the_bit(
    family: str, train_here: Callable[..., Path], toy: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(toy / "llm")
    llm_class, config = class_and_config(family)
    ids = {"bos_token_id": None, "pad_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    small = type(config).from_dict(shrunk(config) | ids | {"vocab_size": len(tokenizer)})
    torch.manual_seed(0)
    llm_class(small).save_pretrained(tmp_path / "llm")
    tokenizer.save_pretrained(tmp_path / "llm")
    settings = {"tune_llm": "lora", "lora_r": 4, "lora_alpha": 8, "save_steps": 2, "max_steps": 4}
    settings |= {"stage_path": tmp_path / "llm", "gradient_checkpointing": "full"}
    whole = train_here(tmp_path / "whole", **settings)
    resumed = tmp_path / "resumed"
    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
    train_here(resumed, **settings)
    file = Path("llm/lora/adapter_model.safetensors")
    ours, theirs = load_file(resumed / file), load_file(whole / file)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert all(value.any() for name, value in ours.items() if "lora_B" in name), "B starts at zero"


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_adapters_of_experts_in_bfloat16_are_fp32_and_learn(family: str) -> None:
    llm = with_adapter(family, bf16=True)
    with torch.autocast("cpu", torch.bfloat16):
        logits(llm).square().sum().backward()
    for name, p in llm.named_parameters():
        assert p.dtype == (torch.float32 if "lora_" in name else torch.bfloat16), name
        assert p.requires_grad == ("lora_" in name), name
        assert not p.requires_grad or (p.grad is not None and p.grad.any()), name


def test_what_no_token_reaches_is_not_trained() -> None:
    """Gemma 3 comes with a tower of its own, which stands beside the decoder."""
    model = prepared("gemma3", tune_llm="full")
    logits(model.llm).square().sum().backward()
    for name, p in model.llm.named_parameters():
        reached = "vision_tower" not in name and "multi_modal_projector" not in name
        assert p.requires_grad == reached == (p.grad is not None), name


def test_layers_that_no_adapter_reaches_are_refused_in_a_line() -> None:
    with pytest.raises(
        UserError, match=r"lora: MambaForCausalLM cannot .*out_proj.*tune_llm: full"
    ):
        prepared("mamba", tune_llm="lora")


@pytest.mark.parametrize("damage", ["missing", "extra", "shape"])
def test_an_adapter_that_does_not_fit_is_refused_by_name(damage: str, tmp_path: Path) -> None:
    save_llm(with_adapter("qwen2"), tmp_path / "llm")
    file = tmp_path / "llm" / "lora" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    tensor = tensors.pop(name)
    if damage != "missing":
        tensors[name if damage == "shape" else f"{name}s"] = tensor[:-1].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"adapter_model.*layers\.1\.mlp\.up_proj\.lora_B"):
        load_llm(tmp_path / "llm")
