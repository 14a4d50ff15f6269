"""P20: a perfect answer scores 1 in every benchmark, with coordinate tokens and as plain numbers alike.

pytest tests/promises/test_p20_scores.py
pytest -m slow tests/promises/test_p20_scores.py    models trained by heart, scored by the command

The perfect answer is what a model generates that has learned the reference by heart: the very tokens
that it was trained on, written out. What wrong answers get is in tests/train/scores/test_scoring.py.
"""

import importlib.util
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.generate import Piece, write_answer
from model.vlm import VLM
from shards.annotations.fault import RowError
from tests.train.paper import published
from train.batches.chat import Chat
from train.data.coordinates import in_numbers
from train.data.importers import IMPORTERS, imported
from train.data.records import Record, duration_before, parse_record
from train.scores.kinds import asked_of
from train.scores.scoring import score

SECONDS = 150.0
MARKS = ("temporal", "spatial_height", "spatial_width")


def llava_st(answer: str, *numbers: list[float]) -> dict[str, Any]:
    """Return a conversation of LLaVA-ST; numbers: times, heights and widths of the answer."""
    turns = [("human", "<video>\nWhat and when?"), ("gpt", answer)]
    lists = {
        f"{mark}_output_locations": n for mark, n in zip(MARKS, [*numbers, [], []], strict=False)
    }
    return {
        "video": "a.mp4",
        "conversations": [{"from": who, "value": value} for who, value in turns],
        "variables": {f"{mark}_input_locations": [] for mark in MARKS} | lists,
    }


T, H, W = "<TEMP-OUTPUT>", "<HEIGHT-OUTPUT>", "<WIDTH-OUTPUT>"
BOX = f"[{W}{H}{W}{H}]"
WINDOW = {"qid": 1, "query": "he runs", "duration": 150, "vid": "a"}
ANNOTATIONS: dict[str, Any] = {
    "charades-sta": "A 0.0 6.9##he runs\nB 20.83 31##he sits\n",
    "qvhighlights": [
        WINDOW | {"relevant_windows": [[0, 16], [20, 36.54], [82, 150]]},
        WINDOW | {"relevant_windows": [[30, 44]]},
    ],
    "activitynet-captions": {
        "a": {
            "duration": 82.73,
            "timestamps": [[0.83, 19.86], [17.37, 60.81]],
            "sentences": ["He runs.", "He sits."],
        }
    },
    "refcoco": [
        {
            "file_name": "p.jpg",
            **{"width": 640, "height": 480, "bbox": [103.93, 299.99, 134.22, 177.42]},
            **{"sents": ["she"], "boxes": "xywh"},
        }
    ],
    "hc-stvg": {
        "a.mp4": {
            "bbox": [[64 + k, 36, 320 - k, 180.5] for k in range(60)],
            "st_time": 1.75,
            "ed_time": 13.77,
            "img_size": [360, 640],
            "English": "The man walks.",
        }
    },
    "vidstg": [published.VIDSTG | {"fps": 2.0}],
    "llava-st": [
        llava_st(f"It is in {{{T}{T}}} .", [0.081, 0.367]),
        llava_st(f"Starts in {T}.", [0.367]),
        llava_st(
            f"a dog {BOX} then a cat {BOX} at {T}", [0.333], [0.5, 0.75] * 2, [0.125, 0.5] * 2
        ),
        llava_st(
            f"{{{T}{T}}} {T}: {BOX} {T}: {BOX}",
            [0.1, 0.5, 0.1, 0.5],
            [0.2, 0.5, 0.3, 0.6],
            [0.1, 0.6, 0.2, 0.7],
        ),
        llava_st(f"{T}: {BOX}\n{T}: {BOX}", [0.1, 0.5], [0.2, 0.5, 0.3, 0.6], [0.1, 0.6, 0.2, 0.7]),
        llava_st(f"{{{T}{T}}} he runs, {{{T}{T}}} he sits", [0.01, 0.25, 0.5, 0.999]),
    ],
}
OPTIONS = {"question": "What falls?", "options": ["a red ball", "a blue box"]}
TASKS = [
    *({"question": "How many?", "answer": answer} for answer in ("3", "0.53", "seven")),
    *(OPTIONS | {"answer": answer} for answer in ("A", "a blue box")),
    *({"question": "In what order?", "answer": answer} for answer in ("B, A, C", "BAC")),
    {"question": "In what order?", "answer": "he sits, he runs", "task": "order"},
    {"question": "Who is it?", "answer": "The man in white."},
    {"question": "Where is it?", "answer": "at <x:0.12345><y:0.54321>"},
    {"question": "When?", "answer": "The 3rd of 7 events lasts from <t:10> to <t:40>"},
    {"question": "When?", "answer": "from <TEMP-010> to <TEMP-055>"},
    {"caption": "A man in white runs to his car and drives away, twice."},
]
LAPE: dict[str, dict[str, Any]] = {
    "tokens": {},
    "plain": {"enable_lape": False},
    "time": {"lape_axes": "time"},
    "space": {"lape_axes": "space"},
}


