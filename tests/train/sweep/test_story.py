"""Sweeps that are started: what is trained, resumed, skipped, refused, and named as failed."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

import train.evaluate
import train.run
from train.settings.output import RUN
from train.sweep.inputs import Inputs
from train.sweep.record import Record, problem_of_report, record_of
from train.sweep.runs import runs_of
from train.sweep.start import Children, Launcher
from train.sweep.story import take
from train.sweep.table import Scored, score_of

ROOT = Path(__file__).resolve().parents[3]
Refused = Callable[..., str]


class Bench:
    """A folder with a sweep's YAML and the settings of its runs; starts it in this process."""

    def __init__(self, home: Path, settings: Mapping[str, Any]) -> None:
        self.home, self.settings = home, {name: str(value) for name, value in settings.items()}
        self.out, self.path = home / "out", home / "s.yaml"

    def write(self, runs: Mapping[str, Any], **more: Any) -> None:
        sweep = {"settings": self.settings, "seeds": [0], "runs": dict(runs)}
        self.path.write_text(yaml.safe_dump(sweep | more, sort_keys=False))

    @property
    def words(self) -> list[str]:
        return ["--sweep", str(self.path), "--output_dir", str(self.out)]

    def start(self, *flags: str) -> None:
        train.run.main([*self.words, *flags])

    def launch(self, *before: str) -> "subprocess.Popen[bytes]":
        """Start it in a process of its own; before: words before the script."""
        command = [sys.executable, *before, "train/run.py", *self.words]
        return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.fixture
def bench(tmp_path: Path, run_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return Bench(tmp_path, run_settings)


def losses(run: Path) -> list[tuple[int, float]]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row["loss"]) for row in rows if row["kind"] == "train"]


def bytes_below(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def stop_after_two(run: Path) -> None:
    """Leave of a run's four steps what a stop after the second one leaves."""
    shutil.rmtree(run / "checkpoint-4")
    for path in [*run.glob("*.safetensors"), run / "config.json"]:
        path.unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:3]))  # one step beyond its checkpoint


