"""A row's `timeline`: parts of videos that are joined end to end into one medium.

"timeline": [{"video": "a.mp4", "start": 3, "end": 7}, {"video": "b.mp4"}]
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from shards.annotations.fault import RowError, short
from shards.annotations.fields import is_empty, listed

REASON = "bad timeline"


class Cut(NamedTuple):
    """A part of a video on a timeline."""

    video: str
    start: float | None = None
    """Seconds of the clip; None for its beginning."""
    end: float | None = None
    """None for its end."""

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in self._asdict().items() if value is not None}


def cuts_of(row: Mapping[str, Any], path_of: Callable[[Any], str]) -> list[Cut]:
    """Return the parts of a row's `timeline`; raises RowError for a bad one.

    path_of: returns the path of a video's field.
    """
    return [_cut(part, number, path_of) for number, part in enumerate(listed(row, "timeline"), 1)]


def _cut(part: Any, number: int, path_of: Callable[[Any], str]) -> Cut:
    where = f"part {number} of `timeline`"
    if not isinstance(part, dict):
        raise RowError(REASON, where, got=short(part), expected='{"video": ..., "start", "end"}')
    # Arrow gives each part all fields that any part has, null where it has none
    given = {name: value for name, value in part.items() if not is_empty(value)}
    # `stop` for `end` would otherwise take the whole clip without a word
    if unknown := sorted(map(str, set(given) - set(Cut._fields))):
        expected = "only video, start and end"
        raise RowError(REASON, f"{where} has `{unknown[0]}`", expected=expected)
    if "video" not in given:
        raise RowError(REASON, f"{where} names no `video`", got=short(part))
    cut = Cut(path_of(given["video"]), given.get("start"), given.get("end"))
    for name, time in zip(("start", "end"), cut[1:], strict=True):
        a_number = isinstance(time, int | float) and not isinstance(time, bool)
        if time is not None and not (a_number and 0 <= time < math.inf):
            expected = "seconds, not negative"
            raise RowError(REASON, f"{where}: {name}", got=short(time), expected=expected)
    if cut.end is not None and not (cut.start or 0.0) < cut.end:
        raise RowError(REASON, f"{where}: start {cut.start or 0:g} is not before end {cut.end:g}")
    return cut
