"""Published datasets, a few rows each as their files have them: each loads, or is named with its fix.

pytest tests/train/data/test_published.py
"""

import json
from pathlib import Path
from typing import Any

import pytest

from shards.annotations.fault import RowError
from shards.errors import UserError
from train.data.importers import imported
from train.data.records import Record, parse_record, read_records

Row = dict[str, Any]


def says(*values: str | None) -> list[Row]:
    return [{"from": ("human", "gpt")[k % 2], "value": v} for k, v in enumerate(values)]


def chat(*roles_and_texts: str) -> list[Row]:
    pairs = zip(roles_and_texts[::2], roles_and_texts[1::2], strict=True)
    return [{"from": role, "value": text} for role, text in pairs]


def turns(row: Row) -> list[tuple[str, str]]:
    return [(turn.role, turn.text) for turn in parse_record(row, "f:1").turns]


VIDEO = {"id": "r", "video": "a.mp4"}
LLAVA_INSTRUCT = {
    "id": "000000033471",
    "image": "000000033471.jpg",
    "conversations": says("<image>\nWhat are the colors of the bus?", "White and red."),
}
SHAREGPT4VIDEO = {
    "id": "sharegpt4video_0",
    "video": "pexels/1093652-hd.mp4",
    "conversations": says("<video>\nDescribe it in detail.", "The video opens with waves."),
}
VILA = {
    "id": "v0",
    "video": "ego4d/9f1c.mp4",
    "media_dir": "videos",
    "conversations": says("What does C do?", "She cuts an onion."),
}
MVBENCH = {
    "video": "ZOIBW.mp4",
    "question": "What happened before the person opened the box?",
    "candidates": ["Sat on the bed.", "Put down the phone.", "Took the dish."],
    "answer": "Put down the phone.",
    "question_id": "Interaction_T1_13",
    "start": 0.0,
    "end": 10.4,
}
NEXTQA_ROW = {
    "video": "4010069381",
    "frame_count": 369,
    "width": 640,
    "height": 480,
    "question": "how do the two man play the instrument",
    "answer": 0,
    "qid": 6,
    "type": "CH",
    **{"a0": "roll the handle", "a1": "tap their feet", "a2": "strum", "a3": "hit", "a4": "pat"},
}
EGOSCHEMA = {
    "q_uid": "0074f737",
    "video": "0074f737.mp4",
    "question": "Taking into account all actions, what is c doing?",
    **{f"option {k}": text for k, text in enumerate(("cooking", "laundry", "cleaning"))},
    "answer": "2",
}
PERCEPTION = {
    "video": "video_8241.mp4",
    "question": "Is the camera moving?",
    "options": ["Moving.", "Static or shaking.", "I don't know"],
    "answer_id": 1,
    "area": "physics",
    "reasoning": "descriptive",
}
ASKED = "Answer with the letter and the option."

