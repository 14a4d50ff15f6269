"""Bad records stop a run, or are left out, counted and listed: as settings say, and no more than that.

pytest tests/train/data/test_drops.py
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shards.errors import UserError
from train.batches.lengths import REFUSED
from train.batches.plan import all_drops, plan_run
from train.convert import main as convert
from train.data.dataset import open_dataset, open_records
from train.data.drops import most_of, record_settings
from train.evaluate import arguments
from train.run import main as run
from train.settings.config import DataSettings, TrainConfig, parse


def row(id_: str, answer: str | None, video: str = "a.mp4", **more: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<video>?"}, {"from": "gpt", "value": answer}]
    return {"id": id_, "video": video, "conversations": turns} | more


GOOD = [row(f"good{k}", "from <t:0.1> to <t:0.5>") for k in range(6)]
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "backwards": (row("backwards", "from <t:0.5> to <t:0.1>"), "span backwards"),
    "late": (row("late", "from <t:0.5> to <t:7>"), "time past the end of its clip"),
    "mute": (row("mute", " "), "no supervised text"),
    "typo": (row("typo", "at <t:0,5>"), "misspelt coordinate"),
    "outside": (row("outside", "at <x:1.5>"), "coordinate outside its clip or frame"),
    "tagless": (row("tagless", "x", video=["a.mp4", "b.mp4"]), "tags do not fit the media"),  # type: ignore[arg-type]
}


@dataclass
class World:
    folder: Path
    bank: Path

    def file(self, *rows: dict[str, Any], name: str = "r.jsonl", broken: bool = False) -> str:
        path = self.folder / name
        lines = [json.dumps(row) for row in rows] + ["{broken"] * broken
        path.write_text("\n".join(lines) + "\n")
        return str(path)

    def config(self, *paths: str, **changes: Any) -> TrainConfig:
        return TrainConfig(**({"bank": [str(self.bank)], "data_path": list(paths)} | changes))


@pytest.fixture
def world(make_bank: Callable[..., Path], tmp_path: Path) -> World:
    arrays = {4: np.zeros((8, 2, 2, 5), np.float16), 8: np.zeros((8, 1, 1, 5), np.float16)}
    return World(tmp_path, make_bank(tmp_path / "bank", {"a.mp4": arrays}, quarantined=("q.mp4",)))


def refused(config: TrainConfig) -> list[str]:
    with pytest.raises(UserError) as stop:
        open_dataset(config)
    return stop.value.problems


ROWS = [*GOOD, *(row for row, _ in BAD.values()), row("gone", "x", video="q.mp4")]


def test_bad_records_are_refused_all_together_with_what_can_be_done(world: World) -> None:
    path = world.file(*ROWS, broken=True)
    *lines, advice = refused(world.config(path))
    assert sorted(line.split(": ")[0] for line in lines) == sorted(
        [*(f"{path}:{7 + k} (id {name})" for k, name in enumerate(BAD)), f"{path}:14"]
    )
    assert advice == (
        "7 bad records are refused: correct them, or set on_bad_record: drop, which leaves such records "
        "out, counts them and lists them in dropped.jsonl, or unsupervised: drop for those without an "
        "answer"
    )


def test_bad_records_are_left_out_counted_and_listed(world: World) -> None:
    path = world.file(*ROWS, broken=True)
    config = world.config(path, eval_path=[path], on_bad_record="drop", bad_record_limit="7")
    dataset = open_dataset(config)
    assert [r.id for r in dataset.records] == [r["id"] for r in GOOD]
    assert [r.id for r in dataset.held_out] == [r["id"] for r in GOOD]
    reasons = {reason for _, reason in BAD.values()} | {"not readable", "clip in quarantine"}
    assert dataset.dropped == dict.fromkeys(reasons, 1)
    listed = [(d.file, d.row, d.id, d.reason) for d in dataset.drops if not d.held_out]
    assert set(listed) == {
        *((path, str(7 + k), name, BAD[name][1]) for k, name in enumerate(BAD)),
        (path, "13", "gone", "clip in quarantine"),
        (path, "14", "", "not readable"),
    }
    assert len(dataset.drops) == 2 * len(listed)
    late = next(drop for drop in dataset.drops if drop.id == "late")
    assert late.text.startswith(f"{path}:8 (id late): time 7 is outside [0, 1]")
    notes = dataset.notes
    assert notes[0].startswith("held-out records left out: 1 ")
    assert "what is left out is listed in dropped.jsonl" in notes


def test_more_than_the_limit_is_refused_by_count_or_share_of_each_file(world: World) -> None:
    path = world.file(*GOOD, BAD["backwards"][0], BAD["typo"][0])
    drop = {"on_bad_record": "drop"}
    for fine in ("2", "25%", "50%"):
        assert len(open_dataset(world.config(path, **drop, bad_record_limit=fine)).records) == 6
    for strict in ("1", "24.9%", "0"):
        (line,) = refused(world.config(path, **drop, bad_record_limit=strict))
        assert line.startswith(
            f"{path}: 2 of 8 records are bad (1 span backwards, 1 misspelt coordinate), more than "
            f"bad_record_limit {strict} allows; the first: {path}:7 (id backwards): "
        )
    # whatever is wrong with a row, it is one row: 1 of 7 is 14.3 %
    for name, (bad, reason) in BAD.items():
        path = world.file(*GOOD, bad, name=f"{name}.jsonl")
        (line,) = refused(world.config(path, **drop, bad_record_limit="14%"))
        assert line.startswith(f"{path}: 1 of 7 records are bad (1 {reason}), more than")
    # many good files do not hide one that is bad throughout
    wrong = world.file(BAD["typo"][0], name="wrong.jsonl")
    (line,) = refused(world.config(path, wrong, **drop))
    assert line.startswith(f"{wrong}: 1 of 1 records are bad")


@pytest.mark.parametrize(("text", "most"), [("3", 3), ("1%", Fraction(2)), ("0.5%", Fraction(1))])
def test_a_limit_is_a_number_or_a_share(text: str, most: Fraction) -> None:
    assert most_of(text, 200) == most


def test_times_past_the_end_are_refused_clipped_or_dropped(world: World) -> None:
    path = world.file(*GOOD, BAD["late"][0], row("behind", "from <t:3> to <t:7>"))
    said = refused(world.config(path))
    assert [line.partition("(id ")[2].partition(";")[0] for line in said[:-1]] == [
        "late): time 7 is outside [0, 1]",
        "behind): time 3 is outside [0, 1]",
        "behind): time 7 is outside [0, 1]",
    ]
    assert said[-1].startswith("2 bad records are refused")
    dropped = open_dataset(world.config(path, times_past_end="drop"))
    assert dropped.dropped == {"time past the end of its clip": 2}
    # a span that begins after its clip: to end it with the clip is no fix where that is done already
    left = [line.partition("; times_past_end")[0] for line in said[1:-1]]
    assert refused(world.config(path, times_past_end="clip"))[:-1] == left != said[1:-1]
    both = open_dataset(world.config(path, times_past_end="clip", on_bad_record="drop"))
    assert [record.id for record in both.records][-1] == "late"
    assert both.records[-1].turns[1].text == "from <t:0.5> to <t:1.000000>"
    assert "1 records have spans that now end with their clip" in both.notes


def test_a_setting_of_its_own_drops_one_kind_and_no_other(world: World) -> None:
    path = world.file(*GOOD, BAD["mute"][0], BAD["typo"][0])
    (line,) = refused(world.config(path, unsupervised="drop"))
    assert "(id typo)" in line
    assert line.endswith(
        "; correct it, or set on_bad_record: drop, which leaves such records out, counts them and lists "
        "them in dropped.jsonl"
    )
    path = world.file(*GOOD, *[BAD["mute"][0]] * 30)
    dataset = open_dataset(world.config(path, unsupervised="drop"))
    assert dataset.dropped == {"no supervised text": 30}, (
        "and no limit holds for what was asked for"
    )


def test_fields_may_be_ignored(world: World) -> None:
    path = world.file(*[row(str(k), "x", bbox=[1, 2]) for k in range(3)])
    assert len(refused(world.config(path))) == 4
    assert len(open_dataset(world.config(path, ignore_fields=["bbox"])).records) == 3


def test_evaluation_reads_by_the_same_rules(world: World) -> None:
    path = world.file(*GOOD, BAD["typo"][0])
    with pytest.raises(UserError, match=r"id typo.*; correct it, or set on_bad_record: drop"):
        open_records([str(world.bank)], [path], 4, 8, DataSettings())
    dataset = open_records([str(world.bank)], [path], 4, 8, DataSettings(on_bad_record="drop"))
    assert len(dataset.held_out) == 6
    assert [(drop.id, drop.held_out) for drop in dataset.drops] == [("typo", True)]


def test_all_that_a_refusal_advises_to_drop_are_flags_of_evaluate(world: World) -> None:
    path = world.file(*GOOD, *(row for row, _ in BAD.values()), row("gone", "x", video="z.mp4"))
    said = refused(world.config(path))
    advised = set(re.findall(r"(\w+): drop", " ".join(said)))
    assert advised == {"missing", "unsupervised", "on_bad_record"}
    words = ["--model", "m", "--bank", str(world.bank), "--data_path", path]
    args = arguments([*words, *(word for name in advised for word in (f"--{name}", "drop"))])
    settings = replace(record_settings(args), bad_record_limit="100%")
    dataset = open_records(args.bank, args.data_path, 4, 8, settings)
    assert {row["id"] for row in GOOD} >= {record.id for record in dataset.held_out}
    assert {"clip in no bank", "no supervised text"} <= {drop.reason for drop in dataset.drops}


def test_stray_files_of_a_folder_are_named(world: World) -> None:
    folder = world.folder / "records"
    folder.mkdir()
    world.file(*GOOD, name="records/r.json")
    (folder / "dataset_info.json").write_text('{"features": {}}')
    dataset = open_dataset(world.config(str(folder)))
    assert len(dataset.records) == 6
    assert list(dataset.notes) == [f"without records, and not read: {folder}/dataset_info.json"]


def test_the_limit_is_checked_like_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    for bad in ("101%", "-1", "many", "1e3"):
        with pytest.raises(SystemExit):
            parse(["--bad_record_limit", bad], {})
        assert "--bad_record_limit must be a number like 100, or a share like 1%" in (
            capsys.readouterr().err
        )


def test_what_convert_leaves_out_is_listed_beside_what_it_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "charades.txt", tmp_path / "train.jsonl"
    source.write_text("AO8RW 0.0 6.9##a person sits.\nY6R7T 30.0 20.8##cooks\nA 1 2##stands\n")
    convert(["charades-sta", str(source), "--out", str(out), "--on_bad_record", "drop"])
    listed = tmp_path / "train.dropped.jsonl"
    assert capsys.readouterr().out == (
        f"written: {out}: 2 records; 1 left out (1 span backwards), listed in {listed}\n"
    )
    (line,) = map(json.loads, listed.read_text().splitlines())
    assert (line["file"], line["row"], line["reason"]) == (str(source), "2", "span backwards")
    assert "start 30 is not before end 20.8" in line["text"]
    source.write_text("AO8RW 0.0 6.9##a person sits.\n")
    convert(["charades-sta", str(source), "--out", str(out)])
    assert not listed.exists(), "a list is of the last run"


def test_convert_writes_no_file_without_records(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "r.jsonl", tmp_path / "train.jsonl"
    asked = {"from": "human", "value": "<video>When?"}
    source.write_text(json.dumps({"id": "q", "video": "a.mp4", "conversations": [asked]}) + "\n")
    with pytest.raises(SystemExit) as stopped:
        convert(["records", str(source), "--out", str(out), "--unsupervised", "drop"])
    assert stopped.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.endswith("no record is left to write, got 1 left out: 1 no supervised text")
    assert not out.exists()


def test_a_run_lists_what_it_leaves_out_and_says_so(
    toy: Path, toy_bank: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in (toy / "train.jsonl").read_text().splitlines()][:8]
    bad = rows[0] | {"id": "typo", "conversations": [*rows[0]["conversations"][:1]]}
    bad["conversations"].append({"from": "gpt", "value": "at <time:1.5>"})
    path = tmp_path / "r.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, bad]))
    out = tmp_path / "run"
    common = ["--stage_path", str(toy / "llm"), "--bank", str(toy_bank), "--data_path", str(path)]
    common += ["--max_steps", "1", "--output_dir", str(out), "--rehearsal", "false"]
    run([*common, "--on_bad_record", "drop"])
    (line,) = map(json.loads, (out / "dropped.jsonl").read_text().splitlines())
    assert (line["row"], line["id"], line["reason"]) == (
        str(len(rows) + 1),
        "typo",
        "misspelt coordinate",
    )
    log = (out / "train.log").read_text()
    assert f"{len(rows)} to train on, 0 held out, 1 dropped (1 misspelt coordinate)" in log
    assert "what is left out is listed in dropped.jsonl" in log


def test_turns_that_the_template_refuses_are_named_or_left_out(
    toy: Path, toy_bank: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mistral's and Gemma's templates raise where the first turn is not the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    llm = tmp_path / "llm"
    llm.mkdir()
    for file in (toy / "llm").iterdir():
        (llm / file.name).write_bytes(file.read_bytes())
    template = (llm / "chat_template.jinja").read_text()
    strict = (
        "{% if messages[0].role != 'user' %}{{ raise_exception('start with user') }}{% endif %}"
    )
    (llm / "chat_template.jinja").write_text(strict + template)
    rows = [json.loads(line) for line in (toy / "train.jsonl").read_text().splitlines()][:4]
    greeting = {"from": "gpt", "value": "Hello."}
    first = rows[0] | {"id": "hello", "conversations": [greeting, *rows[0]["conversations"]]}
    path = tmp_path / "r.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, first]))
    settings = {"stage_path": str(llm), "bank": [str(toy_bank)], "data_path": [str(path)]}
    config = TrainConfig(**settings)  # type: ignore[arg-type]
    for _ in range(2):  # counted, and then from the cache
        lenient = TrainConfig(**settings, on_bad_record="drop")  # type: ignore[arg-type]
        dataset = open_dataset(lenient)
        plan = plan_run(lenient, dataset, 2)
        assert plan.dropped == {REFUSED: 1}
        assert 4 not in plan.uses
        assert [(d.row, d.id, d.reason) for d in all_drops(dataset, plan)] == [
            ("5", "hello", REFUSED)
        ]
        with pytest.raises(UserError, match="start with user") as caught:
            plan_run(config, open_dataset(config), 2)
        assert str(caught.value).startswith(
            f"{path}:5 (id hello): the chat template of {llm} refuses"
        )
        assert "set on_bad_record: drop" in str(caught.value)
