"""Runs over LLMs of other families: what the door allows trains, saves, answers; the rest is one line."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Lfm2Config,
    MistralConfig,
)

from model.family.conformance import admit
from model.vlm import VLM

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
CONFIGS: dict[str, Any] = {
    "mistral": MistralConfig(num_hidden_layers=2, head_dim=8, sliding_window=24, **SIZES),
    "gemma2": Gemma2Config(num_hidden_layers=2, head_dim=8, sliding_window=24, **SIZES),
    "lfm2": Lfm2Config(num_hidden_layers=2, full_attn_idxs=[1], **SIZES),
}


@pytest.fixture
def llm_of(toy: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A function that makes a random LLM of a family, beside the toy world's tokenizer."""

    def make(family: str) -> Path:
        folder = tmp_path / family
        shutil.copytree(toy / "llm", folder, ignore=shutil.ignore_patterns("*.safetensors"))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(CONFIGS[family]).save_pretrained(folder)
        return folder

    return make


RUNS: list[tuple[str, dict[str, Any], str]] = [
    ("mistral", {"pack_tokens": 512}, "sdpa"),
    ("gemma2", {"pack_tokens": 512}, "eager"),
    ("lfm2", {"frame_attention": "token"}, "sdpa"),
]


@pytest.mark.parametrize(("family", "settings", "attention"), RUNS)
def test_a_family_that_is_right_trains_saves_and_answers(
    train_here: Callable[..., Path],
    llm_of: Callable[[str], Path],
    tmp_path: Path,
    family: str,
    settings: dict[str, Any],
    attention: str,
) -> None:
    out = train_here(tmp_path / "run", stage_path=llm_of(family), max_steps=2, **settings)
    assert f"attention {attention}: " in (out / "train.log").read_text()
    model = VLM.load(out).eval()
    assert admit(model)[0] == attention
    assert model.masked == (family != "lfm2")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "frame_attention block"),
        ({"frame_attention": "token", "pack_tokens": 512}, "pack_tokens"),
    ],
)
def test_a_family_with_a_state_is_refused_in_one_line(
    train_here: Callable[..., Path],
    llm_of: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    settings: dict[str, Any],
    words: str,
) -> None:
    with pytest.raises(SystemExit) as stop:
        train_here(tmp_path / "run", stage_path=llm_of("lfm2"), max_steps=2, **settings)
    assert stop.value.code == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert f"lfm2 (Lfm2ForCausalLM) is refused with {words}: its layers carry a state" in line


def test_a_back_end_that_a_family_lacks_is_refused_when_asked_for(
    train_here: Callable[..., Path],
    llm_of: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        train_here(tmp_path / "run", stage_path=llm_of("gemma2"), attn="sdpa", max_steps=2)
    assert "attn sdpa: gemma2 (Gemma2ForCausalLM) is wrong" in capsys.readouterr().err


def test_a_record_longer_than_the_llm_reads_is_refused_or_cut(
    train_here: Callable[..., Path],
    llm_of: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(CONFIGS["mistral"], "max_position_embeddings", 148)
    llm = llm_of("mistral")
    with pytest.raises(SystemExit):
        train_here(tmp_path / "long", stage_path=llm, max_steps=1)
    text = capsys.readouterr().err
    assert "the longest record has" in text
    assert "the LLM reads 148" in text
    assert "set max_tokens: 148" in text
    train_here(tmp_path / "cut", stage_path=llm, max_steps=1, max_tokens=148)
