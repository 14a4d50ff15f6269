"""Is a command line of the pages understood? By the parser of the program that it starts.

    for line in commands("preprocess plan a/ --out bank ... && make demo"):
        understood(line)

Paths that a line reads must be there: the caller stands in a folder that has them.
"""

import argparse
import ast
import importlib.util
import re
import shlex
import subprocess
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

import train.ask
import train.convert
import train.evaluate
import train.export
import train.probe
import train.report
from preprocess.cli.main import main as preprocess
from preprocess.cli.options import make_sampling
from tests.readmes import ROOT
from train.settings.config import parse
from train.sweep.runs import runs_of

VARIABLE = re.compile(r"([A-Z_]+)=(.*)", re.DOTALL)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@dataclass(frozen=True)
class Command:
    """One program with its words, as a shell would start it."""

    words: tuple[str, ...]
    environ: Mapping[str, str] = field(default_factory=dict)
    """What is set for it alone: `NAME=value command`."""

    def __str__(self) -> str:
        return shlex.join(self.words)


def commands(text: str) -> list[Command]:
    """Return the commands of a block of shell: one for each line, or for each side of `&&` and `|`."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word in (";", "&&", "|"):
                found += [_command(words)] if words else []
                words = []
            else:
                words.append(word)
    return found


def _command(words: list[str]) -> Command:
    if ">" in words:
        words = words[: words.index(">")]
    environ = {}
    while words and (match := VARIABLE.fullmatch(words[0])):
        environ[match[1]] = match[2]
        words = words[1:]
    return Command(tuple(words), environ)


def understood(command: Command) -> None:
    """Raise, whatever the program's own parser raises, for a line that it would not take."""
    program, *words = command.words
    assert program in PROGRAMS, f"no parser for {program}: {command}"
    PROGRAMS[program](words, command.environ)


def _preprocess(words: list[str], environ: Mapping[str, str]) -> None:
    name, *rest = words
    own = preprocess.commands[name]  # type: ignore[attr-defined]
    flags = own.make_context(name, list(rest)).params
    if {"frames", "fps", "max_frames"} <= flags.keys():
        make_sampling(flags["frames"], flags["fps"], flags["max_frames"])


def _accelerate(words: list[str], environ: Mapping[str, str]) -> None:
    assert words[0] == "launch", words
    args = launch_command_parser().parse_args(words[1:])
    if args.config_file:
        assert Path(args.config_file).exists(), args.config_file
    script = args.training_script
    before = words[1 : words.index(script)]
    if args.module or script.endswith("lmms_eval"):
        script = f"-m {script}"
    _script(script, args.training_script_args, environ, before)


def _torchrun(words: list[str], environ: Mapping[str, str]) -> None:
    args = get_args_parser().parse_args(words)
    script = f"-m {args.training_script}" if args.module else args.training_script
    _script(script, args.training_script_args, environ, None)


def _python(words: list[str], environ: Mapping[str, str]) -> None:
    script = f"-m {words[1]}" if words[0] == "-m" else words[0]
    _script(script, words[1 + words[0].startswith("-m") :], environ, None)


def _script(
    script: str, words: list[str], environ: Mapping[str, str], launched: list[str] | None
) -> None:
    name = script.removeprefix("-m ").removesuffix(".py").replace("/", ".")
    if not script.startswith("-m "):
        assert (ROOT / script).is_file(), script
    if name == "train.run":
        _train(words, environ, launched)
        return
    assert name in SCRIPTS, f"no parser for {script}"
    SCRIPTS[name](words)


def _train(words: list[str], environ: Mapping[str, str], launched: list[str] | None) -> None:
    if "--sweep" in words:
        assert runs_of(words, dict(environ), launched)
    else:
        parse(words, dict(environ), launched)


