"""Next frames as a model predicts them, beside what came: a file that evaluation leaves and a page draws.

`foreseen-NAME.npz` holds some frames of a few clips of a test set, as the loss compares them, but of all
their numbers only the three directions in which a clip's cells differ most: float16 `(rows, cols, 3)`.
"""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shards.signed import Json, write_atomic

ROLES = ("target", "predicted", "copy")
MOST_CLIPS, MOST_FRAMES = 3, 16
SHOWN = 3
"""Directions that are kept: red, green and blue."""


@dataclass(frozen=True)
class NextFrame:
    """A frame that was predicted from those before it."""

    time: float
    """Seconds of the clip."""
    pair: str
    """The streams of the frame before and of this one: SS, SF, FS, FF."""
    error: float
    """Mean square error of the prediction, over cells and all directions."""
    copy_error: float
    target: np.ndarray
    """`(rows, cols, dim)`; `dim` is 3 in the file. So are the others."""
    predicted: np.ndarray
    copy: np.ndarray
    """The frame before, on this one's grid."""


@dataclass(frozen=True)
class Foreseen:
    """The next frames of one clip, in order of time."""

    clip: str
    frames: tuple[NextFrame, ...]


def write_foreseen(path: Path, clips: Sequence[Foreseen]) -> None:
    arrays: dict[str, np.ndarray] = {}
    about: list[Json] = []
    for k, clip in enumerate(clips):
        for name, values in in_few_directions(clip).items():
            # three of a thousand numbers a cell, in half precision: they become colours
            arrays[f"{k}.{name}"] = values.astype(np.float16)
        frames = [
            {name: getattr(frame, name) for name in ("time", "pair", "error", "copy_error")}
            for frame in clip.frames
        ]
        about.append({"clip": clip.clip, "frames": frames})
    file = io.BytesIO()
    np.savez_compressed(file, allow_pickle=False, about=np.asarray(json.dumps(about)), **arrays)
    write_atomic(path, file.getvalue())


def read_foreseen(path: Path) -> list[Foreseen]:
    """Return the clips of a file that `write_foreseen` wrote; none where there is no file."""
    if not path.is_file():
        return []
    # no pickles: a report may be made of a run that came from somebody else
    with np.load(path, allow_pickle=False) as arrays:
        about = json.loads(str(arrays["about"]))
        return [
            Foreseen(
                own["clip"],
                tuple(
                    NextFrame(**frame, **{role: arrays[f"{k}.{number}.{role}"] for role in ROLES})
                    for number, frame in enumerate(own["frames"])
                ),
            )
            for k, own in enumerate(about)
        ]


def in_few_directions(clip: Foreseen) -> dict[str, np.ndarray]:
    """Return a clip's frames, by number and role, along the principal components of what came."""
    arrays = {
        f"{number}.{role}": getattr(frame, role).astype(np.float64)
        for number, frame in enumerate(clip.frames)
        for role in ROLES
    }
    if not arrays:
        return {}
    # of what came alone: a poor prediction does not choose the directions in which it is shown
    came = [a.reshape(-1, a.shape[-1]) for name, a in arrays.items() if name.endswith(".target")]
    cells = np.concatenate(came)
    centre = cells.mean(axis=0)
    # principal components: eigenvectors of the scatter matrix, eigh's last have the largest eigenvalues
    axes = np.linalg.eigh((cells - centre).T @ (cells - centre)).eigenvectors[:, -SHOWN:]
    return {name: (array - centre) @ axes for name, array in arrays.items()}
