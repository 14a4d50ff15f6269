"""The error of one row of an annotation file: refused together with others, or left out and counted.

raise RowError("empty answer", "turn 2 (gpt)", got="''", expected="a text")
"""

import re

from shards.errors import UserError

PLACE = re.compile(r"(.+?)(?::(\d+)|((?:\[[^\]]*\])+))")
"""`file:line`, or `file[index]`."""


class RowError(UserError):
    """The fault of one row. `reason` is its category when faults are counted."""

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
        # pickle calls the class with `args`: workers raise this across processes
        self.args = (reason, *self.args)
        self.reason = reason
        self.place, self.id = "", ""
        """The row's place, `file:line` or `file[index]`, and its id if it has one."""

    def at(self, place: str, id_: str = "") -> "RowError":
        """Return the same fault with the place and id of its row."""
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
    """Return a value for a message: printable, as JSON, and at most 80 characters."""
    text = _written(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _written(value: object) -> str:
    # as JSON writes them, since users see their own file, not Python
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{', '.join(map(_written, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_written(k)}: {_written(v)}' for k, v in value.items())}}}"
    return ascii(value)


def lacking(item: object, *names: str) -> str:
    """Return what an item lacks to be an object with some fields; empty where it is one."""
    if not isinstance(item, dict):
        return f"expected an object, got {json_type(item)}"
    return next((f"no field {name!a}" for name in names if name not in item), "")


def json_type(value: object) -> str:
    """Return the name of a JSON value's type for a message: null, bool, str, list ..."""
    return "null" if value is None else type(value).__name__
