"""The pages for people say what is there: commands are run or parsed, snippets run, links lead somewhere.

pytest tests/test_readmes.py

`console` blocks are transcripts: each `$` command is run on a small world, and what it prints must be
what the page shows, but for the numbers. Of `sh` blocks what needs no tower runs; all of it is parsed by
the programs' own parsers. Python runs on a small bank. Tables made from code are made again.
"""

import io
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from click.testing import CliRunner

import train.ask
import train.report
import train.run
from model import tower_kinds
from preprocess.cli.main import main as preprocess
from preprocess.footage.sources import read_phrases
from shards.annotations import forms
from shards.read.export import write_hf
from tests import tables
from tests.commands import Command, commands, known, understood
from tests.readmes import PAGES, ROOT, Block, anchors, blocks, links, spans, text_of
from train.data import importers
from train.data.mixtures import read_mixture
from train.data.records import parse_record
from train.settings.config import parse

TRANSCRIPTS = [page for page in PAGES if blocks("console", page)]
LANGUAGES = {"sh", "console", "python", "yaml", "json", "text"}
LINES = [(block, command) for block in blocks("sh") for command in commands(block.text)]
RUNS = {"status", "show", "verify", "diff", "export", "gc", "merge", "derive", "finish"}
"""Subcommands of `preprocess` that need no tower: they are run, too."""
SHORT = ["--max_steps", "2", "--per_device_train_batch_size", "6", "--num_threads", "1"]
"""What a training run of a transcript has here beside the page's own words."""
WITH_MODELS = {"transformers' own video models": "tests/train/bank_vlm/processor_checks.py"}
"""Python that needs a checkpoint: where it is run."""


def named(value: object) -> str | None:
    return str(value) if isinstance(value, Block | Command) else None


# -- transcripts


Shown = tuple[Command, list[str]]
"""A command, and the lines that a page shows below it."""


def transcript(block: Block) -> list[Shown]:
    found: list[Shown] = []
    for line in block.text.replace("\\\n", " ").splitlines():
        if line.startswith("$ "):
            (command,) = commands(line[2:])
            found.append((command, []))
        else:
            found[-1][1].append(line)
    return found


Replayed = tuple[Path, dict[str, list[tuple[Command, list[str], str]]]]
"""The folder, and of each page its commands, what it shows of them and what they print."""


