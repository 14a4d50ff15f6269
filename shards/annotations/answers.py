r"""Questions with one answer, or several options: MVBench, NExT-QA, EgoSchema, PerceptionTest and others.

    asked_and_answered({"question": "Who?", "candidates": ["she", "he"], "answer": "he"})
    # ('Who?\nA. she\nB. he\nAnswer with the letter and the option.', 'B. he')

An answer is its option's letter, its whole text, or its number where the field defines what 0 is. An
ambiguous answer is a RowError: nothing is guessed, and a list is never turned into text.
"""

import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from shards.annotations.fault import RowError, UnsupervisedError, short
from shards.annotations.fields import listed

LISTS = ("options", "candidates", "choices", "option")
"""Fields with all options in one: a list of texts, or an object `{letter: text}`."""
COLUMNS = re.compile(r"a\d|option[ _]?\d"), re.compile(r"[A-Z]")
"""Names of fields with one option each: NExT-QA's a0, EgoSchema's `option 0`; MMBench's A, B."""
NUMBERED = ("answer_id", "answer_idx", "answer_index", "correct_choice", "correct_answer_index")
"""Fields with the number of the right option; the first is 0 (PerceptionTest, LongVideoBench)."""
BROUGHT = re.compile(r"\(?([A-Z])[.):]\s*")
"""A letter before an option's text: `A. red`, `(A) red`."""
NO_FIT = "answer and options do not fit"


def asked_and_answered(row: Mapping[str, Any]) -> tuple[str, str]:
    """Return the question and the answer of a row; with options, as a lettered multiple choice."""
    question = _text(row["question"], "question")
    options, numbers = _options(row)
    answers = _answers(row)
    if not options:
        name, answer = answers[0]
        if name in NUMBERED:
            raise RowError(NO_FIT, f"`{name}` is the number of an option, and there are no options")
        return question, answer
    plain, other_letters = _without_letters(options)
    letters = string.ascii_uppercase[: len(options)]
    lines = [f"{letter}. {text}" for letter, text in zip(letters, plain, strict=True)]
    asked = "\n".join([question, *lines, "Answer with the letter and the option."])
    meant = set()
    for name, answer in answers:
        if name in NUMBERED and numbers and numbers[0] != "0":
            raise RowError(NO_FIT, f"`{name}` counts from 0, the options from {numbers[0]}")
        by_number = numbers or [str(k) for k in range(len(options)) if name in NUMBERED]
        own = {
            k
            for k, names in enumerate(zip(options, plain, lines, strict=True))
            # columns a0, a1 define which option is 0; a list of options does not
            if (answer.strip() in names and name not in NUMBERED)
            or (
                not other_letters and re.fullmatch(rf"\(?{letters[k]}[.)]?", answer.strip().upper())
            )
            or (by_number and answer.strip() == by_number[k])
        }
        _refuse_unclear(name, row[name], len(own), letters)
        # text and number may both be given: they must be one option
        meant |= own
    if len(meant) != 1:
        said = " and ".join(f"`{name}` {short(answer)}" for name, answer in answers)
        raise RowError(NO_FIT, f"{said} are different options")
    return asked, lines[meant.pop()]


def _refuse_unclear(name: str, answer: object, meant: int, letters: str) -> None:
    """Raise RowError for an answer that is not exactly one option; meant: the number it matches."""
    if meant == 1:
        return
    many = "more than one of" if meant else "none of"
    number = (
        ", or its number, the first being 0, as `answer_index`" if str(answer).isdigit() else ""
    )
    raise RowError(
        NO_FIT,
        f"{name} {short(answer)} is {many} the options",
        fix=f"write its letter, A to {letters[-1]}{number}",
    )


# -- options


def _options(row: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Return the options of a row (empty without any), and their numbers if their fields have them."""
    numbered, lettered = (sorted(n for n in row if kind.fullmatch(n)) for kind in COLUMNS)
    columns = numbered or (lettered if len(lettered) > 1 else [])
    lists = [name for name in LISTS if name in row]
    named = [*lists, *([", ".join(columns)] if columns else [])]
    if len(named) > 1:
        raise RowError(NO_FIT, f"both {' and '.join(named)} name the options; keep one")
    if columns:
        given = [row[name] for name in columns]
    elif lists:
        given = _given(row, lists[0])
    else:
        return [], []
    if not 2 <= len(given) <= 26:
        raise RowError(NO_FIT, f"`{named[0]}`", got=f"{len(given)} options", expected="2 to 26")
    options = [_option(option, named[0]) for option in given]
    # an answer that is two options has no letter
    if len(set(options)) < len(options):
        raise RowError(NO_FIT, f"`{named[0]}` has an option twice: {short(options)}")
    return options, [name[-1] for name in columns if name[-1].isdigit()]


def _without_letters(options: Sequence[str]) -> tuple[list[str], bool]:
    """Return options without the letters that they bring, and whether they keep letters of their own.

    Raises RowError for A, B, C in another order, which an answer's letter could mean or not.
    """
    brought = [BROUGHT.match(option) for option in options]
    found = [match[1] for match in brought if match]
    letters = list(string.ascii_uppercase[: len(options)])
    # they would get a second one
    if found == letters:
        plain = [o[m.end() :] for o, m in zip(options, brought, strict=True) if m]
        return plain, False
    if sorted(found) == letters:
        got, expected = ", ".join(found), f"{', '.join(letters)}, or none"
        raise RowError(NO_FIT, "the options bring letters of another order", got, expected)
    # "J. K. Rowling" begins as a letter does: part of the text
    return list(options), len(found) == len(options)


def _given(row: Mapping[str, Any], name: str) -> list[Any]:
    value = row[name]
    if not isinstance(value, dict):
        return listed(row, name)
    if sorted(value) != list(string.ascii_uppercase[: len(value)]):
        raise RowError(
            NO_FIT, f"`{name}`", got=short(value), expected="a list, or {A: ..., B: ...}"
        )
    return [value[letter] for letter in sorted(value)]


def _option(option: Any, name: str) -> str:
    """Return the text of an option; STAR's are objects with `choice`."""
    if isinstance(option, dict) and isinstance(option.get("choice"), str):
        option = option["choice"]
    return _text(option, name)


# -- answers


def _answers(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (field, text) of each field with the right answer: one, or one and its number."""
    names = [name for name in ("answer", "answers", *NUMBERED) if name in row]
    if "answer" in names and "answers" in names:
        names.remove("answers")  # left unread, so that it is refused if it says anything else
    if not names:
        raise UnsupervisedError("no supervised text", "a question without `answer`")
    return [(name, _one_answer(row, name)) for name in names]


def _one_answer(row: Mapping[str, Any], name: str) -> str:
    """Return the text of an answer; of a list, the text that all entries share (VQA's are objects)."""
    value = row[name]
    # csv files hold such lists as text
    if isinstance(value, str) and name == "answers" and value.lstrip()[:1] == "[":
        value = listed(row, name)
    if not isinstance(value, list):
        return _text(value, name)
    texts = [one.get("answer") if isinstance(one, dict) else one for one in value]
    # ten annotators of one question: an answer on which they differ cannot be a target
    if len({_text(text, name) for text in texts}) > 1:
        raise RowError(
            "several answers",
            f"`{name}` has answers that differ",
            got=short(texts),
            expected="one",
            fix="write the one to be learned as `answer`",
        )
    return _text(texts[0], name)


def _text(value: Any, name: str) -> str:
    """Return a text, or a number as text; raises RowError for other types."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise RowError("not a text", f"`{name}`", got=short(value), expected="a text")
    return str(value)
