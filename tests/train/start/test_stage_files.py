"""Stages that cannot be started from: a line each, within a moment, and no code of theirs is run.

pytest tests/train/start/test_stage_files.py
"""

import json
import os
import pty
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from model.llm import load_llm, read_tensors
from model.vlm import VLM
from shards.errors import UserError
from train.start.stage_files import model_problem, safetensors_header, stage_problem

ROOT = Path(__file__).resolve().parents[3]
QUANTISED = (
    "and only unquantised ones can be trained or trained over; name the model it was made from"
)
COPY = "copy or download it again"
LLM = "name a causal LLM, such as Qwen/Qwen2.5-0.5B"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4967215360\n"


def config(**facts: Any) -> Callable[[Path], None]:
    """A function that changes a stage's config.json."""

    def change(stage: Path) -> None:
        path = stage / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | facts))

    return change


def cut(stage: Path) -> None:
    with open(stage / "model.safetensors", "r+b") as file:
        file.truncate(os.fstat(file.fileno()).st_size - 1000)


def cut_header(stage: Path) -> None:
    with open(stage / "model.safetensors", "r+b") as file:
        file.truncate(100)


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda stage: (stage / name).write_text(text) and None


def remove(*names: str) -> Callable[[Path], None]:
    return lambda stage: [(stage / name).unlink() for name in names] and None


def in_parts(*without: str) -> Callable[[Path], None]:
    """A function that cuts a stage's weights into files, as large models are saved."""

    def change(stage: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(stage)
        (stage / "model.safetensors").unlink()
        model.save_pretrained(stage, max_shard_size="1MB")
        assert len(list(stage.glob("model-*-of-*.safetensors"))) > 2
        for pattern in without:
            for path in stage.glob(pattern):
                path.unlink()

    return change


def fp8(stage: Path) -> None:
    path = stage / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, path)


def gptq_tensors(stage: Path) -> None:
    path = stage / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    tensors["model.layers.0.mlp.up_proj.qweight"] = torch.zeros(4, 4, dtype=torch.int32)
    save_file(tensors, path)


def quantised(**facts: Any) -> Callable[[Path], None]:
    return config(quantization_config=facts)


def adapter(stage: Path) -> None:
    remove("config.json", "model.safetensors")(stage)
    (stage / "adapter_config.json").write_text('{"base_model_name_or_path": "x/y"}')


def bank(stage: Path) -> None:
    remove("config.json")(stage)
    (stage / "bank.json").write_text("{}")


