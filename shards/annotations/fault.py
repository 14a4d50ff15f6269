"""What is wrong with one row of an annotation file: refused with all others, or left out and counted.

raise RowError("empty answer", "turn 2 (gpt)", got="''", expected="a text")
"""

import re

from shards.errors import UserError

PLACE = re.compile(r"(.+?)(?::(\d+)|((?:\[[^\]]*\])+))")
"""`file:line`, or `file[index]`."""


class RowError(UserError):
    """A fault of one row: `reason` is what it is counted under, the text says what, got and expected."""

    def __init__(
        self,
        reason: str,
        what: str,
        got: object = None,
        expected: str | None = None,
        where: object = None,
        fix: str | None = None,
    ) -> None:
        super().__init__(what, got, expected, where, fix)
        self.args = (reason, *self.args)
        self.reason = reason
        self.place, self.id = "", ""
        """Of the row: `file:line` or `file[index]`, and its own id where it has one."""

    def at(self, place: str, id_: str = "") -> "RowError":
        """Return the same fault with the row that has it."""
        where = f"{place} (id {id_})" if id_ else place
        error = type(self)(self.reason, self.what, self.got, self.expected, where, self.fix)
        error.place, error.id = place, id_
        return error


class UnsupervisedError(RowError):
    """A row without an answer, from which nothing can be learned."""


def split_place(place: str) -> tuple[str, str]:
    """Return the file and the line or index of a row's place."""
    match = PLACE.fullmatch(place)
    return (match[1], match[2] or match[3]) if match else (place, "")


def short(value: object) -> str:
    """Return a value as a message shows it: printable, in JSON's words, and at most 80 letters."""
    text = _written(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _written(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{', '.join(map(_written, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_written(k)}: {_written(v)}' for k, v in value.items())}}}"
    return ascii(value)


def json_type(value: object) -> str:
    """Return what a value of JSON is called in a message: null, bool, str, list ..."""
    return "null" if value is None else type(value).__name__