@pytest.fixture(scope="module")
def replayed(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Replayed:
    """All transcripts, played page after page in one folder, where later ones use what earlier made."""
    folder = tmp_path_factory.mktemp("replayed")
    (folder / "demo").mkdir()
    (folder / "demo" / "toy").symlink_to(toy)
    (folder / "train").symlink_to(ROOT / "train")
    outputs: dict[str, list[tuple[Command, list[str], str]]] = {}
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for page in TRANSCRIPTS:
            shown = [pair for block in blocks("console", page) for pair in transcript(block)]
            outputs[page] = [(command, lines, played(command)) for command, lines in shown]
            if not Path("demo/run-b").exists():  # what `make demo` trains after run-a
                shutil.copytree("demo/run-a", "demo/run-b")
    torch.set_num_threads(threads)
    return folder, outputs


def played(command: Command) -> str:
    """Run a command in this process and return what it prints."""
    program, *words = command.words
    if program == "preprocess":
        done = CliRunner().invoke(preprocess, words, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.stdout
    script = next(word for word in words if word.startswith("train"))
    own = words[words.index(script) + 1 :]
    mains: dict[str, Callable[[list[str]], None]] = {
        "train/run.py": lambda own: train.run.main([*own, *SHORT]),
        "train/ask.py": train.ask.main,
        "train.report": train.report.main,
    }
    AcceleratorState._reset_state(reset_partial_state=True)
    out = io.StringIO()  # a run prints to stderr, as its progress
    with redirect_stdout(out), redirect_stderr(out):
        mains[script](own)
    return out.getvalue()


def plain(line: str) -> str:
    """Return a line without what differs from run to run: numbers, units of bytes, hashes, widths."""
    line = re.sub(r"\b[0-9a-f]{12,32}\b", "N", line)
    line = re.sub(r"(?<![\w.])-?\d[\d,]*(\.\d+)?(e[+-]\d+)?|(?<!\S)-(?!\S)", "N", line)
    line = re.sub(r"\bN (kB|MB|GB|B)\b", "N bytes", line)
    return re.sub(r"\s+|#+|█+", " ", line).strip()


def agrees(shown: list[str], printed: str) -> bool:
    """Tell whether lines are printed as shown, of which `...` stands for any number."""
    wanted = "".join(
        r"(?:.*\n)*?" if line == "..." else re.escape(plain(line)) + "\n" for line in shown
    )
    got = "".join(f"{plain(line)}\n" for line in printed.splitlines())
    return re.fullmatch(wanted, got) is not None


@pytest.mark.parametrize("page", TRANSCRIPTS)
def test_a_transcript_is_what_the_commands_print(page: str, replayed: Replayed) -> None:
    for command, shown, output in replayed[1][page]:
        printed = output.replace(str(replayed[0]), "/home/me/framebank")
        if "train/ask.py" in command.words:  # another model's answer
            assert printed.splitlines()[-1] == shown[-1], printed
        elif "train.report" in command.words:  # runs that are not evaluated here
            lines = printed.splitlines()
            assert plain(lines[0]) == plain(shown[0])
            assert len(lines) == len(shown)
            assert lines[-1] == shown[-1]
        else:
            assert agrees(shown, printed), f"{command} prints\n{printed}"


def test_a_transcript_is_compared_line_by_line() -> None:
    printed = "bank: 9 clips, 1.5 kB\n  in 3 s\nfingerprint 0123456789ab\n"
    assert agrees(
        ["bank: 2,112 clips, 28.1 MB", "  in 40.2 s", "fingerprint 2d4c62c69e0d"], printed
    )
    assert agrees(["...", "fingerprint 2d4c62c69e0d"], printed)
    assert agrees(["bank: 9 clips, 1.5 kB", "..."], printed)
    assert not agrees(["bank: 9 clips, 1.5 kB"], printed)
    assert not agrees(["bank: 9 videos, 1.5 kB", "..."], printed)
    assert not agrees(["...", "digest 2d4c62c69e0d"], printed)


# -- shell


@pytest.fixture(scope="module")
def place(toy: Path, replayed: Replayed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the pages' commands read."""
    folder = tmp_path_factory.mktemp("place")
    for bank in ("bank", "BANK"):
        shutil.copytree(replayed[0] / "demo" / "bank", folder / bank)
    for name, target in {
        "videos": toy / "videos",
        "train": ROOT / "train",
        "clip.mp4": toy / "videos" / "test" / "clip-00000.mp4",
    }.items():
        (folder / name).symlink_to(target)
    (folder / "LLM").mkdir()
    records = (toy / "train.jsonl").read_text()
    for name in ("train.json", "train.jsonl", "test.json", "test.jsonl", "exp.yaml"):
        (folder / name).write_text(records)
    for name in ("phrases.jsonl", "phrases.yaml", "messages.parquet", "ann.txt"):
        (folder / name).touch()
    settings = {"stage_path": "LLM", "bank": "bank", "data_path": "train.json", "output_dir": "out"}
    (folder / "x.yaml").write_text(yaml.safe_dump(settings))
    (folder / "sweep.yaml").write_text(one_yaml("train/README.md", "runs:"))
    return folder


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same folder, as the working directory."""
    monkeypatch.chdir(place)
    return place


def one_yaml(page: str, key: str) -> str:
    (found,) = [block.text for block in blocks("yaml", page) if f"\n{key}" in block.text]
    return found


@pytest.mark.parametrize(("block", "command"), LINES, ids=named)
def test_a_command_is_understood_by_its_own_parser(
    block: Block, command: Command, here: Path
) -> None:
    for flag, stage in zip(command.words, command.words[1:], strict=False):
        if flag == "--stage_path" or stage == "STAGE_PATH":
            Path(stage).mkdir(parents=True, exist_ok=True)
    understood(command)


@pytest.mark.parametrize(
    "command",
    [c for _, c in LINES if c.words[0] == "preprocess" and c.words[1] in RUNS],
    ids=named,
)
def test_a_command_that_needs_no_tower_runs(command: Command, here: Path) -> None:
    done = CliRunner().invoke(preprocess, [*command.words[1:]], catch_exceptions=False)
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("page", PAGES)
def test_inline_commands_name_what_there_is(page: str) -> None:
    for span in spans(page):
        known(span)


def test_no_command_is_left_out() -> None:
    """Counted in another way than they are collected: lines of the pages' text."""
    assert {block.language for block in blocks()} <= LANGUAGES
    counts: Counter[str] = Counter()
    for page in PAGES:
        language, joined = "", False
        for line in text_of(page).splitlines():
            if line.startswith("```"):
                language = "" if language else line[3:] or "none"
            elif language == "sh" and line.strip() and not line.startswith("#"):
                plain = re.sub(r"'[^']*'|\"[^\"]*\"|#.*", "", line)
                counts["sh"] += (not joined) + plain.count("&&") + plain.count(" | ")
                joined = line.endswith("\\")
            elif language == "console":
                counts["console"] += line.startswith("$ ")
        assert not language, f"{page}: an open fence"
    assert counts["sh"] == len(LINES)
    assert counts["console"] == sum(len(transcript(block)) for block in blocks("console"))
    assert counts["sh"] > 60
    assert counts["console"] > 6


# -- python, json, yaml


@pytest.fixture
def registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """What snippets add stays in the test."""
    monkeypatch.setattr(tower_kinds, "KINDS", list(tower_kinds.KINDS))
    monkeypatch.setattr(forms, "FORMS", dict(forms.FORMS))
    monkeypatch.setattr(importers, "IMPORTERS", dict(importers.IMPORTERS))


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_runs(
    block: Block, here: Path, registries: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if block.heading in WITH_MODELS:
        assert f'"{block.heading}"' in (ROOT / WITH_MODELS[block.heading]).read_text()
        return
    if "import datasets" in block.text:
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(here / "cache"))
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        write_hf(here / "bank")
    names: dict[str, Any] = {}
    exec(compile(block.text, str(block), "exec"), names)
    if "cells" in names:
        assert names["cells"].shape[0] == 2


@pytest.mark.parametrize("block", blocks("json"), ids=str)
def test_json_is_a_record(block: Block) -> None:
    record = parse_record(json.loads(block.text), str(block))
    assert record.clips
    assert [turn.role for turn in record.turns] == ["user", "assistant"]


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_yaml_is_read_by_what_it_is_for(block: Block, here: Path) -> None:
    data = yaml.safe_load(block.text)
    path = here / "block.yaml"
    path.write_text(block.text)
    if "apiVersion" in data:
        (container,) = data["spec"]["template"]["spec"]["containers"]
        understood(Command(tuple(container["command"])))
    elif "num_nodes" in data:
        understood(*commands(data["run"]))
    elif "runs" in data:
        assert ("--sweep", "sweep.yaml") in {
            pair for _, c in LINES for pair in zip(c.words, c.words[1:], strict=False)
        }
    elif block.text.startswith("# x.yaml"):
        (here / "data.yaml").write_text("a: {records: train.json}\n")
        assert parse(["--config", str(path), "--stage_path", "LLM", "--output_dir", "new"], {})
    elif block.text.startswith("# data.yaml"):
        problems: list[str] = []
        assert read_mixture(str(path), "", problems)
        assert problems == []
    else:
        assert read_phrases(path)


# -- links, pictures, tables


@pytest.mark.parametrize("page", PAGES)
def test_a_link_leads_somewhere(page: str) -> None:
    for target in links(page):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page}: {target}"
        if anchor:
            other = os.path.relpath(file, ROOT)
            assert anchor in anchors(other), f"{page}: {target}"


@pytest.mark.parametrize("page", PAGES)
def test_a_file_that_is_named_is_there(page: str) -> None:
    for span in spans(page):
        if re.fullmatch(r"[\w./-]+\.py|(tests|train|model|shards|preprocess)/[\w./-]+", span):
            places = (ROOT / span, (ROOT / page).parent / span)
            assert any(place.exists() for place in places), f"{page}: {span}"


def test_pictures_are_small_and_have_their_command() -> None:
    shown = {
        ((ROOT / page).parent / target).resolve()
        for page in PAGES
        for target in links(page)
        if target.endswith(".png")
    }
    assert shown == {path for path in ROOT.glob("*/**/*.png") if inside(path)}
    assert sum(path.stat().st_size for path in shown) < 300_000
    makefile = (ROOT / "Makefile").read_text().partition("\npictures:")[2].partition("\n\n")[0]
    for path in shown:
        assert path.relative_to(ROOT).as_posix() in makefile


def inside(path: Path) -> bool:
    """Whether a file is of the checkout's packages, and not of what commands make."""
    return path.relative_to(ROOT).parts[0] in ("shards", "preprocess", "model", "train")


def test_the_first_page_is_short() -> None:
    text = text_of("README.md")
    assert len(text.splitlines()) <= 150
    assert len(text.encode()) <= 10 * 1024


@pytest.mark.parametrize(
    "name",
    [n if n not in tables.SLOW else pytest.param(n, marks=pytest.mark.slow) for n in tables.TABLES],
)
def test_a_table_is_what_the_code_says(name: str) -> None:
    made = tables.TABLES[name][1]()
    assert tables.written(name) == made, f"python -m tests.tables {name}"


def test_the_families_of_the_table_are_those_of_transformers() -> None:
    from model.family.__main__ import families

    rows = tables.written("families").splitlines()[2:]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == families()
    exact = sum(" | exact | " in row for row in rows)
    assert f"see themselves: {exact} |" in text_of("model/README.md")
    assert f"see themselves | {exact} (" in text_of("README.md")
