"""Short answers in words: the same text, a number, an option, a list in order."""

import re
import string
from collections.abc import Sequence

SPELLED = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
    *("nineteen", "twenty"),
)
_NUMBER = re.compile(rf"(?i)(?<![\w.])-?\d+(?:\.\d+)?(?![\w%])|\b(?:{'|'.join(SPELLED)})\b")


def without_thinking(answer: str) -> str:
    """Return an answer without the think block before it; empty where that block has no end."""
    return "" if "<think>" in answer.rpartition("</think>")[2] else answer.rpartition("</think>")[2]


def folded(text: str) -> str:
    """Return a text without case, without blanks and marks around it, and with single blanks in it."""
    return " ".join(text.casefold().split()).strip(" .!\"'`*")


def number_of(text: str) -> float | None:
    """Return the value of a text that is nothing but a number, in digits or in words."""
    # the whole text: "3 of them" asks for more than a number
    match = _NUMBER.fullmatch(_plain(folded(text)))
    return _value(match[0]) if match else None


def one_number(text: str) -> float | None:
    """Return the number in an answer, None if it has none or several different ones."""
    values = {_value(match[0]) for match in _NUMBER.finditer(_plain(without_thinking(text)))}
    return values.pop() if len(values) == 1 else None


def decimals(text: str) -> int:
    """Return how many digits a number has after its point."""
    return len(folded(text).partition(".")[2])


def items_of(text: str) -> list[str]:
    """Return the items of a list separated by commas, arrows, lines or `then`, or of letters (BAC)."""
    plain = without_thinking(text).strip(" .\n()[]")
    # a word in capitals is no order: its letters must be the first ones of the alphabet, each once
    if re.fullmatch(r"[A-Z]{2,}", plain) and len(set(plain)) == len(plain) == ord(max(plain)) - 64:
        return list(plain.lower())
    parts = re.split(
        r"\s*(?:->|→|>|,|;|\n|\bthen\b|\s-\s|(?<=^\w)-|(?<=\b\w)\sand\s(?=\w\b))\s*", plain
    )
    items = [re.sub(r"^(?:\d+[.)]\s+|and\s+|first\s+|finally\s+)", "", folded(p)) for p in parts]
    return [item.strip(" ()") for item in items if item]


def letter_of(answer: str, options: Sequence[str]) -> str | None:
    """Return the letter of an answer to a multiple-choice question, None if it gives none.

    It is a letter (A, A., (A), option A), an option's text, or both where they agree. Without options
    it is a letter.
    """
    said = re.sub(r"[*`]", "", without_thinking(answer)).strip()
    texts = [folded(option) for option in options]
    letters = string.ascii_uppercase[: len(options) or 26]
    if texts.count(folded(said)) == 1:
        return letters[texts.index(folded(said))]
    # how chat models begin: "The correct answer is: B."
    lead = r"(?:(?:the|my|best|correct|answer|option|choice|is)\b[:\s]*)*"
    match = re.fullmatch(rf"(?is){lead}\(?([A-Z])(?:[.):,]+(.*))?", said)
    if not match or match[1].upper() not in letters:
        return None
    letter, text = match[1].upper(), folded(match[2] or "")
    own = dict(zip(letters, texts, strict=False)).get(letter, "")
    # a letter with another option's text is two answers
    return letter if text in ("", own) else None


def _plain(text: str) -> str:
    """Return a text without the commas between thousands."""
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)


def _value(number: str) -> float:
    word = number.lower()
    return float(SPELLED.index(word) if word in SPELLED else word)
