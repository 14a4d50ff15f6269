"""P21: a bug of ours is a traceback, never a quarantined clip or a user's mistake.

The one place where our own functions are replaced: by ones with a bug. `preprocess` exits with 70.

pytest tests/promises/test_p21_bugs.py
pytest tests/promises/test_p21_bugs.py -m slow     also in the commands that measure and repair
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from preprocess.cli.main import main
from preprocess.decode.child_process import ChildBug, ChildProcess
from preprocess.decode.decode_child import DecodeChild
from preprocess.decode.request import ReadRequest
from preprocess.decode.scan import VideoError
from preprocess.sources.header import HeaderChild
from shards.format.features import Sampling

ROOT = Path(__file__).resolve().parents[2]
TWO = Sampling(num_frames=2)


@pytest.fixture(scope="module")
def begun(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos of which some are in `bank`, one is in its quarantine, and three are new. Copy it."""
    folder = tmp_path_factory.mktemp("begun")
    shutil.copytree(toy / "videos" / "train", folder / "videos")
    (folder / "videos" / "bad.mp4").write_text("no video")
    result = preprocess(folder, toy)
    assert result.exit_code == 1, result.output
    for video in (toy / "videos" / "test").iterdir():
        shutil.copy(video, folder / "videos" / f"new-{video.name}")
    return folder


def words(folder: Path, toy: Path, command: str = "encode") -> list[str]:
    asked = [command, folder / "videos", "--out", folder / "bank", "--tower", toy / "tower"]
    return [str(word) for word in [*asked, "--frames", 2, "--device", "cpu", "--shard-size", 1]]


def preprocess(folder: Path, toy: Path, command: str = "encode") -> Result:
    return CliRunner().invoke(main, words(folder, toy, command))


@pytest.fixture
def folder(begun: Path, tmp_path: Path) -> Path:
    """What `begun` holds, at another place: its bank knows the videos that moved."""
    return Path(shutil.copytree(begun, tmp_path / "begun"))


def kept(folder: Path) -> dict[str, bytes]:
    """Return what a bug may not touch: what is committed, and the quarantine."""
    bank = folder / "bank"
    files = [*bank.glob("shards/bank-000000.*"), bank / "quarantine.jsonl", bank / "bank.json"]
    return {path.name: path.read_bytes() for path in files}


POOLING = "model.tower.pooling.pool"


