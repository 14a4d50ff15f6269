"""A model written file by file or in parts, by one process: what transformers itself writes and reads.

By several processes: tests/train/loop/test_sharded.py.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    Qwen3MoeConfig,
)

import model.fsdp.save
from model.fsdp.parts import read_into, read_parts, shapes_in, write_parts
from model.fsdp.save import llm_state, save_cut
from model.llm import base_of, load_llm
from model.vlm import VLM
from shards.errors import UserError

COMMON = {"vocab_size": 512, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**COMMON, **HEADS, tie_word_embeddings=False),
    "tied": LlamaConfig(**COMMON, **HEADS, tie_word_embeddings=True),
    "gemma2": Gemma2Config(**COMMON, **HEADS),
    "gpt2": GPT2Config(vocab_size=512, n_embd=16, n_layer=3, n_head=2),
    # its published names are others than those in memory
    "experts": Qwen3MoeConfig(**COMMON, **HEADS, **EXPERTS),
}


@pytest.fixture(scope="module", params=[*CONFIGS, "lora"])
def vlm(
    request: pytest.FixtureRequest,
    make_model: Callable[..., VLM],
    tmp_path_factory: pytest.TempPathFactory,
) -> VLM:
    config = CONFIGS.get(request.param, CONFIGS["llama"])
    torch.manual_seed(0)
    made = make_model(AutoModelForCausalLM.from_config(config))
    if request.param == "lora":
        base = tmp_path_factory.mktemp("base")
        made.llm.save_pretrained(base)
        made.llm = get_peft_model(made.llm, LoraConfig(r=2, target_modules="all-linear"))
        made.base = base_of(base, torch.float32, merged=False)
    return made


def weights_in(folder: Path) -> dict[str, Tensor]:
    return {
        f"{file.parent.relative_to(folder)}:{name}": value
        for file in sorted(folder.rglob("*.safetensors"))
        for name, value in load_file(file).items()
    }


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name, value in ours.items() if not torch.equal(value, theirs[name])] == []


def test_a_streamed_model_has_the_weights_that_a_plain_save_has(
    vlm: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm.save(tmp_path / "plain")
    save_cut(vlm, tmp_path / "one", whole=True)
    monkeypatch.setattr(model.fsdp.save, "FILE_BYTES", 1_000)
    for _ in range(2):  # a second time over the first
        save_cut(vlm, tmp_path / "many", whole=True)
    for name in ("one", "many"):
        assert_equal(weights_in(tmp_path / name), weights_in(tmp_path / "plain"))
        assert_equal(VLM.load(tmp_path / name).state_dict(), vlm.state_dict())
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name / "llm").state_dict()
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain/llm").state_dict()
        assert_equal(loaded, plain)
    assert len(list((tmp_path / "many/llm").glob("model-*-of-*.safetensors"))) >= 4
    files = [
        {p.relative_to(tmp_path / name).as_posix(): p.read_bytes() for p in folder.rglob("*.json")}
        for name in ("one", "plain")
        for folder in [tmp_path / name]
    ]
    assert files[0] == files[1]


def test_an_llm_in_parts_is_read_by_its_folder(vlm: VLM, tmp_path: Path) -> None:
    save_cut(vlm, tmp_path, whole=False)
    if vlm.base is None:
        write_parts(tmp_path / "llm", llm_state(vlm))
    assert_equal(VLM.load(tmp_path).state_dict(), vlm.state_dict())
    assert_equal(load_llm(tmp_path / "llm").state_dict(), vlm.llm.state_dict())


def test_tensors_of_any_shape_come_back(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    made = {
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
        "a/b": torch.randn(5, 3, 2, generator=generator),
        "half": torch.randn(7, generator=generator).bfloat16(),
        "whole": torch.arange(6),
        "flag": torch.tensor([True, False]),
        "view": torch.randn(8, 4, generator=generator)[2:5, 1:3],
    }
    write_parts(tmp_path, made)
    assert shapes_in(tmp_path) == {n: tuple(value.shape) or (1,) for n, value in made.items()}
    assert_equal({n: v.view(made[n].shape) for n, v in read_parts(tmp_path).items()}, made)
    again = {name: torch.zeros_like(value) for name, value in made.items()}
    read_into(tmp_path, again)
    assert_equal(again, made)


def test_a_folder_that_is_no_parts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="its weights do not read"):
        read_parts(tmp_path)
