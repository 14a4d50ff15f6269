"""How a picture is turned and mirrored for display: the eight ways that map pixels to pixels.

orientation = Orientation.of_matrix(matrix)     # None: a shear or another odd matrix
picture = orientation.apply(picture)
"""

import math
import struct
from dataclasses import dataclass

import numpy as np

STRAIGHT = math.tan(math.radians(1))
"""Tangent of the one degree by which a matrix may be off, as in FFmpeg."""


@dataclass(frozen=True)
class Orientation:
    """Rows and columns are exchanged first, then the picture is mirrored."""

    transpose: bool = False
    flip_x: bool = False
    """Left becomes right."""
    flip_y: bool = False
    """Top becomes bottom."""

    @classmethod
    def of_matrix(cls, data: bytes) -> "Orientation | None":
        """Return the orientation of FFmpeg's display matrix, nine int32: a b u, c d v, x y w.

        A pixel at (column, row) is shown at (a column + c row, b column + d row), up to a shift (FFmpeg,
        libavutil/display.h). None where that is not a combination of quarter turns and mirroring. A
        scale in it is ignored, as the aspect ratio of pixels is. All zeros means no matrix.
        """
        a, b, u, c, d, v, *_ = struct.unpack("=9i", data[:36])
        if not any((a, b, c, d)):
            return cls()
        # rotation by a multiple of 90 degrees leaves one diagonal of (a b; c d) at 0
        straight, across = min(abs(a), abs(d)), min(abs(b), abs(c))
        if u or v or not max(straight, across):
            return None
        if max(abs(b), abs(c)) <= straight * STRAIGHT:
            return cls(False, a < 0, d < 0)
        if max(abs(a), abs(d)) <= across * STRAIGHT:
            return cls(True, c < 0, b < 0)
        return None

    @property
    def is_mirrored(self) -> bool:
        return (self.flip_x ^ self.flip_y) != self.transpose

    def apply(self, picture: np.ndarray) -> np.ndarray:
        """Return a view of a picture `(height, width, channels)` as it is displayed."""
        if self.transpose:
            picture = picture.swapaxes(0, 1)
        return picture[:: -1 if self.flip_y else 1, :: -1 if self.flip_x else 1]
