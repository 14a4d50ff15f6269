"""A picture of an answer: a clip's frames with the time spans, boxes and points in the answer.

Under each frame is its share of the time line, from its own time to that of the next frame: the answer
in orange, and below it the truth, where it is known, in green.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from PIL import Image, ImageDraw

from preprocess.show.picture import (
    CAPTION,
    GAP,
    INK,
    MARGIN,
    PAPER,
    Layout,
    font,
    shortened,
)

SAID, TRUE, EMPTY = "#e8590c", "#2b8a3e", "#e6e6e6"
BAR, BELOW, RING = 9, 3, 5  # pixels: height of a time line, gap above it, radius of a point
LINES = (3, 7)  # pixels: line width of the answer's boxes, and of true ones, visible on both sides
HALO = 2  # pixels of white around lines, half on each side, so that they show on any background


@dataclass(frozen=True)
class Pointed:
    """The times and places in a clip that a text refers to."""

    text: str
    spans: tuple[tuple[float, float], ...]
    """Start and end, in seconds of the clip."""
    places: tuple[tuple[tuple[float, ...], tuple[float, ...]], ...]
    """(times, x y or x1 y1 x2 y2 as fractions of the frame); without times, of the spans or of all."""


def answer_page(
    question: str,
    frames: np.ndarray,
    times: Sequence[float],
    end: float,
    said: Pointed,
    true: Pointed | None = None,
) -> Image.Image:
    """Return the picture of an answer.

    frames: uint8 `(frames, height, width, 3)`; times: seconds of each frame; end: seconds of the clip's
    end.
    """
    layout = Layout.of(len(frames), 1, *frames.shape[1:3])
    image = Image.new("RGB", layout.size, PAPER)
    draw = ImageDraw.Draw(image)
    layers = [("said", SAID, said)] + ([("true", TRUE, true)] if true else [])
    lines = [(22, 20, INK, question)]
    for number, (name, ink, pointed) in enumerate(layers):
        lines.append((54 + 22 * number, 16, ink, f"{name}: {pointed.text}"))
    for y, size, ink, text in lines:
        # The font that comes with Pillow has little beyond ASCII.
        plain = " ".join(text.split()).encode("ascii", "backslashreplace").decode()
        fits = shortened(plain, size, layout.size[0] - 2 * MARGIN)
        draw.text((MARGIN, y), fits, ink, font(size))
    tiles = [
        Image.fromarray(frame).resize(layout.tile, Image.Resampling.LANCZOS) for frame in frames
    ]
    # the truth first and wider: the answer's thin line stays visible on it
    for width, (_, ink, pointed) in reversed(list(zip(LINES, layers, strict=False))):
        for seen, place in pointed.places:
            for k in frames_of(seen, pointed.spans, times):
                draw_place(tiles[k], place, ink, width)
    # from 0, not from the first frame's time: a share for each frame, and none left over
    edges = [0.0, *times[1:], end]
    timed = any(pointed.spans for _, _, pointed in layers)
    for k, (tile, share) in enumerate(zip(tiles, pairwise(edges), strict=True)):
        x, y = layout.place(k, 0)
        draw.text((x, y - CAPTION), f"{times[k]:.3f} s", INK, font(14))
        image.paste(tile, (x, y))
        for number, (name, ink, pointed) in enumerate(layers if timed else []):
            top = y + layout.tile[1] + BELOW + number * (BAR + BELOW)
            draw_share(draw, (x, top), layout.column_width - GAP, share, pointed.spans, ink)
            if k % layout.columns == 0:
                draw.text((MARGIN, top + BAR / 2), name, ink, font(12), anchor="lm")
    return image


def frames_of(
    seen: Sequence[float], spans: Sequence[tuple[float, float]], times: Sequence[float]
) -> list[int]:
    """Return the frames to draw a place on: nearest to its times, else those within spans, else all."""
    if seen:
        return [int(np.abs(np.asarray(times) - time).argmin()) for time in seen]
    inside = [k for k, t in enumerate(times) if any(a <= t < b for a, b in spans)]
    return inside if spans else list(range(len(times)))


def draw_place(tile: Image.Image, place: Sequence[float], ink: str, width: int) -> None:
    """Draw a box, its line centred on the edge, or a point as a ring."""
    # size * 2: width and height once for each corner
    corners = [round(u * side) for u, side in zip(place, tile.size * 2, strict=False)]
    draw = ImageDraw.Draw(tile)
    for colour, thick in ((PAPER, width + HALO), (ink, width)):
        reach = thick // 2
        if len(corners) == 2:
            (x, y), reach = corners, RING + reach
            draw.ellipse((x - reach, y - reach, x + reach, y + reach), outline=colour, width=thick)
        elif (
            corners[0] <= corners[2] and corners[1] <= corners[3]
        ):  # a reversed box cannot be drawn
            x1, y1, x2, y2 = corners
            draw.rectangle((x1 - reach, y1 - reach, x2 + reach, y2 + reach), None, colour, thick)


def draw_share(
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    width: int,
    share: tuple[float, float],
    spans: Sequence[tuple[float, float]],
    ink: str,
) -> None:
    """Draw a frame's share of the time line, filled within the spans."""
    x, y = corner
    draw.rectangle((x, y, x + width - 1, y + BAR - 1), fill=EMPTY)
    start, end = share
    for a, b in spans:
        first, last = max(a, start), min(b, end)
        # a span of no length is drawn too, two pixels wide
        if first < last or (a == b and start <= a < end):
            near, far = ((t - start) / (end - start) * width for t in (first, last))
            left, right = round(x + near), max(round(x + far), round(x + near) + 2)
            draw.rectangle((left, y, right - 1, y + BAR - 1), fill=ink)