Change = Callable[[Path], None]
STAGES: dict[str, tuple[Change, str]] = {
    "remote code": (
        config(model_type="owncode", auto_map={"AutoConfig": "configuration_own.OwnConfig"}),
        ": its model is code in its own folder (auto_map, model_type owncode), which is never run; "
        "take a form of it that transformers itself has, or another LLM",
    ),
    "4 bits": (
        quantised(quant_method="bitsandbytes", load_in_4bit=True),
        f": its weights are quantised (bitsandbytes, 4 bits), {QUANTISED}",
    ),
    "8 bits": (
        quantised(quant_method="bitsandbytes", load_in_8bit=True),
        f": its weights are quantised (bitsandbytes, 8 bits), {QUANTISED}",
    ),
    "gptq": (
        quantised(quant_method="gptq", bits=4),
        f": its weights are quantised (gptq, 4 bits), {QUANTISED}",
    ),
    "awq": (
        quantised(quant_method="awq", bits=4),
        f": its weights are quantised (awq, 4 bits), {QUANTISED}",
    ),
    "fp8": (quantised(quant_method="fp8"), f": its weights are quantised (fp8), {QUANTISED}"),
    "mxfp4": (quantised(quant_method="mxfp4"), f": its weights are quantised (mxfp4), {QUANTISED}"),
    "compressed": (
        config(compression_config={"quant_method": "compressed-tensors"}),
        f": its weights are quantised (compressed-tensors), {QUANTISED}",
    ),
    "old gptq": (
        write("quantize_config.json", '{"bits": 4}'),
        f": its weights are quantised (gptq), {QUANTISED}",
    ),
    "fp8 unsaid": (
        fp8,
        "/model.safetensors: its weights are quantised (model.layers.0.mlp.up_proj.weight is "
        f"F8_E4M3), {QUANTISED}",
    ),
    "gptq unsaid": (
        gptq_tensors,
        "/model.safetensors: its weights are quantised (model.layers.0.mlp.up_proj.qweight is I32), "
        f"{QUANTISED}",
    ),
    "cut off": (cut, f"/model.safetensors: cut off, it has {{short}} of {{size}} bytes; {COPY}"),
    "cut in its header": (cut_header, f"/model.safetensors: cut off in its header; {COPY}"),
    "empty": (write("model.safetensors", ""), f"/model.safetensors: empty; {COPY}"),
    "web page": (
        write("model.safetensors", "<!DOCTYPE html><html></html>"),
        f"/model.safetensors: not a safetensors file; {COPY}",
    ),
    "LFS": (
        write("model.safetensors", POINTER),
        ": model.safetensors: pointers of Git LFS in place of the files; run `git lfs pull` there, or "
        "download the model again",
    ),
    "LFS tokenizer": (
        write("tokenizer.json", POINTER),
        ": tokenizer.json: pointers of Git LFS in place of the files; run `git lfs pull` there, or "
        "download the model again",
    ),
    "missing shard": (
        in_parts("model-00002-of-*"),
        f": weights are missing: model-00002-of-{{count}}.safetensors; {COPY}",
    ),
    "missing index": (
        in_parts("*.index.json"),
        ": model.safetensors.index.json is missing, which says which of the {parts} "
        f"weight files holds which tensor; {COPY}",
    ),
    "missing both": (
        in_parts("*.index.json", "model-00001-of-*"),
        f": weights are missing: model-00001-of-{{count}}.safetensors; {COPY}",
    ),
    "no weights": (
        remove("model.safetensors"),
        f": no weights here (model.safetensors is missing); {COPY}",
    ),
    "broken config": (
        write("config.json", '{"model_type": "qw'),
        "/config.json: not valid JSON (Unterminated string starting at: line 1 column 16 (char 15)); "
        f"{COPY}",
    ),
    "tokenizer cut off": (
        write("tokenizer.json", '{"version": "1.0", '),
        "/tokenizer.json: not valid JSON (Expecting property name enclosed in double quotes: line 1 "
        f"column 20 (char 19)); {COPY}",
    ),
    "tower": (
        config(model_type="siglip_vision_model", architectures=["SiglipVisionModel"]),
        f": a vision tower (siglip_vision_model), which `preprocess encode --tower` takes; {LLM}",
    ),
    "whole tower": (
        config(model_type="clip", architectures=["CLIPModel"]),
        f": a vision tower (clip), which `preprocess encode --tower` takes; {LLM}",
    ),
    "encoder": (
        config(model_type="bert", architectures=["BertForMaskedLM"]),
        f": an encoder (bert), whose tokens see later ones; {LLM}",
    ),
    "encoder-decoder": (
        config(model_type="t5", architectures=["T5"], is_encoder_decoder=True),
        f": an encoder-decoder (t5), not a causal LLM; {LLM}",
    ),
    "classifier": (
        config(architectures=["Qwen2ForSequenceClassification"]),
        f": a classifier (Qwen2ForSequenceClassification), whose head writes no text; {LLM}",
    ),
    "tokenizer": (
        remove("config.json", "model.safetensors", "generation_config.json"),
        ": a tokenizer without an LLM; name the folder that holds both",
    ),
    "adapter": (
        adapter,
        ": a LoRA adapter (adapter_config.json), not an LLM; merge it first: PeftModel.from_pretrained"
        "(llm, adapter).merge_and_unload().save_pretrained(FOLDER), and name FOLDER",
    ),
    "bank": (
        bank,
        f": a bank of features, not a model; give it by --bank, and {LLM} by stage_path",
    ),
}


@pytest.fixture
def stage(toy: Path, tmp_path: Path) -> Path:
    shutil.copytree(toy / "llm", tmp_path / "stage")
    return tmp_path / "stage"


@pytest.mark.parametrize("kind", STAGES)
def test_a_stage_that_cannot_be_trained_is_one_line(stage: Path, kind: str) -> None:
    change, expected = STAGES[kind]
    size = (stage / "model.safetensors").stat().st_size
    assert stage_problem(str(stage)) is None
    change(stage)
    parts = sorted(stage.glob("model-*-of-*.safetensors"))
    count = parts[0].stem.rpartition("-")[2] if parts else "0"
    numbers = {
        "size": f"{size:,}",
        "short": f"{size - 1000:,}",
        "count": count,
        "parts": int(count),
    }
    assert stage_problem(str(stage)) == f"{stage}{expected}".format(**numbers)


def test_a_stage_that_is_no_folder_of_a_model_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_text("")
    assert stage_problem(str(file)) == (
        f"{file}: a file; name the folder that holds config.json and the weights"
    )
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, expected in (
        ("", f"no model here: config.json is missing, the folder holds nothing; {LLM}"),
        ("notes.txt", f"no model here: config.json is missing, the folder holds notes.txt; {LLM}"),
        ("a.gguf", "GGUF weights, which are not read; name the LLM's safetensors folder"),
    ):
        if name:
            (folder / name).write_text("")
        assert stage_problem(str(folder)) == f"{folder}: {expected}"