def _make(words: list[str], environ: Mapping[str, str]) -> None:
    """Nothing is made; a variable must be one that the Makefile reads."""
    makefile = (ROOT / "Makefile").read_text()
    for word in words:
        if match := VARIABLE.fullmatch(word):
            assert re.search(rf"^{match[1]} |\$\({match[1]}\)|ifdef {match[1]}$", makefile, re.M), (
                word
            )
        else:
            assert re.search(rf"^{re.escape(word)}:", makefile, re.M), word
    done = subprocess.run(
        ["make", "-n", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def _pip(words: list[str], environ: Mapping[str, str]) -> None:
    assert words[0] == "install", words
    for word in words[1:]:
        if match := re.fullmatch(r"framebank\[([\w,-]+)\]", word):
            assert set(match[1].split(",")) <= set(PROJECT["optional-dependencies"]), word
        else:
            assert word in ("-e", ".", "pillow-heif"), word


def _bash(words: list[str], environ: Mapping[str, str]) -> None:
    """A script that the line before has printed; what is in it is tested where it is made."""
    assert len(words) == 1
    assert words[0].endswith(".sh")


def _none(words: list[str]) -> None:
    assert words == []


def _runs(words: list[str]) -> None:
    assert words
    assert not any(word.startswith("-") for word in words)


def _bench(words: list[str]) -> None:
    for word in words:
        assert (ROOT / "tests" / "bench" / f"{word}.py").is_file(), word


def _export(words: list[str]) -> None:
    parsed(train.export.arguments(), words)


def _lmms_eval(words: list[str]) -> None:
    """Without lmms-eval: the name is an entry point, and arguments are those of its class."""
    parser = argparse.ArgumentParser()
    for name in ("model", "model_args", "tasks"):
        parser.add_argument(f"--{name}", required=True)
    args = parser.parse_args(words)
    module = PROJECT["entry-points"]["lmms_eval.models"][args.model].partition(":")[0]
    tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())
    (init,) = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name == "__init__"
    ]
    known = {arg.arg for arg in (*init.args.args, *init.args.kwonlyargs)}
    assert {pair.partition("=")[0] for pair in args.model_args.split(",")} <= known


def parsed(parser: argparse.ArgumentParser, words: list[str]) -> Any:
    return parser.parse_args(words)


PROGRAMS: dict[str, Callable[[list[str], Mapping[str, str]], None]] = {
    "preprocess": _preprocess,
    "accelerate": _accelerate,
    "torchrun": _torchrun,
    "python": _python,
    "make": _make,
    "pip": _pip,
    "bash": _bash,
}
SCRIPTS: dict[str, Callable[[list[str]], Any]] = {
    "train.ask": lambda words: parsed(train.ask.arguments(), words),
    "train.evaluate": train.evaluate.arguments,
    "train.convert": lambda words: parsed(train.convert.parser(), words),
    "train.probe": train.probe.arguments,
    "train.export": _export,
    "train.report": train.report.arguments,
    "train.sweep.page": _runs,
    "model.family": _runs,
    "tests.bench": _bench,
    "tests.tables": _runs,
    "lmms_eval": _lmms_eval,
}


def known(span: str) -> None:
    """Raise for inline code that begins as a command and names what is not there.

    It may leave words out, so that it is not parsed: subcommands, flags, modules, targets and extras.
    """
    while match := re.match(r"[A-Z_]+=\S+ ", span):
        span = span.removeprefix(match[0])
    if span.split(" ")[0] not in PROGRAMS:
        return
    program, *rest = shlex.split(span)
    if program == "preprocess" and rest and not rest[0].startswith("-"):
        own = preprocess.commands[rest[0]]  # type: ignore[attr-defined]
        flags = {name for option in own.params for name in option.opts} | {"--help"}
        said = {word.strip("[]") for word in rest}  # what may be left out is in brackets
        assert {word for word in said if word.startswith("--")} <= flags, span
    elif program == "python" and rest[:1] == ["-m"] and len(rest) > 1:
        assert rest[1] == "lmms_eval" or importlib.util.find_spec(rest[1]), span
        if rest[1] == "tests.bench":
            _bench([word for word in rest[2:] if word != "NAME"])
    elif program == "python" and rest and rest[0].endswith(".py"):
        assert (ROOT / rest[0]).is_file(), span
    elif program in ("make", "pip") and rest:
        PROGRAMS[program](rest, {})
