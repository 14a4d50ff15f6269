"""What clips look like: frames of their videos where those still are, else their features as colours.

A frame is a JPEG inside the page; features are its cells, three principal components as red, green, blue.
"""

import base64
import io
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import gettempdir
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from shards.errors import UserError, first_line
from shards.format.features import FeatureConfig
from shards.format.plan import ClipSource, read_plan
from shards.read.bank import Bank, ClipInfo
from shards.read.banks import conflicts
from shards.signed import Json

if TYPE_CHECKING:
    from preprocess.decode.source import SourceReader

SIDE = 168  # pixels of a thumbnail's longer side: twice what a page shows
QUALITY = 72
MOST_CLIPS = 48
"""Whose videos are opened for one page; of others the features are shown."""


@dataclass(frozen=True)
class Look:
    """A clip as a page shows it."""

    info: ClipInfo
    pictures: tuple[str, ...]
    """Of each banked frame, a data: URI."""
    of_video: bool
    """Whether they are frames; else they are features as colours."""
    why: str
    """Why there are no frames, empty where there are."""

    @property
    def times(self) -> np.ndarray:
        """Seconds of the clip, of each picture."""
        return np.asarray(self.info.timestamps - self.info.start)

    def near(self, time: float) -> int:
        """Return which picture is nearest to a time."""
        return int(np.abs(self.times - time).argmin())

    @property
    def what(self) -> str:
        return "frame" if self.of_video else "features"


class Footage:
    """The clips of some banks; videos are read by one child process, which it ends.

    with Footage.of(paths) as footage:
        look = footage.look("test/clip-00000.mp4")
    """

    def __init__(self, banks: Sequence[Bank]) -> None:
        self.banks = list(banks)
        self._looks: dict[str, Look | None] = {}
        self._stack = ExitStack()
        self._opened = 0

    @classmethod
    def of(cls, paths: Sequence[Path], features: Json) -> tuple["Footage", list[str]]:
        """Return the clips of the banks that open, and why others do not.

        features: those that the model was trained on, as config.json has them; empty: not known.
        """
        theirs = FeatureConfig.from_json(features) if features else None
        banks, problems = [], []
        for path in paths:
            try:
                bank = Bank.open(path)
            except (UserError, OSError) as error:
                problems.append(first_line(error))
                continue
            # another bank may be there by now: its frames would be shown beside answers about others
            if theirs and (lines := conflicts(bank.config, theirs)):
                problems.append(f"{path} is another bank than the run's: {'; '.join(lines)}")
            else:
                banks.append(bank)
        return cls(banks), problems

    def __enter__(self) -> "Footage":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def place(self, clip: str) -> tuple[Bank, int] | None:
        """Return the bank and the row of a clip."""
        for bank in self.banks:
            if (row := bank.find(clip)) is not None:
                return bank, row
        return None

    def look(self, clip: str) -> Look | None:
        """Return a clip's pictures; None where no bank has it, or its features are damaged."""
        if clip not in self._looks:
            found = self.place(clip)
            # a clip is asked for by many answers, and decoded once
            self._looks[clip] = self._look(*found) if found else None
        return self._looks[clip]

    def _look(self, bank: Bank, row: int) -> Look | None:
        info = bank.clip(row)
        frames = self._frames(bank, row)
        if not isinstance(frames, str):
            return Look(info, tuple(map(jpeg, frames)), True, "")
        try:
            # the finest: the most to see
            cells = bank.read(row, min(bank.config.strides))
        except UserError:
            return None
        return Look(info, tuple(map(tiles, as_colours(cells))), False, frames)

    def _frames(self, bank: Bank, row: int) -> np.ndarray | str:
        """Return a clip's frames, uint8 `(units, height, width, rgb)`, or why there are none."""
        from preprocess.show.picture import read_frames

        source = self._sources.get(bank.where, {}).get(bank.ids[row])
        if source is None or not Path(source.path).exists():
            return "video missing"
        # bounded: a page is not to decode a whole test set
        if self._opened >= MOST_CLIPS:
            return "enough videos read"
        self._opened += 1
        meta = bank.meta(row)
        # by the bank's own sampling: these are the frames that the model saw
        frames = read_frames(self._reader, source, meta, bank.config.sampling)
        # of the frames that make a unit the first
        return frames if isinstance(frames, str) else frames[:: meta.frames_per_unit]

    @cached_property
    def _reader(self) -> "SourceReader":
        from preprocess.decode.decode_child import DecodeChild
        from preprocess.decode.source import SourceReader

        # a process of its own, begun only if a video is opened: a damaged one cannot end the page
        return self._stack.enter_context(SourceReader(DecodeChild(), Path(gettempdir())))

    @cached_property
    def _sources(self) -> dict[str, dict[str, ClipSource]]:
        """By bank: where each clip's video was when it was encoded."""
        found = {}
        for bank in self.banks:
            try:
                plan = read_plan(bank.path)
            except (UserError, OSError, AssertionError):  # a bank at a URL has no folder
                plan = None
            found[bank.where] = {clip.id: clip for clip in plan.clips} if plan else {}
        return found


def as_colours(cells: np.ndarray) -> np.ndarray:
    """Return cells as colours: `(frames, rows, cols, dim)` -> uint8 `(frames, rows, cols, 3)`."""
    from preprocess.show.picture import colours

    return colours({0: cells})[0]


def jpeg(frame: np.ndarray) -> str:
    """Return a frame, uint8 `(height, width, 3)`, as a small picture inside a page."""
    from PIL import Image

    image = Image.fromarray(frame)
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def tiles(cells: np.ndarray) -> str:
    """Return cells, uint8 `(rows, cols, 3)`, as a picture of a pixel each, which a page enlarges."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(cells).save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def banks_of(config: Json, run: Path) -> tuple[Path, ...]:
    """Return where a run's banks are now: as it names them, or from a folder above the run's."""
    found = []
    for name in config.get("bank", []):
        if "://" in name:
            continue
        # runs, banks and videos may have been moved together
        places = [Path(name), *(above / name for above in run.absolute().parents)]
        found.append(next((place for place in places if place.is_dir()), Path(name)))
    return tuple(found)