@pytest.fixture(scope="module")
def models(make_model: Callable[..., VLM]) -> dict[str, VLM]:
    return {name: make_model(**changes) for name, changes in LAPE.items()}


def records_of(name: str, folder: Path) -> list[Record]:
    """Return the records of a benchmark's annotations, or of the tasks in words."""
    if name == "tasks":
        rows = [{"video": "a.mp4"} | row for row in TASKS]
    else:
        content = ANNOTATIONS[name]
        path = folder / ("a.txt" if isinstance(content, str) else "a.json")
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        problems: list[str] = []
        bad: list[RowError] = []
        published.write_json(folder / "vidor" / "0000" / "2401075277.json", published.vidor())
        rows = imported(name, path, problems, bad, vidor=str(folder / "vidor"))
        assert (problems, bad) == ([], [])
    return [parse_record(row, f"{name}:{k}") for k, row in enumerate(rows)]


def in_seconds(record: Record) -> Record:
    """Return a record whose shares of its clip are written in seconds."""
    texts = [
        re.sub(r"<t:([\d.]+)%>", lambda m: f"<t:{float(m[1]) / 100 * SECONDS:.6f}>", turn.text)
        for turn in record.turns
    ]
    turns = zip(record.turns, texts, strict=True)
    return replace(record, turns=tuple(replace(turn, text=text) for turn, text in turns))


def answers(model: VLM, record: Record, durations: list[float]) -> list[tuple[str, str, float]]:
    """Return (reference, perfect answer, its medium's seconds) for each answer of a record."""
    chat = Chat.of(model)
    row = chat.encode(record.turns, durations)
    learned: list[list[Piece]] = [[]]
    for id_, axis, coord, on in zip(row.ids, row.axis, row.coord, row.supervised, strict=True):
        if not on or id_ in chat.stop:
            learned += [[]] if learned[-1] else []
        else:
            learned[-1].append(Piece(id_, axis, coord))
    turns = [k for k, turn in enumerate(record.turns) if turn.role == "assistant"]
    out = []
    for turn, pieces in zip(turns, filter(None, learned), strict=True):
        duration = duration_before(record, durations, turn)
        reference = in_numbers(record.turns[turn].text, duration, chat.counts)
        out.append((reference, write_answer(model, pieces, duration), duration))
    return out


@pytest.mark.parametrize("lape", LAPE)
@pytest.mark.parametrize("name", [*IMPORTERS, "tasks"])
def test_the_reference_as_the_answer_scores_one(
    tmp_path: Path, models: dict[str, VLM], name: str, lape: str
) -> None:
    kinds = set()
    for record in map(in_seconds, records_of(name, tmp_path)):
        ((reference, said, duration),) = answers(models[lape], record, [SECONDS])
        about = asked_of(record, 1, reference, duration)
        kinds.add(about.kind)
        if about.kind == "caption" and not importlib.util.find_spec("pycocoevalcap"):
            continue
        found = score(about, said)
        assert found.get("parsed", 1) == 1, (reference, said)
        for metric, value in found.items():
            if metric in ("kind", "run_on"):
                continue
            if "error" in metric:
                # a time is written to a tenth of a second, a place to a thousandth of the frame
                assert value <= (1e-4 if lape == "tokens" else 0.0501), (reference, said)
            else:
                # spans here are longer than 6 s, sides than a tenth: IoUs lose little by rounding
                least = 1 - 1e-4 if lape == "tokens" else 0.98
                assert least <= value <= 1 + 1e-9, (metric, reference, said)
    expected = {
        "charades-sta": {"span"},
        "activitynet-captions": {"span"},
        "qvhighlights": {"windows"},
        "refcoco": {"box"},
        "hc-stvg": {"tube"},
        "vidstg": {"tube"},
        "llava-st": {"span", "time", "mixed", "tube"},
        "tasks": {"number", "choice", "order", "text", "point", "span", "caption"},
    }
    assert kinds == expected[name]


