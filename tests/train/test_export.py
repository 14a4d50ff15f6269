"""`train.export hf`: what transformers alone makes of it, what we make of it, what it says of itself."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from model.vlm import VLM
from train.export import main

IDS = torch.arange(3, 40)[None]


@pytest.fixture(scope="module")
def adapted(train_here: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of LoRA, whose checkpoint names the LLM that it was trained over."""
    out = tmp_path_factory.mktemp("adapted") / "run"
    return train_here(out, tune_llm="lora", lora_r=4, lora_alpha=16, max_steps=3, frame_time="text")


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["hf", *argv])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("error: ")


def logits(llm: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = llm.eval()(IDS).logits
    return out


def test_a_whole_run_comes_out_with_the_same_logits(trained_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    main(["hf", str(trained_run), str(out)])
    llm = AutoModelForCausalLM.from_pretrained(out / "llm")
    model = VLM.load(trained_run)
    assert torch.equal(logits(llm), logits(model.llm))
    alone = AutoTokenizer.from_pretrained(out / "llm")
    assert alone.get_vocab() == model.llm_tokenizer.get_vocab()
    known = llm.get_input_embeddings().num_embeddings
    assert max(alone("Say <TEMP-003> at 1.5").input_ids) < known  # no id without a row
    assert len(model.tokenizer) > len(alone)
    again = VLM.load(out)
    ours, theirs = model.state_dict(), again.state_dict()
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    text = (out / "README.md").read_text()
    for file in (path.name for path in out.iterdir() if path.name != "README.md"):
        assert f"| `{file}" in text
    assert f"coordinate tokens from id {model.lape.tokens.all_ids[0]} on" in text
    assert "layer: -2" in text
    assert "slow, fast stride: 4, 8" in text
    assert "adapter" not in text
    assert "None" not in text
    assert str(trained_run.parent) not in text, "no path of this machine"


def test_an_adapter_is_merged_on_request_and_else_lies_beside(
    adapted: Path, tmp_path: Path
) -> None:
    theirs = logits(VLM.load(adapted).llm)
    main(["hf", str(adapted), str(tmp_path / "merged"), "--merge_lora"])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged" / "llm")
    torch.testing.assert_close(logits(merged), theirs, rtol=1e-4, atol=1e-4)
    assert not (tmp_path / "merged" / "llm" / "lora").exists()
    # the checkpoint holds no LLM: it is brought along
    main(["hf", str(adapted / "checkpoint-3"), str(tmp_path / "beside")])
    peft = pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "beside" / "llm")
    assert not torch.allclose(logits(base), theirs, rtol=1e-4, atol=1e-4)
    beside = peft.PeftModel.from_pretrained(base, tmp_path / "beside" / "llm" / "lora")
    assert torch.equal(logits(beside), theirs)
    assert "PeftModel.from_pretrained" in (tmp_path / "beside" / "README.md").read_text()
    assert VLM.load(tmp_path / "merged").config.frame_time == "text"


def test_the_llm_comes_out_in_the_type_asked_for(trained_run: Path, tmp_path: Path) -> None:
    main(["hf", str(trained_run), str(tmp_path / "out"), "--dtype", "bfloat16"])
    weights = load_file(tmp_path / "out" / "llm" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    llm = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "llm", dtype="auto")
    assert llm.dtype == torch.bfloat16


def test_what_cannot_be_exported_is_refused_in_a_line(
    trained_run: Path, toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    assert "no trained model here" in refused(capsys, str(tmp_path), out)
    assert "not a framebank model" in refused(capsys, str(toy / "llm"), out)
    assert "has no LoRA adapter" in refused(capsys, str(trained_run), out, "--merge_lora")
    shutil.copytree(toy / "llm", out)
    assert f"{out}: not empty" in refused(capsys, str(trained_run), out)


def test_whoever_may_read_the_folder_may_read_its_weights(trained_run: Path, adapted: Path) -> None:
    for run in (trained_run, adapted):
        files = [path for path in run.rglob("*") if path.is_file() and "logs" not in path.parts]
        modes = {oct(path.stat().st_mode & 0o777): path.name for path in files}
        assert len(modes) == 1, modes


def test_what_cannot_take_an_export_is_refused_before_the_model_is_loaded(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for out, expected in {
        tmp_path / "file": "a file; name a folder",
        tmp_path
        / "link": f"a link to {tmp_path / 'gone'}, which is not there; correct or remove it",
    }.items():
        assert refused(capsys, str(trained_run), str(out)) == f"{out}: {expected}"
    (tmp_path / "out").mkdir()
    (tmp_path / "out.tmp").mkdir()  # of an export that was killed
    (tmp_path / "out.tmp" / "left").write_text("")
    main(["hf", str(trained_run), str(tmp_path / "out")])
    assert not (tmp_path / "out" / "left").exists()
    assert not (tmp_path / "out.tmp").exists()


def test_a_run_that_was_copied_in_part_is_not_exported(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained_run, run, ignore=shutil.ignore_patterns("checkpoint-*"))
    (run / "llm" / "model.safetensors").write_bytes(b"")
    line = refused(capsys, str(run), str(tmp_path / "out"))
    assert line == f"{run / 'llm' / 'model.safetensors'}: empty; copy or download it again"
    assert not (tmp_path / "out").exists()
