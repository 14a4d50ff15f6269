"""Where a run may write: what is not its own is refused by name, and stays as it was.

pytest tests/train/test_output.py
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.folders import contents
from train.settings.output import file_problem, output_problem

FIX = "name a new folder, or the folder of a run to go on with"
Files = dict[str, str]
FOREIGN: dict[str, tuple[Files, str]] = {
    "bank": ({"bank.json": "{}", "shards/bank-000000.tar": ""}, "a bank (bank.json)"),
    "planned bank": ({"plan.json": "{}"}, "a bank (plan.json)"),
    "stage": ({"config.json": '{"model_type": "qwen2"}'}, "a model (config.json)"),
    "weights": ({"model.safetensors": ""}, "a model (model.safetensors)"),
    "shards of weights": (
        {"model-00001-of-00002.safetensors": ""},
        "a model (model-00001-of-00002.safetensors)",
    ),
    "adapter": ({"adapter_config.json": "{}"}, "a model (adapter_config.json)"),
    "tokenizer": ({"tokenizer.json": "{}"}, "a model (tokenizer.json)"),
    "exported": ({"config.json": '{"format": 1}'}, "a model (config.json)"),
    "VILA stage": ({"mm_projector/config.json": "{}"}, "a model (mm_projector/config.json)"),
    "run's llm": ({"tokenizer_config.json": "{}"}, "a model (tokenizer_config.json)"),
    "checkpoint": (
        {"checkpoint.json": "{}", "config.json": "{}"},
        "a checkpoint of a run (checkpoint.json)",
    ),
    "run over a stage": (
        {"run.json": '{"config": {}}', "config.json": '{"model_type": "qwen2"}'},
        "a model that no run of ours wrote (config.json)",
    ),
    "older run": (
        {"run.json": '{"config": {}}', "config.json": '{"format": 1}'},
        "a run of an older framebank, model format 1 (config.json)",
    ),
    "other trainer": (
        {"checkpoint-500/trainer_state.json": "{}"},
        "another trainer's output (checkpoint-500/trainer_state.json)",
    ),
    "records": ({"train.jsonl": "{}"}, "a dataset (train.jsonl)"),
    "list of records": ({"train.json": ' \n[{"id": 1}]'}, "a dataset (train.json)"),
    "videos": ({"a.MP4": ""}, "a dataset (a.MP4)"),
    "parquet": ({"x.parquet": ""}, "a dataset (x.parquet)"),
    "saved dataset": ({"dataset_info.json": "{}"}, "a dataset (dataset_info.json)"),
}
OURS: dict[str, Files] = {
    "empty": {},
    "notes": {"notes.txt": "", "config.yaml": "", "slurm-12.out": "", "accelerate.json": "{}"},
    "killed early": {
        "train.log": "",
        "dropped.jsonl": "",
        "metrics.jsonl": "",
        "logs/events": "",
        ".lock": "",
    },
    "run": {"run.json": '{"config": {}}', "metrics.jsonl": "", "predictions.jsonl": ""},
    "checkpoints alone": {"checkpoint-3/checkpoint.json": "{}", "metrics.jsonl": ""},
}


def fill(folder: Path, files: Files) -> Path:
    folder.mkdir()
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_not_a_runs_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    files, what = FOREIGN[kind]
    folder = fill(tmp_path / "out", files)
    expected = f"{folder}: {what}, which a run would write into; {FIX}"
    assert output_problem(folder, {}) == expected
    link = tmp_path / "link"
    link.symlink_to(folder)
    assert output_problem(link, {}) == expected.replace(str(folder), str(link))


@pytest.mark.parametrize("kind", OURS)
def test_a_runs_own_folder_and_an_empty_one_are_taken(kind: str, tmp_path: Path) -> None:
    assert output_problem(fill(tmp_path / "out", OURS[kind]), {}) is None


def test_a_place_where_nothing_can_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    (tmp_path / "good").mkdir()
    for folder, expected in {
        tmp_path / "file": f"{tmp_path / 'file'}: a file; name a folder",
        tmp_path / "file" / "a" / "b": f"{tmp_path / 'file'}: a file; name a folder",
        tmp_path
        / "link": f"{tmp_path / 'link'}: a link to {tmp_path / 'gone'}, which is not there; "
        "correct or remove it",
        tmp_path
        / "link"
        / "a": f"{tmp_path / 'link'}: a link to {tmp_path / 'gone'}, which is not "
        "there; correct or remove it",
        Path("s3://lab/runs"): "s3:/lab/runs: a URL; name a local folder",
        **{
            Path(
                path
            ): f"{path}: {word} is a shell's, and stands for nothing here; write the whole path"
            for word, path in {
                "~": "~/runs",
                "~lab": "~lab/runs",
                "${HOME}": "${HOME}/runs",
                "$SCRATCH": "/tmp/$SCRATCH/runs",
            }.items()
        },
        tmp_path / "a~b" / "5$": None,
        tmp_path / "good": None,
        tmp_path / "new" / "a": None,
    }.items():
        assert output_problem(folder, {}) == expected
    assert not (tmp_path / "new").exists()


def test_a_folder_of_somebody_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "theirs").mkdir(mode=0o555)
    if os.geteuid() == 0:  # whom modes do not bind: what another user is told
        allowed = os.access
        monkeypatch.setattr(
            os,
            "access",
            lambda path, how: allowed(path, how) and bool(os.stat(path).st_mode & 0o222),
        )
    for folder in (tmp_path / "theirs", tmp_path / "theirs" / "a" / "b"):
        expected = f"{tmp_path / 'theirs'}: not writable by this user; name another folder"
        assert output_problem(folder, {}) == expected


def test_a_run_does_not_write_over_what_it_reads(tmp_path: Path) -> None:
    run = fill(tmp_path / "a", OURS["run"] | {"checkpoint-6/llm/config.json": "{}"})
    for inside in ("", "checkpoint-6", "checkpoint-6/llm", "metrics.jsonl"):
        problem = output_problem(run, {"bank": ["x"], "stage_path": [str(run / inside)]})
        assert problem == (
            f"{run}: the run would write over its own stage_path {run / inside}; {FIX}"
        )
    for other in (tmp_path, run / "predictions.jsonl", "Qwen/Qwen2.5-0.5B"):
        assert output_problem(run, {"stage_path": [str(other)]}) is None
    assert output_problem(run / "second", {"stage_path": [str(run)]}) is None


def test_a_file_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    assert file_problem(tmp_path / "eval.json") is None
    assert file_problem(tmp_path) == f"{tmp_path}: a folder; name a file"
    lost = tmp_path / "gone" / "eval.json"
    assert file_problem(lost) == f"{lost}: its folder is not there; make {tmp_path / 'gone'}"


@pytest.mark.parametrize("what", ["stage_path", "bank", "data_path"])
def test_a_run_that_is_told_to_write_into_an_input_leaves_every_byte(
    run_settings: Mapping[str, Any],
    as_flags: Callable[[Mapping[str, Any]], list[str]],
    refused: Callable[..., str],
    what: str,
) -> None:
    from train.run import main

    given = Path(run_settings[what])
    folder = given.parent if what == "data_path" else given
    before = contents(folder)
    line = refused(main, as_flags({**run_settings, "output_dir": folder}))
    assert line.startswith(f"error: --output_dir output_dir: {folder}: ")
    assert line.endswith(FIX)
    assert contents(folder) == before


def test_what_is_written_in_a_runs_folder_is_known(trained_run: Path) -> None:
    """Nothing of a finished run makes it look like somebody else's."""
    assert output_problem(trained_run, {}) is None
    facts = json.loads((trained_run / "config.json").read_text())
    (trained_run / "run.json").rename(trained_run / "hidden")
    try:
        assert output_problem(trained_run, {}) is None, "its checkpoints tell"
    finally:
        (trained_run / "hidden").rename(trained_run / "run.json")
    assert facts["format"]