MEDIA = st.lists(st.sampled_from([0.0, 4.0, 9.5, 60.0]), min_size=1, max_size=4)


@given(durations=MEDIA, split=st.integers(1, 4), lape=st.sampled_from(["tokens", "plain"]))
@settings(deadline=None, max_examples=60)
def test_times_are_read_with_the_duration_of_their_own_medium(
    models: dict[str, VLM], durations: list[float], split: int, lape: str
) -> None:
    """Media in two rounds, pictures among them; each answer is about the last medium before it."""
    rounds = [durations[:split], durations[split:]]
    turns, before = [], durations[0]
    for media in rounds:
        before = media[-1] if media else before
        tags = "".join("<video>" if seconds else "<image>" for seconds in media)
        answer = f"from <t:{before / 4}> to <t:{before}>" if before else "no time"
        turns += [("human", f"{tags}\nWhen?"), ("gpt", answer)]
    row = {
        "video": [f"{k}.mp4" for k in range(len(durations))],
        "conversations": [{"from": who, "value": value} for who, value in turns],
    }
    record = parse_record(row, "r:1")
    for number, (reference, said, duration) in enumerate(answers(models[lape], record, durations)):
        found = score(asked_of(record, 2 * number + 1, reference, duration), said)
        assert found.get("iou", found.get("exact")) == pytest.approx(
            1, abs=1e-5 if lape == "tokens" else 0.04
        )


def numbered(clips: list[str]) -> list[tuple[list[str], str, str]]:
    """Return a question about each clip whose answer has other numbers before its times."""
    which = ("1st", "2nd", "3rd", "4th")
    return [
        (
            [clip],
            f"<video>\nWhen is event {k + 1}?",
            f"The {which[k]} of 7 events lasts from <t:{k / 4}> to <t:{k / 2 + 1}>",
        )
        for k, clip in enumerate(clips)
    ]


def second(clips: list[str]) -> list[tuple[list[str], str, str]]:
    """Return questions about the second of two clips."""
    return [
        (
            [clips[k - 1], clip],
            f"<video><video>\nWhen is event {k + 1} of the second?",
            f"from <t:{k / 4}> to <t:{k / 2 + 1}>",
        )
        for k, clip in enumerate(clips)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("ask", "lape"), [(numbered, False), (second, True), (second, False)])
def test_what_a_model_has_by_heart_it_scores(
    toy: Path,
    toy_bank: Path,
    train_here: Callable[..., Path],
    tmp_path: Path,
    ask: Callable[[list[str]], list[tuple[list[str], str, str]]],
    lape: bool,
) -> None:
    """Black box: trained until nothing is left to learn, then scored by the command."""
    clips = sorted(f"train/{path.name}" for path in (toy / "videos" / "train").glob("*.mp4"))[:4]
    rows = [
        {
            "id": str(k),
            "video": media,
            "conversations": [
                {"from": "human", "value": question},
                {"from": "gpt", "value": answer},
            ],
        }
        for k, (media, question, answer) in enumerate(ask(clips))
    ]
    records = tmp_path / "records.jsonl"
    records.write_text("\n".join(map(json.dumps, rows)))
    run = train_here(
        tmp_path / "run",
        data_path=records,
        enable_lape=lape,
        max_steps=240,
        per_device_train_batch_size=4,
        learning_rate=3e-3,
    )
    from train.evaluate import main

    main(["--model", str(run), "--bank", str(toy_bank), "--data_path", str(records)])
    scores = json.loads((run / "eval-records.json").read_text())["tasks"]["span"]
    assert scores["parsed"] == 1
    assert scores["iou"] > 0.95