@pytest.mark.slow
def test_stages_that_can_be_trained_are_let_in(stage: Path, trained_run: Path) -> None:
    config(auto_map={"AutoModelForCausalLM": "modeling_qwen2.Own"})(
        stage
    )  # transformers has it too
    assert stage_problem(str(stage)) is None
    in_parts()(stage)
    assert stage_problem(str(stage)) is None
    for run in (trained_run, next(trained_run.glob("checkpoint-*"))):
        assert stage_problem(str(run)) is None
        assert model_problem(run) is None


def test_an_adapter_without_peft_is_told_before_torch(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained_run, run, ignore=shutil.ignore_patterns("checkpoint-*"))
    (run / "llm" / "lora").mkdir()
    assert stage_problem(str(run)) is None
    monkeypatch.setitem(sys.modules, "peft", None)
    assert stage_problem(str(run)) == (
        f"{run}: has a LoRA adapter (llm/lora), and peft is not installed; pip install peft"
    )


@pytest.mark.parametrize(
    "part", ["projector.safetensors", "llm/model.safetensors", "lape/tables.safetensors"]
)
def test_a_runs_folder_that_was_copied_in_part_is_one_line(
    trained_run: Path, tmp_path: Path, part: str
) -> None:
    shutil.copytree(trained_run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*"))
    file = tmp_path / "run" / part
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    for problem in (stage_problem(str(tmp_path / "run")), model_problem(tmp_path / "run")):
        assert (
            problem == f"{file}: cut off, it has {len(data) - 1:,} of {len(data):,} bytes; {COPY}"
        )
    with pytest.raises(UserError, match=r"its weights do not read \(.*\); copy or download"):
        VLM.load(tmp_path / "run")


def test_a_run_of_an_older_framebank_is_one_line(trained_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained_run, run, ignore=shutil.ignore_patterns("checkpoint-*"))
    facts = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(facts | {"format": 1}))
    problem = stage_problem(str(run))
    assert problem is not None
    assert "of format 1, before framebank's 3: its frame predictor does not take the s" in problem
    assert stage_problem(str(run / "llm")) is None, "what the line advises"


def test_headers_are_what_safetensors_reads(toy: Path) -> None:
    path = toy / "llm" / "model.safetensors"
    header = safetensors_header(path)
    tensors = load_file(path)
    assert {name: tuple(facts["shape"]) for name, facts in header.items()} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }


def test_code_of_a_stage_is_neither_run_nor_asked_about(
    stage: Path,
    run_settings: Mapping[str, Any],
    as_flags: Callable[[Mapping[str, Any]], list[str]],
    tmp_path: Path,
) -> None:
    """At a terminal, where transformers would ask whether it may."""
    STAGES["remote code"][0](stage)
    (stage / "configuration_own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    settings = {**run_settings, "stage_path": stage, "output_dir": tmp_path / "out"}
    ours, theirs = pty.openpty()
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "train.run", *as_flags(settings)],
        stdin=theirs,
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=60,
    )
    os.close(ours)
    os.close(theirs)
    assert time.monotonic() - began < 14, "it waits 15 s for an answer"
    assert done.returncode == 2
    assert done.stderr == f"error: {stage}{STAGES['remote code'][1]}\n"
    assert done.stdout == ""
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="its model is code of its own, which is never run"):
        load_llm(stage)


def test_a_tokenizer_that_is_code_is_not_run(stage: Path) -> None:
    from model.family.limits import load_tokenizer

    (stage / "tokenizer.json").unlink()
    facts = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (stage / "tokenizer_config.json").write_text(json.dumps(facts))
    config(model_type="cohere2_own")(stage)
    with pytest.raises(UserError) as caught:
        load_tokenizer(stage)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("last", ["50KB", "400KB", "10GB"])
def test_weights_that_an_earlier_save_left_are_not_read(
    toy: Path, tmp_path: Path, last: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(toy / "llm")
    for size in ("400KB", "100KB", last):
        with torch.no_grad():
            for weight in model.parameters():
                weight += 1
        # transformers removes the parts that it has written before: a copy over a folder does not
        model.save_pretrained(tmp_path / size, max_shard_size=size)
        shutil.copytree(tmp_path / size, tmp_path / "all", dirs_exist_ok=True)
    assert len(list((tmp_path / "all").glob("*.safetensors"))) > 3
    read = read_tensors(tmp_path / "all", lambda name: name)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "all").state_dict()
    assert read
    for name, value in read.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=0)