LOADED: dict[str, tuple[Row, list[tuple[str, str]]]] = {
    "LLaVA instruct": (
        LLAVA_INSTRUCT,
        [("user", "<image>\nWhat are the colors of the bus?"), ("assistant", "White and red.")],
    ),
    "ShareGPT4Video": (
        SHAREGPT4VIDEO,
        [
            ("user", "<video>\nDescribe it in detail."),
            ("assistant", "The video opens with waves."),
        ],
    ),
    "VILA without a tag": (
        VILA,
        [("user", "<video>\nWhat does C do?"), ("assistant", "She cuts an onion.")],
    ),
    "VILA, is_video": (
        {"image": "a.mp4", "is_video": True, "conversations": says("<image>\nWho?", "she")},
        [("user", "<image>\nWho?"), ("assistant", "she")],
    ),
    "a tag in a later turn": (
        VIDEO | {"conversations": says("Hi.", "Hello.", "<video>Who is it?", "she")},
        [
            ("user", "Hi."),
            ("assistant", "Hello."),
            ("user", "<video>Who is it?"),
            ("assistant", "she"),
        ],
    ),
    "MVBench": (
        MVBENCH,
        [
            (
                "user",
                f"<video>\n{MVBENCH['question']}\nA. Sat on the bed.\nB. Put down the phone.\n"
                f"C. Took the dish.\n{ASKED}",
            ),
            ("assistant", "B. Put down the phone."),
        ],
    ),
    "NExT-QA": (
        NEXTQA_ROW,
        [
            (
                "user",
                f"<video>\n{NEXTQA_ROW['question']}\nA. roll the handle\nB. tap their feet\n"
                f"C. strum\nD. hit\nE. pat\n{ASKED}",
            ),
            ("assistant", "A. roll the handle"),
        ],
    ),
    "EgoSchema": (
        EGOSCHEMA,
        [
            (
                "user",
                f"<video>\n{EGOSCHEMA['question']}\nA. cooking\nB. laundry\nC. cleaning\n{ASKED}",
            ),
            ("assistant", "C. cleaning"),
        ],
    ),
    "PerceptionTest": (
        PERCEPTION,
        [
            (
                "user",
                "<video>\nIs the camera moving?\nA. Moving.\nB. Static or shaking.\n"
                f"C. I don't know\n{ASKED}",
            ),
            ("assistant", "B. Static or shaking."),
        ],
    ),
    "options by letter, an answer and its number": (
        VIDEO
        | {"question": "Who?", "options": {"A": "he", "B": "she"}, "answer": "B", "answer_idx": 1},
        [("user", f"<video>\nWho?\nA. he\nB. she\n{ASKED}"), ("assistant", "B. she")],
    ),
    "VQA: answers that agree": (
        {"image": "a.jpg", "question": "Sky?", "answers": [{"answer": "blue"}, {"answer": "blue"}]},
        [("user", "<image>\nSky?"), ("assistant", "blue")],
    ),
    "a system prompt beside the turns": (
        VIDEO | {"system": "Be brief.", "conversations": says("<video>Who?", "she")},
        [("system", "Be brief."), ("user", "<video>Who?"), ("assistant", "she")],
    ),
    "a system prompt of a question": (
        VIDEO | {"system_prompt": "Be brief.", "question": "Who?", "answer": "she"},
        [("system", "Be brief."), ("user", "<video>\nWho?"), ("assistant", "she")],
    ),
    "the same system prompt twice": (
        VIDEO
        | {
            "system": "Be brief.",
            "conversations": chat("system", "Be brief.", "human", "<video>?", "gpt", "x"),
        },
        [("system", "Be brief."), ("user", "<video>?"), ("assistant", "x")],
    ),
    "two questions and two answers in a row": (
        VIDEO
        | {
            "conversations": chat("human", "<video>", "human", "Who?", "gpt", "she", "gpt", "it is")
        },
        [("user", "<video>\nWho?"), ("assistant", "she\nit is")],
    ),
    "roles in other letters": (
        VIDEO | {"conversations": chat("Human", "<video>Who?", "GPT", "she")},
        [("user", "<video>Who?"), ("assistant", "she")],
    ),
    "what a schema fills in": (
        {
            "id": "f",
            "video": "a.mp4",
            **{"image": "", "images": [], "videos": [None], "options": [], "caption": ""},
            **{"variables": {"temporal_input_locations": []}, "start": None, "is_video": None},
            "conversations": [
                turn | {"role": None, "content": None} for turn in says("<video>?", "x")
            ],
        },
        [("user", "<video>?"), ("assistant", "x")],
    ),
    "an Arrow struct of nothing": (
        {"image": {"bytes": None, "path": None}, "conversations": says("1 + 1?", "2")},
        [("user", "1 + 1?"), ("assistant", "2")],
    ),
    "what the turns say already": (
        VIDEO
        | {
            "conversations": says("<video>\nWho?\nA. he\nB. she", "B."),
            **{"question": "Who?", "options": ["he", "she"], "answer": "B", "data_source": "x"},
            **{"fps": 30, "duration": 12.5, "qid": 3},
        },
        [("user", "<video>\nWho?\nA. he\nB. she"), ("assistant", "B.")],
    ),
    "E.T. Instruct with its times in the text": (
        VIDEO
        | {"task": "slc", "source": "x", "src": [], "tgt": [36, 44]}
        | {"conversations": says("<video>When?", "36.0 - 44.0 seconds")},
        [("user", "<video>When?"), ("assistant", "36.0 - 44.0 seconds")],
    ),
}


