"""Names that the Hub does not give: said at once, whatever it answers, and both readings of a name."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import create_server

import pytest

from preprocess.cli.main import main as preprocess
from shards.annotations.files import local_copy
from shards.errors import UserError
from shards.hub import absent, refusal

ANSWERS = {
    "gated": (403, "GatedRepo"),
    "nothing": (401, "RepoNotFound"),
    "bare": (404, "EntryNotFound"),
    "broken": (503, ""),
    "there": (200, ""),
}


class Answer(BaseHTTPRequestHandler):
    """Answers by the last word of a repository's name."""

    def do_HEAD(self) -> None:
        word = self.path.partition("/resolve")[0].rpartition("/")[2]
        code, error = ANSWERS[word]
        self.send_response(code)
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()

    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """A server that answers as the Hub does."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    yield url
    server.shutdown()
    server.server_close()


def cache(folder: Path, repo: str) -> None:
    (folder / "cache" / f"models--{repo.replace('/', '--')}" / "snapshots" / "abc").mkdir(
        parents=True
    )


SAID = [
    (
        "gated",
        "the Hub's some/gated is gated: ask for access at HUB/some/gated, then `hf auth login`",
    ),
    ("nothing", "the Hub has no model of that name, or a private one"),
    ("bare", "the Hub's some/bare has no config.json"),
    ("broken", "the Hub answers with an error (503)"),
]


@pytest.mark.parametrize(("word", "said"), SAID)
def test_what_the_hub_answers_is_said(hub: str, tmp_path: Path, word: str, said: str) -> None:
    began = time.monotonic()
    assert (refusal(f"some/{word}") or "").startswith(said.replace("HUB", hub))
    assert time.monotonic() - began < 2, "asked once"
    cache(tmp_path, f"some/{word}")
    assert refusal(f"some/{word}") is None, "what was downloaded serves"


def test_a_repository_that_is_there_is_no_problem(hub: str) -> None:
    assert refusal("some/there") is None
    assert refusal("some/bare", "dataset") is None
    text = f"the Hub's some/gated is gated: ask for access at {hub}/datasets/some/gated"
    assert (refusal("some/gated", "dataset") or "").startswith(text)
    with pytest.raises(UserError, match="no such path here, and the Hub did not give it") as caught:
        local_copy("some/gated")
    assert text in str(caught.value)


def test_a_hub_that_does_not_answer_is_given_up_at_once(
    hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("shards.hub.TIMEOUT", 0.5)
    with create_server(("127.0.0.1", 0)) as silent:
        for port in (9, silent.getsockname()[1]):  # nobody listens; somebody who never speaks
            monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")
            began = time.monotonic()
            assert (refusal("some/model") or "").startswith("the Hub does not answer (")
            assert time.monotonic() - began < 5
        # what was downloaded before serves, and no one asks again
        cache(tmp_path, "some/model")
        assert refusal("some/model") is None
        monkeypatch.setattr("shards.hub.TIMEOUT", 60)
        assert (refusal("some/other") or "").startswith("offline mode is set (HF_HUB_OFFLINE)")


def test_commands_say_both_readings_of_a_name_at_once(tmp_path: Path) -> None:
    """In processes of their own, without a network: nothing is tried again."""
    (tmp_path / "runs" / "ab").mkdir(parents=True)
    (tmp_path / "r.jsonl").write_text("")
    environ = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "PATH": "/usr/bin"}
    root = Path(__file__).parents[2]
    train = ["train/run.py", "--stage_path", "runs/b", "--output_dir", str(tmp_path / "o")]
    train += ["--bank", "x", "--data_path", str(tmp_path / "r.jsonl")]
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, *train],
        cwd=root,
        env=environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert (
        "stage_path: no such folder: runs/b, and as a name of the Hub: the Hub does not"
        in done.stderr
    )
    assert "Retrying" not in done.stderr
    assert time.monotonic() - began < 60, "the clients of the Hub try again for minutes"


def test_a_tower_that_the_hub_does_not_give_is_said_before_any_video_is_read(
    hub: str, toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    video = next((toy / "videos").rglob("*.mp4"))
    argv = ["encode", str(video), "--out", str(tmp_path / "bank"), "--tower", "some/gated"]
    with pytest.raises(SystemExit) as stop:
        preprocess(argv)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert (
        "tower some/gated: no such folder, and as a name of the Hub: the Hub's some/gated is"
        in said
    )
    assert not (tmp_path / "bank" / "plan.json").exists()


def test_a_path_is_no_name_of_the_hub(tmp_path: Path) -> None:
    for name in (str(tmp_path / "none"), "./none", "../none", "some/model/folder"):
        assert absent(name) == "no such folder"
    assert absent(str(tmp_path)) is None
    assert absent("none") is None, "one of the Hub's own has no owner"
