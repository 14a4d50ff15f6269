"""The page as a document: well made, alone, true to the runs, and there whatever is missing."""

import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from shards.read.bank import Bank
from tests.train.pages.written import HOSTILE, predictions, write_a_run, write_scores
from train.pages.page import document, page
from train.pages.read.footage import Footage
from train.pages.read.runs import read_runs, short_names
from train.pages.story import sentences
from train.settings.config import TrainConfig

pytest.importorskip("matplotlib")

VOID = {"meta", "img", "br", "link", "input", "hr"}
CLIPS = ("test/clip-00000.mp4", "test/clip-00001.mp4", "test/clip-00002.mp4")


class Document(HTMLParser):
    """A page's elements; fails where a tag is closed that is not open, or stays open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), (tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words += f" {data}"

    def having(self, name: str) -> list[str]:
        return [value for _, own in self.elements if (value := own.get(name)) is not None]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, toy_bank: Path) -> list[Path]:
    """A run that has learned and one that has not, about the toy clips."""
    top = tmp_path_factory.mktemp("runs")
    settings = {"bank": [str(toy_bank)], "max_frames_num": 6}
    return [
        write_a_run(top / "good", CLIPS, settings=settings),
        write_a_run(top / "bad", CLIPS, good=False, settings=settings | {"learning_rate": 0.5}),
    ]


@pytest.fixture(scope="module")
def text(runs: list[Path]) -> str:
    return page(read_runs(runs))


def test_it_is_well_made_and_holds_all_that_it_shows(text: str) -> None:
    document = Document(text)
    ids = document.having("id")
    assert len(ids) == len(set(ids))
    for address in [*document.having("src"), *document.having("href")]:
        assert address.startswith("data:image/") or address[1:] in ids, address[:80]
    assert not [tag for tag, _ in document.elements if tag in ("script", "link", "iframe")]
    assert not re.search(r"@import|url\((?!#)", text)
    assert "default-src 'none'" in text
    pictures = [own for tag, own in document.elements if tag == "img"]
    assert len(pictures) > 40
    assert all(own.get("alt") and own.get("width") for own in pictures)
    for tag, own in document.elements:
        if tag == "svg":
            assert own.get("aria-label") or own.get("aria-hidden")


def test_it_says_what_was_learned_and_what_was_not(text: str) -> None:
    document = Document(text)
    words = " ".join(document.words.split())
    assert "2 runs: good, bad" in words
    good, bad = words.split("Where does it fail?")[:2]
    assert "better than anything that does not look at the video" in good
    assert "no better than without looking" in bad
    assert f"learning_rate {TrainConfig().learning_rate} 0.5" in words
    assert "The run warned: train.jsonl: 3 records <b>look</b> odd" in words
    assert "its error is 25 % larger than that of the best simple guess" in words


def test_what_answers_say_is_text(text: str) -> None:
    assert HOSTILE not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "What of &lt;i&gt;span&lt;/i&gt; at 1.50 s?" in text


def test_frames_are_of_the_videos_and_features_where_those_are_gone(
    text: str, toy_bank: Path, toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "frame at 0." in text
    assert "features at" not in text
    with Footage.of([toy_bank], {})[0] as footage:
        look = footage.look(CLIPS[0])
    assert look
    assert look.of_video
    assert len(look.pictures) == len(look.times) == 8
    world = {own["video"]: own for own in json.loads((toy / "world.json").read_text())["clips"]}
    shown = Image.open(io.BytesIO(base64.b64decode(look.pictures[-1].partition(",")[2])))
    assert shown.size == (64, 64)
    assert look.info.duration == world[CLIPS[0]]["duration"]
    assert look.near(0.0) == 0
    assert look.near(1e9) == 7
    monkeypatch.setattr("train.pages.read.footage.read_plan", lambda bank: None)
    with Footage.of([toy_bank], {})[0] as footage:
        gone = footage.look(CLIPS[0])
        assert footage.look("no/such.mp4") is None
    assert gone
    assert (gone.of_video, gone.why, gone.what) == (False, "video missing", "features")
    assert gone.pictures[0].startswith("data:image/png")


def test_a_bank_of_other_features_than_the_runs_is_told_of_and_not_shown(
    toy_bank: Path, tmp_path: Path
) -> None:
    theirs = Bank.open(toy_bank).config.to_json() | {"tower_digest": "0" * 32}
    footage, problems = Footage.of([toy_bank, tmp_path / "none"], theirs)
    assert footage.banks == []
    assert "another bank than the run's: tower_digest" in problems[0]
    assert "none" in problems[1]


def test_it_is_there_whatever_is_missing(tmp_path: Path) -> None:
    run = write_a_run(tmp_path / "alone", settings={"bank": [str(tmp_path / "gone")]})
    for name in (
        "lape/tables.safetensors",
        "predictions-test.jsonl",
        "predictions-test-shuffled.jsonl",
    ):
        (run / name).unlink()
    words = Document(page(read_runs([run]))).words
    assert str(tmp_path / "gone") in words
    assert "What LAPE has learned" not in words
    assert "overlap with the right span" in words
    for path in [*run.glob("eval-*.json"), run / "train.log"]:
        path.unlink()
    (run / "metrics.jsonl").write_text(
        '{"step": 1, "kind": "train", "seconds": 1.0, "loss": NaN}\n'
    )
    words = Document(page(read_runs([run]))).words
    assert "Its answers have not been scored" in words
    assert "it broke down" in words


def test_two_test_sets_and_a_run_of_another_bank(tmp_path: Path, runs: list[Path]) -> None:
    other = write_a_run(tmp_path / "other", settings={"bank": [str(tmp_path / "none")]})
    said = predictions(["x.mp4"], good=True)
    write_scores(other, "more", said, data_path="/data/more.jsonl", test_set="more")
    words = " ".join(Document(page(read_runs([runs[0], other]))).words.split())
    assert "Test set more" in words
    assert "on test set more" in words


def test_a_run_that_began_as_another_one_says_whose_learning_it_may_be(tmp_path: Path) -> None:
    first = write_a_run(tmp_path / "first")
    second = write_a_run(tmp_path / "second", settings={"stage_path": "first"})
    third = write_a_run(tmp_path / "third", settings={"stage_path": str(tmp_path / "llm")})
    (tmp_path / "llm").mkdir()
    began = [run.began_as for run in read_runs([first, second, third])]
    assert began == ["", "first", ""]
    said = [sentences(read_runs([folder])) for folder in (first, second, third)]
    assert ["may have been learned there" in text for text in said] == [False, True, False]


def test_a_control_that_said_nothing_is_not_shown_as_a_score(tmp_path: Path) -> None:
    """An error of the whole range, 100 %, would look like a perfect score."""
    run = write_a_run(tmp_path / "run", ["x.mp4"])
    nothing = [replace(one, answer="") for one in predictions(["x.mp4"], good=True)]
    write_scores(run, "test-untrained", nothing, untrained=True)
    found = page(read_runs([run]))
    assert (
        found.count("<td>no answer</td>") == 4
    )  # of span, point, box and number; any text is a text
    assert "<td>100.0 %</td>" not in found


def test_a_page_of_a_run_that_goes_on_loads_itself_again(runs: list[Path]) -> None:
    own = read_runs(runs[:1])
    assert '<meta http-equiv="refresh" content="7">' in document(own, [], [], 7)
    assert "refresh" not in document(own, [], [], 0).partition("<style>")[0]


def test_many_runs_begin_with_a_table(tmp_path: Path) -> None:
    folders = [write_a_run(tmp_path / f"run-{k}") for k in range(4)]
    found = sentences(read_runs(folders))
    assert found.startswith("<p>What each run reached, and whether it has learned that")
    assert found.count("<tr>") == 5
    assert found.count('<article class="run"') == 4


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a/x", "a/y"], ["x", "y"]),
        (["a/s/x", "b/s/x"], ["a/s/x", "b/s/x"]),
        (["r/lape/seed-0", "r/off/seed-0"], ["lape/seed-0", "off/seed-0"]),
    ],
)
def test_names_are_as_short_as_they_tell_runs_apart(paths: list[str], names: list[str]) -> None:
    assert short_names([Path("/top") / path for path in paths]) == names