@pytest.mark.parametrize("name", LOADED)
def test_rows_as_they_are_published_load(name: str) -> None:
    row, expected = LOADED[name]
    assert turns(row) == expected


def test_the_paths_of_vila_are_under_its_media_dir() -> None:
    assert parse_record(VILA, "f:1").clips == ("videos/ego4d/9f1c.mp4",)
    with pytest.raises(RowError, match="leads out of its root"):
        parse_record(VILA | {"media_dir": "/data"}, "f:1")


QUESTION = VIDEO | {"question": "Who?"}
TALK = VIDEO | {"conversations": says("<video>Who?", "she")}
REFUSED: list[tuple[Row, str, str]] = [
    (VIDEO | {"conversations": says("<video>?", "x", "y?", None)}, "empty answer",
     "turn 4 of 4 (gpt) is empty, expected an answer, got ''"),
    (VIDEO | {"conversations": says("<video>?", "x", "y?", " \n")}, "empty answer", "turn 4 of 4"),
    (VIDEO | {"conversations": says("<video>?", None)}, "no supervised text", "no gpt turn with an"),
    (QUESTION | {"answer": None}, "no supervised text", "a question without `answer`"),
    (QUESTION | {"answer": "  "}, "no supervised text", "a question without `answer`"),
    (VIDEO | {"caption": ""}, "no supervised text", "`caption` is empty"),
    (VIDEO | {"conversations": []}, "no supervised text", "`conversations` is empty"),
    (VIDEO | {"conversations": says(None, "x")}, "turns of no known form",
     "a turn's value must be a text or a list, got null"),
    (VIDEO | {"conversations": says("<video>?", "x", "and then?")}, "last question without an answer",
     "turn 3, the last, is of user, expected an answer after it, got 'and then?'"),
    (VIDEO | {"conversations": chat("observer", "<video>?", "gpt", "x")}, "turns of no known form",
     "unknown role 'observer'; known are human, user, gpt"),
    (VIDEO | {"conversations": [*says("<video>?"), {"from": "gpt", "value": "x", "weight": 0.5}]},
     "a field that nothing reads", "a turn's `weight`, got 0.5"),
    (TALK | {"system": "Be brief.", "system_prompt": "Be long."}, "two readings", "different system"),
    (TALK | {"answer": "he"}, "a field that nothing reads", "`answer`: this form of row does not read"),
    (TALK | {"options": ["he", "they"]}, "a field that nothing reads", "ignore_fields: [options]"),
    (TALK | {"candidates": ["he", "they"]}, "a field that nothing reads", "`candidates`"),
    (TALK | {"start_time": 3.5}, "a field that nothing reads", "`start` and `end`, in seconds"),
    (TALK | {"timestamps": [[0, 3.5]]}, "a field that nothing reads", "`timestamps`"),
    (TALK | {"bbox": [1, 2, 3, 4]}, "a field that nothing reads", "`bbox`"),
    # times of ASR, Panda-70M, Ego4D, VidSTG: as texts, as objects, by longer names
    *[(TALK | field, "a field that nothing reads", f"`{next(iter(field))}") for field in (
        {"start_time": "00:00:05"}, {"timestamp": ["0:00:14.5", "0:00:19.5"]}, {"time": "5s"},
        {"timestamp": "00:00:05.120 --> 00:00:10"}, {"gt_span": "[3, 4]"}, {"bbox": {"x": 1, "y": 2}},
        {"segments": [{"start": 1, "end": 2}]}, {"start_timestamp": "00:07:33.689"}, {"start_ms": 40},
        {"clip_start_sec": 3}, {"video_end_frame": 90}, {"narration_timestamp_sec": 1.5}, {"stop": 3},
        {"begin_fid": 3}, {"frame_range": [3, 4]}, {"meta": {"clip": {"start_sec": 3}}},
        {"box_x1y1x2y2": [[1, 2, 3, 4]]}, {"meta": {"split": [129.8, 184.0]}},
    )],
    # texts with slots, whose numbers are in a field: E.T. Instruct, DisTime, VTimeLLM
    *[(VIDEO | {"conversations": says(f"<video>When, after {slot}?", f"{slot} to {slot}")} | field,
       "a field that nothing reads", text) for slot, field, text in (
        ("<vid>", {"src": [12, 18]}, "`src`: this form"), ("<vid>", {"tgt": [3.5, 4]}, "`tgt`: this"),
        ("<s0>", {"meta": {"duration": 9, "token": {"<s0>": 0, "<e0>": 3.5}}}, "number for <s0>"),
    )],
    (TALK | {"rejected": "he"}, "a field that nothing reads", "`rejected`"),
    ({"video_path": "a.mp4", "conversations": says("Who?", "she")}, "a field that nothing reads",
     "`video_path`: this form of row does not read it, got 'a.mp4'; name the medium `video`"),
    (QUESTION | {"answers": ["she", "he"]}, "several answers", "`answers` has answers that differ"),
    (QUESTION | {"answer": ["she", "he"]}, "several answers", "write the one to be learned as `answer`"),
    (QUESTION | {"answer": True}, "not a text", "`answer`, expected a text, got true"),
    (QUESTION | {"answer": {"text": "she"}}, "not a text", "`answer`, expected a text"),
    (VIDEO | {"question": ["Who?"], "answer": "she"}, "not a text", "`question`"),
    (VIDEO | {"caption": ["a", "b"]}, "not a text", "`caption`, expected a text, got ['a', 'b']"),
    (QUESTION | {"options": ["he", "she"], "answer": 1}, "answer and options do not fit",
     "answer 1 is none of the options; write its letter, A to B, or its number, the first being 0"),
    (QUESTION | {"options": ["he", "she"], "answer": "it"}, "answer and options do not fit", "none of"),
    (QUESTION | {"options": ["he", "she"], "answer": "A", "answer_idx": 1},
     "answer and options do not fit", "are different options"),
    (QUESTION | {"option_1": "he", "option_2": "she", "answer_idx": 1},
     "answer and options do not fit", "counts from 0, the options from 1"),
    (QUESTION | {"options": ["he", "he"], "answer": "A"}, "answer and options do not fit", "twice"),
    (QUESTION | {"options": ["he"], "answer": "he"}, "answer and options do not fit", "1 options"),
    (QUESTION | {"options": ["he", "she"], "candidates": ["he"], "answer": "he"},
     "answer and options do not fit", "both options and candidates name the options; keep one"),
    (QUESTION | {"options": ["B. he", "A. she"], "answer": "A"}, "answer and options do not fit",
     "the options bring letters of another order, expected A, B, or none, got B, A"),
    (QUESTION | {"options": ["J. K. Rowling", "A. Christie"], "answer": "A"},
     "answer and options do not fit", "answer 'A' is none of the options"),
    (QUESTION | {"answer_idx": 1}, "answer and options do not fit", "there are no options"),
    ({"image": ["f1.jpg", "f2.jpg"], "is_video": True, "conversations": says("<image>?", "x")},
     "bad medium", "is_video with 2 media: are they the frames of one?"),
    (TALK | {"is_video": False}, "two readings", "is_video is false, and `video` names one"),
    ({"qid": 1, "query": "x", "vid": "v", "relevant_windows": [[1, 2]]}, "no known form",
     "python -m train.convert qvhighlights makes records of it"),
    ({"video_id": "p", "video_path": "pexels/p.mp4", "captions": [{"idx": "1", "content": "waves"}]},
     "no known form", "write one text as `caption`"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "reason", "text"), REFUSED)
