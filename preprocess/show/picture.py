"""A picture of one clip: frames above their features as colours (three principal components)."""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from tempfile import gettempdir

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from model.grid import cell_spans
from preprocess.decode.decode_child import DecodeChild
from preprocess.decode.read_pictures import PICTURE_FPS
from preprocess.decode.request import ReadRequest
from preprocess.decode.source import SourceReader
from preprocess.show.table import find
from shards.errors import UserError
from shards.format.codec import as_float32
from shards.format.features import Sampling
from shards.format.plan import ClipSource, read_plan
from shards.format.samples import SampleMeta, sample_key
from shards.read.bank import Bank
from shards.signed import write_atomic
from shards.text import printable

Arrays = Mapping[int, np.ndarray]

PAGE, MARGIN, GAP, LABELS, CAPTION, TITLE = 1600, 24, 8, 84, 22, 114  # pixels
NARROWEST, SMALLEST = 88, 16  # pixels: a column fits a time stamp; no side of a tile is shorter
TILE_SIDES = ((2, 480), (8, 320), (24, 224), (160, 176))  # (most frames, pixels of the longer side)
PAPER, INK, FAINT, OUTLINE, GONE, SEEN = "#fff", "#1c1c1c", "#707070", "#b4b4b4", "#ddd", "#f60"


def picture(path: Path, name: str) -> tuple[str, Image.Image]:
    """Return a clip's key and its picture. name: its id or key; raises UserError if unknown."""
    bank = Bank.open(path)
    row = find(bank, name)
    meta = bank.meta(row)
    features = {stride: bank.read(row, stride) for stride in bank.strides}
    frames = source_frames(path, meta, bank.config.sampling)
    return sample_key(meta.id), page(meta, frames, features, bank.config.pool)


def save(image: Image.Image, path: Path) -> None:
    """Write a picture, whole or not at all; UserError for an ending that no format has."""
    form = Image.registered_extensions().get(path.suffix.lower())
    if form not in Image.SAVE:
        raise UserError("no format of pictures", path.name, expected="a .png", where=path)
    written = BytesIO()
    image.save(written, form)
    write_atomic(path, written.getvalue())


def source_frames(bank: Path, meta: SampleMeta, sampling: Sampling) -> np.ndarray | str:
    """Return the clip's frames, uint8 `(frames, height, width, 3)`; or why there are none.

    Frames are only shown if the video's digest and the frame indices are those of the bank.
    """
    plan = read_plan(bank)
    source = next((clip for clip in plan.clips if clip.id == meta.id), None) if plan else None
    with SourceReader(DecodeChild(), Path(gettempdir())) as reader:
        return read_frames(reader, source, meta, sampling)


def read_frames(
    reader: SourceReader, source: ClipSource | None, meta: SampleMeta, sampling: Sampling
) -> np.ndarray | str:
    """Return what `source_frames` does, of a clip whose source is known."""
    if not source or not Path(source.path).exists():
        return "video missing"
    incomplete = not {"truncated", "damaged"}.isdisjoint(meta.flags)
    request = ReadRequest(
        Path(source.path),
        sampling,
        start=source.start,
        end=source.end,
        allow_truncated=incomplete,
        picture_fps=source.picture_fps or PICTURE_FPS,
    )
    outcome = reader.read(source, request)
    if outcome.clip is None:
        return f"video {outcome.error.reason if outcome.error else 'unreadable'}"
    if outcome.digest != meta.digest or outcome.clip.frame_index.tolist() != meta.frame_index:
        return "video changed"
    return outcome.clip.frames


