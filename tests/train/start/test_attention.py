"""Which attention a run takes: the choice says its reason, and what cannot work is refused."""

from dataclasses import replace
from pathlib import Path

import pytest

from shards.errors import UserError
from train.settings.config import TrainConfig, parse
from train.start.prepare_llm import choose_attention

CHOICES = [
    ("cuda", {"pack_tokens": 4096}, "flex_attention", "only attended blocks"),
    ("cpu", {"pack_tokens": 4096}, "sdpa", "packed rows, record by record"),
    ("cpu", {"pack_tokens": 4096, "compile": True}, "sdpa", "packed rows, with a dense mask"),
    ("cuda", {}, "sdpa", "frames that see themselves wholly need a dense mask"),
    ("cpu", {"frame_attention": "token"}, "sdpa", "no mask at all"),
    ("cuda", {"frame_attention": "token", "pack_tokens": 64}, "flex_attention", "packed"),
    ("cpu", {"attn": "eager"}, "eager", "as asked"),
    ("cuda", {"attn": "flex_attention"}, "flex_attention", "as asked"),
]


def choose(config: TrainConfig, device: str, longest: int) -> tuple[str, str]:
    return choose_attention(config, device, longest)


@pytest.mark.parametrize(("device", "settings", "chosen", "reason"), CHOICES)
def test_the_choice_follows_mask_and_device(
    device: str, settings: dict[str, object], chosen: str, reason: str
) -> None:
    found, why = choose(TrainConfig(**settings), device, 2048)  # type: ignore[arg-type]
    assert found == chosen
    assert why.startswith(reason) or reason in why
    assert "would be faster" not in why


def test_rows_much_longer_than_a_record_are_advised_against_under_a_dense_mask() -> None:
    config = TrainConfig(pack_tokens=4097)
    compiled, eager = replace(config, compile=True), replace(config, attn="eager")
    for one in (compiled, eager):
        assert "pack_tokens 4096 or less would be faster" in choose(one, "cpu", 2048)[1]
        assert "faster" not in choose(one, "cpu", 2049)[1]
    assert "faster" not in choose(config, "cuda", 2048)[1]
    assert "faster" not in choose(config, "cpu", 2048)[1]


def test_flex_attention_is_refused_where_it_cannot_train() -> None:
    with pytest.raises(UserError, match="flex_attention needs CUDA"):
        choose(TrainConfig(attn="flex_attention"), "cpu", 100)


REFUSED = [
    ([], "frames cannot see themselves wholly in it; use frame_attention: token, or attn: auto"),
    (
        ["--frame_attention", "token", "--pack_tokens", "512"],
        "it would let packed records see each other; use attn: auto, or pack_tokens: 0",
    ),
]


@pytest.mark.parametrize(("flags", "reason"), REFUSED)
def test_flash_attention_is_refused_where_it_would_be_wrong(
    flags: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(["--attn", "flash_attention_2", *flags], {})
    assert f"--attn attn flash_attention_2: {reason}" in capsys.readouterr().err


def test_flash_attention_may_serve_single_causal_records(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "flash_attn.py").write_text("")  # as if it were installed
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit):
        parse(["--attn", "flash_attention_2", "--frame_attention", "token"], {})
    assert "flash" not in capsys.readouterr().err  # only paths are missing


def test_a_switch_needs_no_value(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--plan", "--bf16", "false", "--tf32=no", "--pack_tokens"], {})
    text = capsys.readouterr().err
    assert "--pack_tokens: needs a value" in text
    assert "--plan" not in text