def test_what_would_be_learned_wrong_is_named(row: Row, reason: str, text: str) -> None:
    with pytest.raises(RowError) as caught:
        parse_record(row, "f:1")
    assert (caught.value.reason, caught.value.place) == (reason, "f:1")
    assert text in str(caught.value)
    assert str(caught.value).isprintable()


def test_fields_that_mean_nothing_may_be_named_so() -> None:
    record = parse_record(TALK | {"answer": "he", "bbox": [1]}, "f:1", ignored=["answer", "bbox"])
    assert record.turns[1].text == "she"


CHARADES = "AO8RW 0.0 6.9##a person puts a book down.\nY6R7T 30.0 20.8##person cooks\nA 0 1##x\n"
ACTIVITYNET = {
    "v_QOlSCBRmfWY": {
        "duration": 82.73,
        "timestamps": [[0.83, 19.86], [17.37, 83.1], [60.81, 56.26]],
        "sentences": ["A young woman is seen standing. ", " She dances.", "She ends."],
    },
    "v_x": {"duration": 3.0, "timestamps": [[0, 1]], "sentences": []},
}


def test_bad_annotations_of_a_benchmark_are_named_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "charades_sta_train.txt"
    path.write_text(CHARADES)
    bad: list[RowError] = []
    rows = imported("charades-sta", path, [], bad)
    assert [row["video"] for row in rows] == ["AO8RW.mp4", "A.mp4"]
    assert list(map(str, bad)) == [f"{path}:2: start 30 is not before end 20.8"]
    assert bad[0].reason == "span backwards"