def colours(features: Arrays) -> dict[int, np.ndarray]:
    """Return the cells of all strides as colours, by one principal component analysis of all cells.

    features: stride -> float16, or uint16 that holds bfloat16, `(units, rows, cols, dim)`; returns
    stride -> uint8 `(units, rows, cols, 3)`. The first principal component is red, the second
    green, the third blue, each from its 1st to its 99th percentile; what does not vary is grey.
    """
    wide = {stride: as_float32(array).astype(np.float64) for stride, array in features.items()}
    cells = np.concatenate([array.reshape(-1, array.shape[-1]) for array in wide.values()])
    scale, centre = np.abs(cells).max(), cells.mean(axis=0)
    cells -= centre
    # Of the (dim, dim) covariance: unlike an SVD of all cells, its cost depends on the width only.
    axes = np.linalg.eigh(cells.T @ cells).eigenvectors[:, :-4:-1]  # columns, largest first
    # The sign of an eigenvector is arbitrary: its largest entry is made positive.
    axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), range(axes.shape[1])])
    axes = np.pad(axes, ((0, 0), (0, 3 - axes.shape[1])))
    # Percentiles and not extremes: one outlier would leave a single grey to all other cells.
    low, high = np.percentile(cells @ axes, (1, 99), axis=0)
    varies = high - low > 1e-9 * scale
    gain, base = (
        np.where(varies, 255 / np.where(varies, high - low, 1), 0),
        np.where(varies, 0, 127),
    )
    shades = {stride: ((x - centre) @ axes - low) * gain + base for stride, x in wide.items()}
    return {stride: x.round().clip(0, 255).astype(np.uint8) for stride, x in shades.items()}


# -- layout and text