@pytest.mark.slow
def test_what_is_begun_goes_on_what_fails_is_named_and_what_is_done_is_left_alone(
    bench: Bench, train_here: Callable[..., Path], toy: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    begun = train_here(bench.out / "begun" / "seed-0", save_steps=2)
    whole = losses(begun)
    stop_after_two(begun)
    scored = {"test_path": str(toy / "test.jsonl"), "max_records": 3}
    broken = {"broken": {"attn": "flex_attention"}, "after": {"stage": "broken"}}
    bench.write({"begun": {}} | broken, **scored)

    # -- one goes on, one fails, one cannot begin
    with pytest.raises(SystemExit) as stop:
        bench.start()
    said = capfd.readouterr()
    assert stop.value.code == 1
    rows = [line.split() for line in said.out.splitlines()[:3]]
    assert [(row[1], " ".join(row[2:])) for row in rows] == [
        ("begun/seed-0", "begun ?"), ("broken/seed-0", "to do ?"), ("after/seed-0", "to do ?")
    ]  # fmt: skip
    assert said.out.index("3 runs: 0 finished, 3 to do") < said.out.index("--- 1 of 3")
    assert losses(begun) == whole
    failed = [line for line in said.out.splitlines() if line.startswith("failed: ")]
    assert failed[0].startswith("failed: broken/seed-0: exit 2: ")
    assert "flex_attention" in failed[0]
    assert failed[1].startswith(
        "failed: after/seed-0: not started: the run that it starts from, broken/"
    )
    report = json.loads((begun / "eval-test.json").read_text())
    assert report["records"] == 3
    page = (bench.out / "s.md").read_text()
    assert "1 of 3 runs" in page
    assert f"| begun/seed-0 | {report['tasks']['span']['iou']:.3f} " in page
    assert said.out.splitlines()[-1].startswith("failed: ")
    assert f"written: {bench.out / 'report.html'}" in said.out
    assert (bench.out / "report.html").read_text().endswith("</html>\n")
    record = record_of(begun)
    assert record is not None
    assert record.cpu_seconds > 0.5
    assert record.reports == {"": ["eval-test.json"]}

    # -- again without those: nothing is touched, and nothing is started
    bench.write({"begun": {}}, **scored)
    before = bytes_below(begun)
    bench.start()
    said = capfd.readouterr()
    assert "1 run: 1 finished, 0 to do" in said.out
    assert "finished before" in said.out
    assert bytes_below(begun) == before
    assert said.err == ""


@pytest.fixture
def done(bench: Bench, trained: Path) -> Bench:
    """A sweep of one run, `a`, that is finished."""
    shutil.copytree(trained, bench.out / "a" / "seed-0")
    bench.write({"a": {}})
    return bench


@pytest.fixture(scope="module")
def trained(
    train_here: Callable[..., Path],
    run_settings: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A run of four steps, as a sweep leaves it. Copy it."""
    bench = Bench(tmp_path_factory.mktemp("trained-sweep"), run_settings)
    run = train_here(bench.out / "a" / "seed-0")
    bench.write({"a": {}})
    bench.start()  # finds all steps taken
    assert record_of(run) is not None
    return run


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_steps": 5}, "max_steps was 4, is now 5"),
        ({"learning_rate": 0.5}, "learning_rate was 0.001, is now 0.5"),
        ({"enable_lape": "false"}, "enable_lape was true, is now false"),
    ],
)
def test_a_run_of_other_settings_is_refused_by_name_before_anything_trains(
    done: Bench, refused: Refused, settings: dict[str, Any], words: str
) -> None:
    done.write({"new": {}, "a": settings})
    line = refused(done.start)
    assert f"{done.out}/a/seed-0: the run a/seed-0 was made with other settings or inputs: " in line
    assert words in line
    assert not (done.out / "new").exists()


def test_a_run_that_is_only_begun_is_refused_as_well(done: Bench, refused: Refused) -> None:
    (done.out / "a" / "seed-0" / "sweep.json").unlink()
    done.write({"a": {"learning_rate": 0.5}})
    assert "learning_rate was 0.001, is now 0.5" in refused(done.start)


def test_a_run_that_changed_its_settings_half_way_is_none_of_these_settings(
    done: Bench, refused: Refused
) -> None:
    path = done.out / "a" / "seed-0" / RUN
    now = json.loads(path.read_text())
    earlier = {"config": now["config"] | {"learning_rate": 0.25}, "since_step": 0}
    path.write_text(json.dumps(now | {"since_step": 2, "before": [earlier]}))
    assert "learning_rate was 0.25, is now 0.001" in refused(done.start)


def test_other_records_are_other_inputs(
    done: Bench, refused: Refused, toy: Path, tmp_path: Path
) -> None:
    copied = tmp_path / "copied.jsonl"
    lines = (toy / "train.jsonl").read_text().splitlines(keepends=True)
    copied.write_text("".join(lines[:-1]))
    done.write({"a": {"data_path": str(copied)}})
    assert "data_path was " in refused(done.start)
    run_json = done.out / "a" / "seed-0" / RUN  # as if trained from there, with all lines
    run_json.write_text(run_json.read_text().replace(str(toy / "train.jsonl"), str(copied)))
    assert "record file" in refused(done.start)


SAID = {
    "turns": ({}, {"turns": "independent"}, "datasets.independent was [], is now [0]"),
    "wording": (
        {"splice": {"records": 6, "parts": 1}},
        {"splice": {"records": 6, "parts": 1, "questions": "seen"}},
        "datasets.splice.0.questions was ",
    ),
    "nothing": ({"turns": "dialogue"}, {}, ""),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", SAID)
def test_what_a_mixture_says_of_its_datasets_is_an_input(
    done: Bench, refused: Refused, toy: Path, tmp_path: Path, case: str
) -> None:
    before, after, words = SAID[case]
    records = toy / "train.jsonl"
    if "splice" in before:
        videos = {json.loads(line)["video"] for line in records.read_text().splitlines()}
        records = tmp_path / "phrases.jsonl"
        rows = [json.dumps({"video": v, "phrase": v}) for v in sorted(videos)]
        records.write_text("\n".join(rows))
    mixture = tmp_path / "m.yaml"
    changes = {"data_path": [], "data_config": str(mixture), "turns": "dialogue"}
    run = done.out / "a" / "seed-0"
    for name, entry in (("then", before), ("now", after)):
        mixture.write_text(yaml.safe_dump({"x": {"records": str(records)} | entry}))
        if name == "then":  # as if trained on that
            written = json.loads((run / RUN).read_text())
            written["config"] |= changes
            (run / RUN).write_text(json.dumps(written))
            done.write({"a": {"data_path": "", "data_config": str(mixture)}})
            (one,) = runs_of(done.words, os.environ, None)
            facts = Inputs().of(one)
            Record({k: facts[k] for k in ("bank", "plan")}, 1.0, 1.0).write(run)
    if words:
        assert words in refused(done.start)
    else:
        done.start()


def test_scores_of_other_records_are_none_in_a_table(done: Bench) -> None:
    """As a stop leaves them, after which some runs were scored on a changed test set, others not."""
    (run,) = runs_of(done.words, os.environ, None)
    for ending in ("", "-shuffled"):
        report = {"tasks": {"span": {"iou": 0.5}}}
        (run.folder / f"eval-test{ending}.json").write_text(json.dumps(report))
    record = Record({}, scored={"": {"records": "then"}, "shuffled": {"records": "now"}})
    then, now = (Scored(run, record, "test", {"records": word}) for word in ("then", "now"))
    metric = ("span", "iou")
    assert [score_of(one.report, metric) for one in (then, now)] == [0.5, None]
    assert [one.control("shuffled", metric) for one in (then, now)] == [None, 0.5]


def test_an_evaluation_by_hand_leaves_the_scores_of_a_sweep_alone(
    done: Bench, toy: Path, tmp_path: Path, refused: Refused
) -> None:
    """Its table would show them as the sweep's: of fewer records, another bank, other turns."""
    run = done.out / "a" / "seed-0"
    report = run / "eval-test.json"
    scored = {"test_set": "test", "data_path": str(toy / "test.jsonl"), "tasks": {}}
    record = record_of(run)
    assert record is not None
    record.reports["shuffled"] = ["eval-test-shuffled.json"]
    record.reports[""] = [report.name]
    record.write(run)
    for name in ("test", "test-shuffled"):
        (run / f"eval-{name}.json").write_text(json.dumps(scored))
    other = tmp_path / "predictions-other.jsonl"
    answer = {"record": "r", "media": ["c"], "turn": 1, "task": "", "question": "", "duration": 1.0}
    other.write_text(json.dumps(answer | {"reference": "3", "answer": "3", "cut": False}) + "\n")
    before = bytes_below(run)
    # the test set itself, and another file of its name, which would take its place
    (tmp_path / "test.jsonl").write_bytes((toy / "test.jsonl").read_bytes())
    asked = ["--model", str(run), "--bank", done.settings["bank"], "--max_records", "1"]
    for words in (
        *([*asked, "--data_path", str(folder / "test.jsonl")] for folder in (toy, tmp_path)),
        [*asked, "--data_path", str(toy / "test.jsonl"), "--shuffle_features"],
        [*asked, "--data_path", str(toy / "test.jsonl"), "--output", str(report)],
        ["--rescore", str(other), "--output", str(report)],
    ):
        line = refused(train.evaluate.main, words)
        assert "the scores that a sweep has made" in line
        assert line.endswith("--output FILE")
        assert bytes_below(run) == before
    # what the sweep has not scored is nobody's
    for place in (run / "eval-test-untrained.json", run / "eval-more.json", tmp_path / report.name):
        assert problem_of_report(place) is None
    # as while the sweep itself scores
    record.reports.clear()
    record.write(run)
    assert problem_of_report(report) is None


@pytest.mark.slow
def test_a_preset_that_changes_while_a_sweep_runs_is_no_run_of_it(
    bench: Bench, tmp_path: Path
) -> None:
    preset = tmp_path / "p.yaml"
    preset.write_text("learning_rate: 0.01\n")
    bench.settings = {k: v for k, v in bench.settings.items() if k != "learning_rate"}
    bench.write({"a": {}}, config=str(preset))
    (run,) = runs_of(bench.words, os.environ, None)
    preset.write_text("learning_rate: 0.02\n")
    why = take(run, Inputs(), Children(Launcher.here(None)))
    assert "learning_rate was 0.02, is now 0.01" in str(why)
    assert record_of(run.folder) is None


@pytest.mark.slow
def test_settings_that_say_nothing_about_weights_may_differ(
    done: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"logging_steps": 1, "save_steps": 3, "num_threads": 1, "bf16": "auto"}
    done.write({"a": settings})
    done.start()
    assert "1 run: 1 finished, 0 to do" in capsys.readouterr().out


def test_problems_of_inputs_are_told_before_the_first_run(
    done: Bench, refused: Refused, toy: Path, tmp_path: Path
) -> None:
    done.write({"new": {}}, test_path=str(tmp_path / "none.jsonl"))
    assert "none.jsonl" in refused(done.start)
    rows = (toy / "test.jsonl").read_text().replace("test/clip", "test/nowhere")
    (tmp_path / "foreign.jsonl").write_text(rows)
    done.write({"new": {}}, test_path=str(tmp_path / "foreign.jsonl"))
    with pytest.raises(SystemExit):
        done.start()
    done.write({"new": {"stage_path": str(tmp_path)}})
    assert "no model here: config.json is missing" in refused(done.start)
    assert not (done.out / "new").exists()


def test_a_list_alone_trains_nothing(done: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    done.write({"a": {}, "new": {}}, cpu_hours=0.5)
    done.start("--plan")
    said = capsys.readouterr().out
    assert "2 runs: 1 finished, 1 to do, about 0.5 CPU-hours" in said
    assert not (done.out / "new").exists()


# -- processes


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_sweep_that_is_stopped_goes_on_where_its_run_was(
    bench: Bench, train_here: Callable[..., Path], tmp_path: Path, number: signal.Signals
) -> None:
    bench.settings |= {"max_steps": "60"}
    bench.write({"a": {}})
    sweep = bench.launch()
    run = bench.out / "a" / "seed-0"
    deadline = time.monotonic() + 240
    while not (run / "metrics.jsonl").exists() or len(losses(run)) < 3:
        assert time.monotonic() < deadline
        assert sweep.poll() is None
        time.sleep(0.05)
    sweep.send_signal(number)
    assert sweep.wait(120) == (128 + number if number == signal.SIGTERM else -number)
    while (run / ".lock").exists():  # its run ends by itself, after a checkpoint
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert record_of(run) is None
    assert 3 <= len(losses(run)) < 60
    assert list(run.glob("checkpoint-*"))
    assert bench.launch().wait(240) == 0
    assert record_of(run) is not None
    assert losses(run) == losses(train_here(tmp_path / "never-stopped", max_steps=60))


@pytest.mark.slow
def test_under_a_launcher_of_two_processes_each_run_has_two(bench: Bench) -> None:
    bench.write({"a": {}, "b": {"enable_lape": "false"}})
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launcher += ["--mixed_precision", "no", "--main_process_port", port]
    assert bench.launch(*launcher).wait(300) == 0
    for name in ("a", "b"):
        log = (bench.out / name / "seed-0" / "train.log").read_text()
        assert "on 2 processes" in log
        assert record_of(bench.out / name / "seed-0") is not None


@pytest.mark.slow
def test_make_evidence_in_small_ends_in_its_page(tmp_path: Path) -> None:
    command = ["make", "-o", ".venv/.ready", "SMALL=1", f"EVIDENCE={tmp_path}", "evidence"]
    command.append(f"BIN={Path(sys.executable).parent}")
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stdout + first.stderr
    page = (tmp_path / "evidence.md").read_text()
    assert "- encoded once: " in page
    assert "5 runs trained on that" in page
    assert "| lape-plus less lape-off |" in re.sub(" +", " ", page)  # columns are filled up
    assert page in first.stdout
    assert first.stdout.splitlines()[-1] == f"pictures: {tmp_path / 'runs' / 'report.html'}"
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 0
    assert "5 runs: 5 finished, 0 to do" in again.stdout
    assert page.split("Test set")[1] == (tmp_path / "evidence.md").read_text().split("Test set")[1]
