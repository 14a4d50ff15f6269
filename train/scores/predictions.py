"""Answers as the model gave them, a line of JSON each, which can be scored again without the model.

{"record": "r1", "media": ["a/clip.mp4"], "turn": 1, "task": "", "question": "When is it?",
 "reference": "from <t:1> to <t:4>", "duration": 8.0, "answer": "from 1.0 to 4.0", "cut": false,
 "kind": "span", "value": [1.0, 4.0], "scores": {"parsed": 1.0, "run_on": 0.0, "iou": 1.0}}
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path

from shards.errors import UserError
from shards.signed import Json, canonical_json, digest, write_atomic
from train.data.coordinates import in_numbers
from train.data.records import Record
from train.scores.captions import check_captions
from train.scores.kinds import Asked, asked
from train.scores.results import lines_of
from train.scores.scoring import is_off_scale, score, value_of
from train.scores.summary import constant_span, summarise_scores

EXAMPLES = 20
"""Number of answers that a report quotes."""

ASKED = ("record", "media", "turn", "question", "reference", "duration")
"""Fields of a prediction that say what was asked, and about what."""


@dataclass(frozen=True)
class Prediction:
    """An answer, and all that it is scored against."""

    record: str
    """The record's id."""
    media: tuple[str, ...]
    """Ids of the record's clips."""
    turn: int
    """Index of the answer among the record's turns, from 0."""
    task: str
    """The record's own task name, or empty."""
    question: str
    reference: str
    """In markup: seconds, and fractions of the frame."""
    duration: float
    """Seconds of the medium that its times belong to."""
    answer: str
    cut: bool
    """Whether it reached --max_new_tokens before its end."""

    @classmethod
    def blank(
        cls, record: Record, turn: int, duration: float, counts: Sequence[int]
    ) -> "Prediction":
        """Return a prediction without its answer: the question of a turn, and its reference.

        counts: anchors of each axis, by which those named in the reference are read.
        """
        # the last question before the answer; the turns before it are in the prompt, not in the report
        asked = [t.text for t in record.turns[:turn] if t.role == "user"]
        reference = in_numbers(record.turns[turn].text, duration, counts)
        question = asked[-1] if asked else ""
        about = (record.id, record.clips, turn, record.task, question, reference, duration)
        return cls(*about, answer="", cut=False)

    @cached_property
    def asked(self) -> Asked:
        """All that it is scored against."""
        return asked(self.reference, self.duration, question=self.question, task=self.task)

    def to_json(self) -> Json:
        """Return the answer with its kind, the value that was read from it, and its scores."""
        scores = score(self.asked, self.answer)
        kind = scores.pop("kind")
        value = value_of(self.asked, self.answer)
        return asdict(self) | {"kind": kind, "value": value, "scores": scores}


def report_of(predictions: Sequence[Prediction]) -> Json:
    """Return the scores of answers: by kind, beside the best constant span, with a few examples."""
    about, said = [p.asked for p in predictions], [p.answer for p in predictions]
    scores = [score(*pair) for pair in zip(about, said, strict=True)]
    report: Json = {"answers": len(predictions), "tasks": summarise_scores(about, said, scores)}
    report["questions"] = questions_in(predictions)
    # by kind: limits of answers are, too
    if cut := Counter(p.asked.kind for p in predictions if p.cut):
        report["cut"] = dict(cut)
    if off := Counter(a.kind for a, text in zip(about, said, strict=True) if is_off_scale(a, text)):
        report["off_scale"] = dict(off)
    constant = constant_span(about)
    if constant is not None:
        report["constant_span_miou"] = constant
    report["examples"] = [
        {"record": p.record, "reference": p.reference, "answer": p.answer}
        for p in predictions[:EXAMPLES]
    ]
    return report


def questions_in(predictions: Sequence[Prediction]) -> dict[str, str]:
    """Return kind -> digest of the questions of that kind, with their references, in order.

    Scores of two reports compare only where it is equal: a record file may have changed between them.
    """
    by_kind: dict[str, list[Json]] = {}
    for p in predictions:
        asked = {name: getattr(p, name) for name in ASKED}
        by_kind.setdefault(p.asked.kind, []).append(asked)
    return {
        kind: digest(canonical_json({"questions": own})) for kind, own in sorted(by_kind.items())
    }


def write_predictions(path: Path, predictions: Sequence[Prediction]) -> None:
    """Write answers with their scores, a line each; the file exists whole or not at all."""
    lines = [json.dumps(p.to_json(), ensure_ascii=False) + "\n" for p in predictions]
    write_atomic(path, "".join(lines).encode())


def read_predictions(path: Path) -> list[Prediction]:
    """Return the answers of a file of `write_predictions`; UserError names the line at fault."""
    if not path.is_file():
        raise UserError("no such file", where=path)
    names = {field.name for field in fields(Prediction)}
    found = []
    for number, line in lines_of(path):
        try:
            row = json.loads(line)
            values = {name: row[name] for name in names} | {"media": tuple(row["media"])}
            found.append(Prediction(**values | {"duration": float(row["duration"])}))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                "not an answer that evaluate wrote",
                got=f"{type(error).__name__}: {error}",
                where=f"{path}:{number}",
                fix="--rescore takes a predictions-NAME.jsonl",
            ) from None
    if not found:
        raise UserError("holds no answer", where=path)
    # before scoring begins, not after the last of ten thousand answers
    if any(p.asked.kind == "caption" for p in found):
        check_captions()
    return found