@pytest.mark.parametrize("clip", [False, True])
def test_activitynet_captions_are_read_moment_by_moment(tmp_path: Path, clip: bool) -> None:
    path = tmp_path / "train.json"
    path.write_text(json.dumps(ACTIVITYNET))
    bad: list[RowError] = []
    problems: list[str] = []
    rows = imported(
        "activitynet-captions", path, problems, bad, times_past_end="clip" if clip else None
    )
    assert problems == []
    assert rows[0]["video"] == "v_QOlSCBRmfWY.mp4"
    answers = [row["conversations"][1]["value"] for row in rows]
    late = ["from <t:17.370> to <t:82.730>"] if clip else []
    assert answers == ["from <t:0.830> to <t:19.860>", *late]
    texts = [str(error).partition(": ")[2] for error in bad]
    behind = (
        "end 83.1 is after the video's 82.73 seconds; --times_past_end clip ends it with the video"
    )
    assert texts == [
        *([] if clip else [behind]),
        "start 60.81 is not before end 56.26",
        "1 timestamps for 0 sentences",
    ]
    problems = []
    assert read_records(path, problems) == []
    assert problems == [
        f"{path}: expected a list of records, got an object with 'v_QOlSCBRmfWY', 'v_x': ActivityNet "
        "Captions; python -m train.convert activitynet-captions makes records of it"
    ]


def test_a_charades_list_given_to_training_is_told_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "charades_sta_train.txt"
    path.write_text(CHARADES)
    problems: list[str] = []
    assert read_records(path, problems) == list[Record]()
    assert problems == [
        f"{path}: this is Charades-STA; python -m train.convert charades-sta makes records of it"
    ]


def test_a_form_that_someone_added_is_refused_like_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    from shards.annotations import forms

    def broken(row: Row, media: object) -> list[Row]:
        raise UserError("no", got=row["mine"])

    monkeypatch.setitem(forms.FORMS, "mine", broken)
    with pytest.raises(RowError, match="f:1: no, got 3"):
        parse_record({"video": "a.mp4", "mine": 3}, "f:1")


@pytest.mark.parametrize("first", ["J. K. Rowling", "U.S. flag", "(A) she", "A. she"])
def test_an_options_own_text_is_not_taken_for_its_letter(first: str) -> None:
    """Letters are removed where all options bring them, in their order; initials are text."""
    row = QUESTION | {"options": [first, "a cat"], "answer": first}
    asked, answered = parse_record(row, "f:1").turns
    assert f"\nA. {first}\nB. a cat\n" in asked.text
    assert answered.text == f"A. {first}"


def test_dates_and_words_beside_a_conversation_are_no_times() -> None:
    for field in ({"timestamp": "2024-05-01 12:00:05"}, {"time": "evening"}, {"segments": "all"}):
        assert parse_record(TALK | field, "f:1").turns