@dataclass(frozen=True)
class Layout:
    """Positions of tiles in pixels: a column is a frame above its grids; columns wrap into rows."""

    count: int
    bands: int
    """Tiles in a column: the frame, then one for each stride."""
    tile: tuple[int, int]
    """(width, height)"""
    column_width: int
    columns: int

    @classmethod
    def of(cls, count: int, bands: int, height: int, width: int) -> "Layout":
        """Return the layout for `count` frames of this display size."""
        side = next((side for most, side in TILE_SIDES if count <= most), 128) / max(height, width)
        tile = max(SMALLEST, round(width * side)), max(SMALLEST, round(height * side))
        column_width = max(tile[0], NARROWEST) + GAP
        most = (PAGE - 2 * MARGIN - LABELS + GAP) // column_width
        columns = -(-count // -(-count // most))  # the fewest columns for the same number of rows
        return cls(count, bands, tile, column_width, columns)

    @property
    def row_height(self) -> int:
        return CAPTION + self.bands * (self.tile[1] + GAP) + MARGIN

    @property
    def size(self) -> tuple[int, int]:
        width = 2 * MARGIN + LABELS + self.columns * self.column_width - GAP
        return max(width, 720), TITLE + -(-self.count // self.columns) * self.row_height

    def place(self, frame: int, band: int) -> tuple[int, int]:
        """Return the (x, y) of a tile's upper left corner."""
        row, column = divmod(frame, self.columns)
        y = TITLE + row * self.row_height + CAPTION + band * (self.tile[1] + GAP)
        return MARGIN + LABELS + column * self.column_width, y


def page(meta: SampleMeta, frames: np.ndarray | str, features: Arrays, pool: str) -> Image.Image:
    """Return the picture of a clip. frames: a text instead is written in their tiles."""
    layout = Layout.of(len(meta.timestamps), 1 + len(features), *meta.display_size)
    image = Image.new("RGB", layout.size, PAPER)
    draw = ImageDraw.Draw(image)
    styles = ((22, 20, INK), (52, 15, FAINT), (74, 15, FAINT))
    for (y, size, ink), line in zip(styles, title(meta), strict=True):
        draw.text((MARGIN, y), shortened(line, size, layout.size[0] - 2 * MARGIN), ink, font(size))
    labels = [f"stride {stride}\n{a.shape[1]}x{a.shape[2]}" for stride, a in features.items()]
    palette = colours(features)
    for k, (time, index) in enumerate(zip(meta.timestamps, meta.frame_index, strict=True)):
        x, y = layout.place(k, 0)
        right = x + layout.column_width - GAP
        draw.text((x, y - CAPTION), f"{time:.3f} s", INK, font(14))
        if font(14).getlength(f"{time:.3f} s  #{index}") <= right - x:
            draw.text((right, y - CAPTION), f"#{index}", FAINT, font(14), anchor="ra")
        tiles = [frame_tile(frames if isinstance(frames, str) else frames[k], layout.tile, meta)]
        for stride, cells in palette.items():
            unit = cells[k // meta.frames_per_unit]
            tiles.append(cells_tile(unit, stride, pool, layout.tile, meta))
        for band, (tile, label) in enumerate(zip(tiles, ["frame", *labels], strict=True)):
            x, y = layout.place(k, band)
            image.paste(tile, (x, y))
            if k % layout.columns == 0:
                draw.multiline_text((MARGIN, y), label, FAINT, font(14), spacing=5)
    return image


def title(meta: SampleMeta) -> tuple[str, str, str]:
    """Return the lines above a clip's tiles."""
    # The font that comes with Pillow has little beyond ASCII.
    name = printable(meta.id).encode("ascii", "backslashreplace").decode()
    start = f" from {meta.start:.3f} s" if meta.start else ""
    made = f"{meta.end - meta.start:.3f} s{start}  ·  read by {meta.decoder}"
    flags = f"flags: {', '.join(meta.flags) or 'none'}"
    count = f"{len(meta.timestamps)} of {meta.frame_count} frames at {meta.fps:.4g} fps"
    size = "{1}x{0} pixels  ·  {2}x{3} patches".format(*meta.display_size, *meta.patch_grid)
    return name, f"{made}  ·  {flags}  ·  {count}", f"{size}  ·  {sample_key(meta.id)}"


def shortened(text: str, size: int, width: int) -> str:
    """Return text, with its middle left out if it is wider than `width` pixels."""

    def fits(shown: str) -> bool:
        return font(size).getlength(shown) <= width

    def cut(keep: int) -> str:
        return f"{text[:keep]}…{text[-keep:]}"

    # By bisection: trying one length after the other took a minute for a page of 400 lines.
    keeps = range(len(text) // 2, 0, -1)
    if not keeps or fits(text):
        return text
    found = bisect_left(keeps, True, key=lambda keep: fits(cut(keep)))
    return cut(keeps[min(found, len(keeps) - 1)])


@cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


# -- tiles


def frame_tile(frame: np.ndarray | str, size: tuple[int, int], meta: SampleMeta) -> Image.Image:
    """Return a frame at the size of a tile, with the outline of the part that the tower saw."""
    if isinstance(frame, str):
        tile = Image.new("RGB", size, GONE)
        middle, lines = (size[0] / 2, size[1] / 2), frame.replace(" ", "\n")
        ImageDraw.Draw(tile).text(middle, lines, FAINT, font(14), anchor="mm", align="center")
    else:
        tile = Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS)
    if meta.covered != (0, 0, 1, 1):
        y0, x0, y1, x1 = meta.covered
        box = (x0 * size[0], y0 * size[1], x1 * size[0] - 1, y1 * size[1] - 1)
        ImageDraw.Draw(tile).rectangle([round(edge) for edge in box], outline=SEEN)
    return tile


def cells_tile(
    cells: np.ndarray, stride: int, pool: str, size: tuple[int, int], meta: SampleMeta
) -> Image.Image:
    """Return colours, uint8 `(rows, cols, 3)`, drawn over the covered part of a frame's outline."""
    tile = Image.new("RGB", size, PAPER)
    ImageDraw.Draw(tile).rectangle((0, 0, size[0] - 1, size[1] - 1), outline=OUTLINE)
    pixels = np.array(tile)
    lines = []
    for axis, length in enumerate(reversed(size)):
        spans = cell_spans(meta.patch_grid[axis], stride, pool).numpy()
        edges = np.append(spans[:, 0], spans[-1, 1])
        near, far = meta.covered[axis], meta.covered[axis + 2]
        lines.append(((near + edges * (far - near)) * length).round().clip(0, length).astype(int))
    gap = int(min(np.diff(lines[0]).min(), np.diff(lines[1]).min()) >= 8)
    for row, (top, bottom) in enumerate(pairwise(lines[0])):
        for column, (left, right) in enumerate(pairwise(lines[1])):
            pixels[top : bottom - gap, left : right - gap] = cells[row, column]
    return Image.fromarray(pixels)