@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("model.tower.tower.Tower.encode", ValueError),
        (POOLING, KeyError),
        ("preprocess.decode.source.identity", ValueError),
        ("shards.write.shard.ShardWriter.write", KeyError),
        ("preprocess.encode.planning.compare", ValueError),
    ],
    ids=["tower", "pooling", "reader", "writer", "command"],
)
def test_a_bug_aborts_the_run_with_its_traceback(
    toy: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, place: str, error: type[Exception]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise error("a bug for a test")

    before = kept(folder)
    monkeypatch.setattr(place, broken)
    result = preprocess(folder, toy)
    assert result.exit_code == 70
    assert "Traceback" in result.stderr
    assert "in broken" in result.stderr
    assert "a bug for a test" in result.stderr
    assert kept(folder) == before


SITE = """
import {module}


def broken(*_, **__):
    raise KeyError("a bug for a test")


{module}.{name} = broken
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("shards.write.shard", "ShardWriter.write"),
        pytest.param("preprocess.decode.clip", "FileReader.events", marks=pytest.mark.slow),
    ],
    ids=["in a worker", "in the decode child of a worker"],
)
def test_a_bug_in_one_of_several_processes_aborts_the_run_too(
    toy: Path, folder: Path, tmp_path: Path, module: str, name: str
) -> None:
    before = kept(folder)
    for k in range(9):  # more than one shard's worth, so that there is work for two
        shutil.copy(folder / "videos" / "new-clip-00000.mp4", folder / "videos" / f"more{k}.mp4")
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(SITE.format(module=module, name=name))
    done = subprocess.run(
        [sys.executable, "-m", "preprocess", *words(folder, toy), "--procs", "2"],
        env=os.environ | {"PYTHONPATH": f"{site}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 70, done.stderr
    assert "in broken" in done.stderr
    assert "a bug for a test" in done.stderr
    assert kept(folder) == before


def with_bug(module: str, name: str) -> tuple[str, ...]:
    """Return the program of a child in which a function has a bug."""
    code = (
        f"import sys, {module} as module\n"
        "def broken(*_, **__):\n"
        "    raise KeyError('a bug for a test')\n"
        f"module.{name} = broken\n"
        f"module.main({'[int(word) for word in sys.argv[1:]]' if 'child' in module else ''})\n"
    )
    return ("-c", code)


CHILDREN: list[tuple[type[ChildProcess], tuple[str, str]]] = [
    (DecodeChild, ("preprocess.decode.decode_child", "FileReader.scan")),
    (DecodeChild, ("preprocess.decode.decode_child", "FileReader.events")),
    (HeaderChild, ("preprocess.sources.header", "read_header")),
]


@pytest.mark.parametrize(("kind", "place"), CHILDREN, ids=lambda value: str(value[-1]))
def test_a_bug_in_a_child_is_a_traceback_here(
    toy: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: type[ChildProcess],
    place: tuple[str, str],
) -> None:
    before = kept(folder)
    monkeypatch.setattr(kind, "program", with_bug(*place))
    result = preprocess(folder, toy)
    assert result.exit_code == 70
    assert "ChildBug" in result.stderr
    assert "in broken" in result.stderr
    assert "new-clip-0000" in result.stderr, "the clip is named"
    assert kept(folder) == before


def test_a_child_that_cannot_start_is_a_bug_and_no_crash(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DecodeChild, "program", ("-m", "preprocess.decode.no_such_module"))
    video = toy / "videos" / "test" / "clip-00000.mp4"
    with DecodeChild() as child, pytest.raises(ChildBug, match="no_such_module"):
        child.read_clip(ReadRequest(video, TWO))


@pytest.mark.parametrize(
    ("death", "said"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        ("os._exit(3)", "exit 3"),
        ("raise MemoryError", "out of memory"),
    ],
    ids=["signal", "exit", "memory"],
)
def test_a_decoder_that_dies_is_the_clips_fault(
    toy: Path, monkeypatch: pytest.MonkeyPatch, death: str, said: str
) -> None:
    code = (
        "import os, signal, sys, preprocess.decode.decode_child as child\n"
        f"def dies(*_):\n    {death}\n"
        "child.FileReader.events = dies\n"
        "child.main([int(word) for word in sys.argv[1:]])\n"
    )
    monkeypatch.setattr(DecodeChild, "program", ("-c", code))
    video = toy / "videos" / "test" / "clip-00000.mp4"
    with DecodeChild() as child, pytest.raises(VideoError, match=said) as error:
        child.read_clip(ReadRequest(video, TWO))
    assert error.value.reason == "decoder-crashed"
    assert error.value.retryable


def test_a_disk_that_fails_in_the_child_is_no_bug(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import sys, preprocess.decode.decode_child as child\n"
        "def fails(*_):\n    raise OSError(5, 'Input/output error')\n"
        "child.FileReader.scan = fails\n"
        "child.main([int(word) for word in sys.argv[1:]])\n"
    )
    monkeypatch.setattr(DecodeChild, "program", ("-c", code))
    video = toy / "videos" / "test" / "clip-00000.mp4"
    with DecodeChild() as child, pytest.raises(VideoError, match="Input/output") as error:
        child.read_clip(ReadRequest(video, TWO))
    assert error.value.reason == "cannot-open"


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["none", "int8"], ids=["estimate", "calibrate"])
def test_what_measures_on_some_clips_passes_over_no_bug(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ValueError("a bug for a test")

    monkeypatch.setattr(POOLING, broken)
    asked = ["plan" if codec == "none" else "encode", toy / "videos" / "test", "--codec", codec]
    rest = ["--out", tmp_path / "bank", "--tower", toy / "tower", "--device", "cpu"]
    result = CliRunner().invoke(main, [str(word) for word in [*asked, *rest]])
    assert result.exit_code == 70
    assert "in broken" in result.stderr
    assert not (tmp_path / "bank" / "quarantine.jsonl").exists()


def test_a_bug_in_reading_annotations_is_no_unreadable_file(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise TypeError("a bug for a test")

    monkeypatch.setattr("shards.annotations.records.leads_outside", broken)
    (tmp_path / "a.jsonl").write_text('{"video": "clip.mp4"}\n')
    out = tmp_path / "bank"
    asked = ["encode", tmp_path / "a.jsonl", "--out", out, "--tower", toy / "tower"]
    result = CliRunner().invoke(main, [str(word) for word in asked])
    assert result.exit_code == 70
    assert "in broken" in result.stderr
    assert not out.exists()


def test_a_bug_stops_training_with_its_traceback(
    train_here: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ValueError("a bug for a test")

    monkeypatch.setattr("train.loop.loop.take_step", broken)
    with pytest.raises(ValueError, match="a bug for a test"):
        train_here(tmp_path / "out")
