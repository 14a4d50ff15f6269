"""What is trained and in which type, recomputed activations, and compiled layers."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.batch import Batch
from model.family.__main__ import class_and_config
from model.family.head import decoder_of, layers_of
from model.family.twin import make_twin
from model.vlm import VLM
from shards.errors import UserError
from train.settings.config import TrainConfig, checkpoint_every
from train.start.prepare_llm import checkpoint_activations, llm_dtype, prepare_llm

CPU = torch.device("cpu")
QUESTION, ANSWER = "Look.<video>\nWhen?", "red from <t:0.4> to <t:3.3>"


def gradients(model: VLM, batch: Batch) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16, enabled=llm_of(model).dtype == torch.bfloat16):
        out = model(batch)
    (out["ce"] + out["ar"].sum()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def tally(counts: list[int], place: int, module: Any, args: Any) -> None:
    counts[place] += 1


def llm_of(model: VLM) -> Tensor:
    return model.llm.get_input_embeddings().weight


@pytest.mark.parametrize(
    ("word", "every"),
    [("none", 0), ("false", 0), ("full", 1), ("True", 1), ("1", 1), ("3", 3), ("0", 0)]
    + [(word, None) for word in ("often", "-1", "1.5", "")],
)
def test_gradient_checkpointing_is_a_word_or_a_number(word: str, every: int | None) -> None:
    assert checkpoint_every(word) == every


@pytest.mark.parametrize("tune_llm", ["full", "frozen", "lora"])
@pytest.mark.parametrize("every", ["full", "2"])
def test_recomputed_activations_give_the_same_gradients(
    make_model: Callable[..., VLM],
    make_batch: Callable[..., Any],
    make_clip: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tune_llm: str,
    every: str,
) -> None:
    found, runs = [], []
    for word in ("none", every):
        torch.manual_seed(1)  # LoRA's matrices are drawn
        model = make_model()
        config = TrainConfig(tune_llm=tune_llm, gradient_checkpointing=word, lora_r=4)
        prepare_llm(model, config, "sdpa", CPU)
        batch = make_batch(model, ([make_clip()], QUESTION, ANSWER))
        counts = [0, 0]
        for number, layer in enumerate(model.llm.get_decoder().layers):
            layer.mlp.register_forward_pre_hook(partial(tally, counts, number))
        found.append(gradients(model, batch))
        runs.append(counts)
    assert runs == [[1, 1], [2, 2] if every == "full" else [2, 1]]
    plain, recomputed = found
    assert plain.keys() == recomputed.keys()
    for name, grad in plain.items():
        assert torch.equal(grad, recomputed[name]), name


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("tune_llm", ["full", "frozen", "lora"])
def test_what_is_trained_is_fp32_and_what_is_frozen_as_small_as_asked(
    make_model: Callable[..., VLM],
    make_llm: Callable[..., Any],
    make_batch: Callable[..., Any],
    make_clip: Callable[..., Any],
    tune_llm: str,
    bf16: bool,
) -> None:
    config = TrainConfig(tune_llm=tune_llm, bf16=bf16, lora_r=4)
    model = make_model(make_llm().to(llm_dtype(config)))
    prepare_llm(model, config, "sdpa", CPU)
    frozen = torch.bfloat16 if bf16 and tune_llm != "full" else torch.float32
    for name, parameter in model.named_parameters():
        of_llm = name.startswith("llm.") and "lora_" not in name
        assert parameter.requires_grad == (not of_llm or tune_llm == "full"), name
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else frozen), name
    batch = make_batch(model, ([make_clip()], QUESTION, ANSWER))
    grads = gradients(model, batch)
    assert grads.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads.values())
    moved = {name.split(".")[0] for name, grad in grads.items() if grad.any()}
    assert moved == {"projector", "visual", "lape", "frame_causal"} | (
        {"llm"} if tune_llm != "frozen" else set()
    )


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_compiled_layers_give_the_same_gradients(
    make_model: Callable[..., VLM],
    make_batch: Callable[..., Any],
    make_clip: Callable[..., Any],
    checkpointing: str,
) -> None:
    found = []
    for compiled in (False, True):
        model = make_model()
        config = TrainConfig(compile=compiled, gradient_checkpointing=checkpointing)
        prepare_llm(model, config, "sdpa", CPU)
        names = list(model.state_dict())
        found.append(gradients(model, make_batch(model, ([make_clip()], QUESTION, ANSWER))))
    assert not any("_orig_mod" in name for name in names)  # a checkpoint is the same
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-3, atol=1e-3, msg=name)


def test_where_nothing_can_be_compiled_the_reason_is_told(
    make_model: Callable[..., VLM], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no C++ compiler\nand much more")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(UserError, match=r"compile: .* here: no C\+\+ compiler; set compile: false"):
        prepare_llm(make_model(), TrainConfig(compile=True), "sdpa", CPU)


FAMILIES = [
    "gpt2",
    "bloom",
    "falcon",
    "mpt",
    "qwen2",
    "gemma3",
    "llama4_text",
    "modernbert-decoder",
]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layers_of_any_family_are_found(family: str) -> None:
    llm = make_twin(*class_and_config(family), seed=1)
    layers = layers_of(decoder_of(llm))
    # `layers`, `h`, `transformer.blocks`: the family's own names count from 0
    names = [name for name, module in llm.named_modules() if module in layers]
    assert [name.rpartition(".")[2] for name in names] == [str(k) for k in range(len(layers))]
    assert len({name.rpartition(".")[0] for name in names}) == 1
    config = llm.config.get_text_config()
    assert len(layers) == config.num_hidden_layers


def test_a_family_that_cannot_recompute_is_refused() -> None:
    llm = make_twin(*class_and_config("jetmoe"), seed=1)
    with pytest.raises(UserError, match=r"gradient_checkpointing: JetMoe.*set .*: none"):
        checkpoint_activations(llm, 1)


def with_adapter(model: VLM, tmp_path: Path) -> VLM:
    """Return a saved model with a LoRA adapter of rank 4, loaded again."""
    prepare_llm(model, TrainConfig(tune_llm="lora", lora_r=4, lora_alpha=8), "sdpa", CPU)
    model.save(tmp_path / "run")
    return VLM.load(tmp_path / "run")


def test_an_llm_that_an_adapter_was_merged_into_is_trained_whole(
    make_model: Callable[..., VLM], make_batch: Callable[..., Any], tmp_path: Path
) -> None:
    model = with_adapter(make_model(), tmp_path)
    model.llm = model.llm.merge_and_unload()
    prepare_llm(model, TrainConfig(tune_llm="full"), "sdpa", CPU)
    assert all(p.requires_grad for p in model.llm.parameters())
    model(make_batch(model, ([], QUESTION.replace("<video>", ""), "ok")))["ce"].backward()
    pulled = [name for name, p in model.llm.named_parameters() if p.grad is not None]
    assert len(pulled) == len(list(model.llm.parameters()))


@pytest.mark.parametrize("asked", [{"lora_r": 64}, {"lora_alpha": 64}])
def test_an_adapter_of_another_size_is_refused_by_name(
    make_model: Callable[..., VLM], tmp_path: Path, asked: dict[str, int]
) -> None:
    model = with_adapter(make_model(), tmp_path)
    own = {"lora_r": 4, "lora_alpha": 8}
    prepare_llm(model, TrainConfig(tune_llm="lora", **own), "sdpa", CPU)  # type: ignore[arg-type]
    config = TrainConfig(tune_llm="lora", **(own | asked))  # type: ignore[arg-type]
    with pytest.raises(
        UserError, match=r"has lora_r 4, lora_alpha 8, expected .*64.*set lora_r: 4"
    ):
        prepare_llm(model, config, "sdpa", CPU)


def test_a_part_that_is_asked_for_and_not_trainable_is_named(
    make_model: Callable[..., VLM],
) -> None:
    model = make_model()
    model.projector.requires_grad_(False)
    with pytest.raises(AssertionError, match="asked for and not trainable: projector"):
        prepare_llm(model, TrainConfig(tune_llm="full"), "sdpa", CPU)
