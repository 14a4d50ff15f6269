"""What is in a bank: a table of the whole, a picture of one clip.

    preprocess show BANK
    preprocess show BANK KEY --out page.png

The table needs the bank alone. The picture shows a clip's sampled frames, read again from the
video where that is still there, above their features as colours: the first three principal
components of all its cells, as red, green and blue.
"""

import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from preprocess.decode_child import DecodeChild
from preprocess.packets import VideoError
from preprocess.plan import read_plan
from shards.catalogue import split_text
from shards.reader import Bank, read_quarantine
from shards.schema import Json, SampleMeta, Sampling, digest

HEAD_TAIL = 64 * 1024
BAR = 32
DURATIONS = (0, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200)  # seconds

PAGE, MARGIN, GAP, LABELS, CAPTION, LINE = 1600, 24, 8, 84, 22, 24  # pixels
TILE_SIDES = ((2, 480), (8, 320), (24, 224), (160, 176))  # up to so many frames: the longer side
PAPER, INK, FAINT, OUTLINE, GONE, SEEN = "#fff", "#1c1c1c", "#707070", "#b4b4b4", "#dcdcdc", "#f60"


def table(path: Path) -> str:
    """Return what is in the bank at `path`, for a terminal or a log."""
    bank = Bank.open(path)
    metas = read_metas(bank, range(len(bank)))
    sections = [
        facts(bank),
        histogram((bank.columns["end"] - bank.columns["start"]).tolist()),
        origins(metas),
        quarantine(read_quarantine(path)),
    ]
    return "\n".join(line for section in sections for line in section)


def picture(path: Path, name: str) -> tuple[str, Image.Image]:
    """Return a clip's key and its page. `name` is the key or the id; ValueError if unknown."""
    bank = Bank.open(path)
    row, key = find(bank, name)
    meta = next(read_metas(bank, [row]))
    features = {stride: bank.read(row, stride) for stride in bank.config.strides}
    frames, note = source_frames(path, key, meta, bank.config.sampling)
    return key, page(key, meta, frames, note, features, bank.config.pool)


def find(bank: Bank, name: str) -> tuple[int, str]:
    """Return the row and the key of the clip whose id or key is `name`."""
    keys = split_text(bank.columns, "key")
    for names in (bank.ids, keys):
        if name in names:
            row = names.index(name)
            return row, keys[row]
    close = get_close_matches(name, [*bank.ids, *keys], n=3, cutoff=0.5)
    close += [id_ for id_ in bank.ids if name in id_ and id_ not in close][: 3 - len(close)]
    hint = f"did you mean {' or '.join(map(printable, close))}?" if close else (
        f"its {len(bank)} clips are named in no such way; try a clip's id"
    )  # fmt: skip
    raise ValueError(f"{printable(str(bank.path))}: no clip {printable(name)}; {hint}")


def read_metas(bank: Bank, rows: Iterable[int]) -> Iterator[SampleMeta]:
    """Yield the json of each row's sample: the first member at its place in the shard."""
    files: dict[int, int] = {}
    try:
        for row in rows:
            shard, begin = int(bank.columns["shard"][row]), int(bank.columns["offset"][row])
            if shard not in files:
                shard_path = bank.path / "shards" / bank.manifest["shards"][shard]["name"]
                files[shard] = os.open(shard_path, os.O_RDONLY)
            try:
                header = os.pread(files[shard], tarfile.BLOCKSIZE, begin)
                nbytes = tarfile.TarInfo.frombuf(header, "utf-8", "strict").size
                data = os.pread(files[shard], nbytes, begin + tarfile.BLOCKSIZE)
                meta = SampleMeta.from_json(json.loads(data))
            except (tarfile.HeaderError, ValueError, KeyError, TypeError):
                name = bank.manifest["shards"][shard]["name"]
                raise ValueError(
                    f"{bank.path}/shards/{name}: no sample at byte {begin}; copy the bank again"
                ) from None
            yield meta
    finally:
        for file in files.values():
            os.close(file)


def source_frames(
    bank: Path, key: str, meta: SampleMeta, sampling: Sampling
) -> tuple[np.ndarray | None, str]:
    """Return the clip's frames, uint8 `(frames, height, width, 3)`; or None, and why."""
    plan = read_plan(bank)
    source = next((clip for clip in plan.clips if clip.key == key), None) if plan else None
    if source is None or not Path(source.path).is_file():
        return None, "video gone"
    try:
        if not unchanged(Path(source.path), meta):
            return None, "video changed"
        with DecodeChild() as child:
            clip = child.read_clip(
                Path(source.path), sampling, start=source.start, end=source.end
            )  # fmt: skip
    except VideoError as error:
        return None, f"video {error.reason}"
    except OSError:
        return None, "video unreadable"
    if clip.frame_index.tolist() != meta.frame_index:
        return None, "other frames now"
    return clip.frames, ""


def unchanged(path: Path, meta: SampleMeta) -> bool:
    """Return whether a file still has the size and digest that a sample recorded."""
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        head = file.read(HEAD_TAIL)
        file.seek(max(0, size - HEAD_TAIL))
        return digest(str(size).encode() + head + file.read(HEAD_TAIL)) == meta.digest


# The table: what is known -> lines.


def facts(bank: Bank) -> list[str]:
    """Return the lines on the bank's making and size."""
    config, manifest = bank.config, bank.manifest
    tower = printable(str(manifest["provenance"].get("tower", "unnamed")))
    lines = [
        ("bank", printable(str(bank.path))),
        ("tower", f"{tower} ({config.tower_type}, digest {config.tower_digest[:12]})"),
        ("fingerprint", bank.config.fingerprint),
        ("layer", f"{config.layer}, width {manifest['tower_width']}"),
        ("sampling", in_words(config.sampling)),
        ("dtype", f"{config.dtype}, tower ran in {config.tower_dtype}, codec {config.codec}"),
        ("pool", config.pool),
        ("clips", f"{len(bank):,}"),
        ("frames", f"{len(bank.columns['timestamps']):,}"),
        ("bytes", f"{in_bytes(manifest['nbytes'])} in {len(manifest['shards'])} shards"),
    ]
    for stride in config.strides:
        shapes = bank.columns[f"stride{stride}_shape"].reshape(-1, 4)
        grids = Counter((int(rows), int(cols)) for _, rows, cols, _ in shapes)
        named = ", ".join(f"{rows}x{cols} cells" for (rows, cols), _ in grids.most_common(3))
        more = f" and {len(grids) - 3} other grids" if len(grids) > 3 else ""
        nbytes = int(bank.columns[f"stride{stride}_nbytes"].sum())
        lines.append((f"stride {stride}", f"{named or 'no cells'}{more}, {in_bytes(nbytes)}"))
    return [f"{name:<12} {value}" for name, value in lines]


def histogram(durations: Sequence[float]) -> list[str]:
    """Return the lines that show how long the clips are."""
    if not durations:
        return []
    low, middle, high = (float(np.percentile(durations, p)) for p in (0, 50, 100))
    counts, _ = np.histogram(durations, [*DURATIONS, np.inf])
    used = np.flatnonzero(counts)
    lines = [f"{'durations':<12} {low:.2f} s shortest, {middle:.2f} s median, {high:.2f} s longest"]
    for place in range(used[0], used[-1] + 1):
        upper = in_time(DURATIONS[place + 1]) if place + 1 < len(DURATIONS) else "longer"
        length = max(int(counts[place] > 0), round(BAR * counts[place] / counts.max()))
        span = f"{in_time(DURATIONS[place])} to {upper}"
        lines.append(f"  {span:>18}  {'█' * length:<{BAR}}  {counts[place]:,}")
    return lines


def origins(metas: Iterable[SampleMeta]) -> list[str]:
    """Return the lines on which readers the frames came from and what the scans flagged."""
    readers: Counter[str] = Counter()
    flags: Counter[str] = Counter()
    for meta in metas:
        readers[meta.decoder] += 1
        flags.update(meta.flags)
    return [
        f"{name:<12} {', '.join(f'{word} {n:,}' for word, n in counts.most_common()) or 'none'}"
        for name, counts in (("readers", readers), ("flags", flags))
    ]


def quarantine(entries: Sequence[Json], examples: int = 3) -> list[str]:
    """Return the lines on the clips that failed, by reason."""
    reasons: dict[str, list[str]] = {}
    for entry in entries:
        reasons.setdefault(entry["reason"], []).append(printable(entry["id"]))
    lines = [
        f"{'quarantine':<12} {len(entries):,} clips" if entries else f"{'quarantine':<12} none"
    ]
    for reason, ids in sorted(reasons.items(), key=lambda item: (-len(item[1]), item[0])):
        more = f", and {len(ids) - examples:,} more" if len(ids) > examples else ""
        lines.append(f"  {printable(reason)} {len(ids):,}: {', '.join(ids[:examples])}{more}")
    return lines


def in_words(sampling: Sampling) -> str:
    if sampling.num_frames is not None:
        return f"{sampling.num_frames} frames of each clip, uniformly"
    return (
        f"{sampling.fps} frames per second; {sampling.max_frames} frames, uniformly, of a clip "
        "that would give more"
    )


def in_time(seconds: int) -> str:
    sizes = ((3600, "h"), (60, "min"))
    size, unit = next(
        (pair for pair in sizes if seconds >= pair[0] and not seconds % pair[0]), (1, "s")
    )
    return f"{seconds // size} {unit}"


def in_bytes(nbytes: int) -> str:
    for power, unit in ((4, "TB"), (3, "GB"), (2, "MB"), (1, "kB")):
        if nbytes >= 1000**power:
            return f"{nbytes / 1000**power:.1f} {unit}"
    return f"{nbytes} B"


def printable(text: str) -> str:
    """Return text that cannot steer a terminal: what does not print is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


# The picture: features -> colours, sizes -> places, both -> pixels.


def colours(features: Mapping[int, np.ndarray]) -> dict[int, np.ndarray]:
    """Return the cells of all strides as colours of one palette.

    features: stride -> float16, or uint16 that holds bfloat16, `(units, rows, cols, dim)`; returns
    stride -> uint8 `(units, rows, cols, 3)`. The first principal component is red, the second
    green, the third blue, each from its 1st to its 99th percentile; what does not vary is grey.
    """
    cells = np.concatenate(
        [widened(array).reshape(-1, array.shape[-1]) for array in features.values()]
    )
    scale = np.abs(cells).max()
    cells -= cells.mean(axis=0)
    _, axes = np.linalg.eigh(cells.T @ cells)  # rising eigenvalues, one axis a column
    axes = axes[:, ::-1][:, :3]
    largest = np.abs(axes).argmax(axis=0)
    axes = axes * np.sign(axes[largest, range(axes.shape[1])])  # a sign is chance otherwise
    values = cells @ axes
    low, high = np.percentile(values, (1, 99), axis=0)
    varies = high - low > 1e-9 * scale
    shades = (values - low) / np.where(varies, high - low, 1) * 255
    shades = np.where(varies, shades.clip(0, 255).round(), 127)
    rgb = np.full((len(cells), 3), 127, np.uint8)
    rgb[:, : shades.shape[1]] = shades
    ends = np.cumsum([array[..., 0].size for array in features.values()])
    parts = np.split(rgb, ends[:-1])
    return {
        stride: part.reshape(*features[stride].shape[:3], 3)  # units, rows, cols, rgb
        for stride, part in zip(features, parts, strict=True)
    }


def widened(array: np.ndarray) -> np.ndarray:
    """Return stored features as float64; uint16 holds the upper half of a float32."""
    if array.dtype == np.uint16:
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float64)


def cell_edges(cells: int, patches: int, stride: int, pool: str) -> np.ndarray:
    """Return where the cells of an axis begin and end, `(cells + 1,)` fractions of the grid."""
    if pool == "bilinear":
        return np.linspace(0, 1, cells + 1)
    return np.minimum(np.arange(cells + 1) * stride, patches) / patches


@dataclass(frozen=True)
class Layout:
    """Where the tiles lie: columns of a frame above its grids, in as many rows as it takes."""

    count: int
    """Frames."""
    bands: int
    """Tiles of a column: the frame, then one for each stride."""
    width: int
    """Of a tile, in pixels."""
    height: int
    columns: int
    top: int = 0
    """Of the first row."""

    @classmethod
    def of(cls, count: int, bands: int, height: int, width: int) -> "Layout":
        """Return the layout for frames of this display size."""
        side = next((side for most, side in TILE_SIDES if count <= most), 128)
        scale = side / max(height, width)
        tile_width, tile_height = max(16, round(width * scale)), max(16, round(height * scale))
        room = PAGE - 2 * MARGIN - LABELS + GAP
        most = max(1, room // (max(tile_width, CAPTION * 4) + GAP))
        columns = -(-count // -(-count // most))  # the fewest that need no further row
        return cls(count, bands, tile_width, tile_height, columns)

    @property
    def column_width(self) -> int:
        return max(self.width, CAPTION * 4) + GAP

    @property
    def row_height(self) -> int:
        return CAPTION + self.bands * (self.height + GAP) + MARGIN

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the page."""
        width = 2 * MARGIN + LABELS + self.columns * self.column_width - GAP
        rows = -(-self.count // self.columns)
        return max(width, 720), self.top + rows * self.row_height

    def place(self, frame: int, band: int) -> tuple[int, int]:
        """Return (x, y) of a tile's upper left corner."""
        row, column = divmod(frame, self.columns)
        x = MARGIN + LABELS + column * self.column_width
        return x, self.top + row * self.row_height + CAPTION + band * (self.height + GAP)


def page(
    key: str,
    meta: SampleMeta,
    frames: np.ndarray | None,
    note: str,
    features: Mapping[int, np.ndarray],
    pool: str,
) -> Image.Image:
    """Return the picture of a clip; without frames, the note stands in their tiles."""
    layout = Layout.of(len(meta.timestamps), 1 + len(features), *meta.display_size)
    lines = title(key, meta, layout.size[0] - 2 * MARGIN)
    layout = replace(layout, top=2 * MARGIN + LINE * len(lines))
    image = Image.new("RGB", layout.size, PAPER)
    draw = ImageDraw.Draw(image)
    for number, line in enumerate(lines):
        where = (MARGIN, MARGIN + LINE * number)
        draw.text(where, line, FAINT if number else INK, font(15 if number else 20))
    bands = ["frame"] + [
        f"stride {stride}\n{array.shape[1]}x{array.shape[2]}" for stride, array in features.items()
    ]
    palette = colours(features)
    for k, (time, index) in enumerate(zip(meta.timestamps, meta.frame_index, strict=True)):
        x, y = layout.place(k, 0)
        draw.text((x, y - CAPTION), f"{time:.3f} s", INK, font(14))
        number_width = font(14).getlength(f"#{index}")
        right = x + layout.column_width - GAP
        if x + font(14).getlength(f"{time:.3f} s ") <= right - number_width:
            draw.text((right - number_width, y - CAPTION), f"#{index}", FAINT, font(14))
        tiles = [frame_tile(None if frames is None else frames[k], note, layout, meta.covered)]
        for stride, cells in palette.items():
            rows, columns = (
                cell_edges(cells.shape[1 + axis], meta.patch_grid[axis], stride, pool)
                for axis in (0, 1)
            )
            unit = cells[k // meta.frames_per_unit]
            tiles.append(cells_tile(unit, rows, columns, layout, meta.covered))
        for band, tile in enumerate(tiles):
            x, y = layout.place(k, band)
            image.paste(tile, (x, y))
            if k % layout.columns == 0:
                draw.multiline_text((MARGIN, y), bands[band], FAINT, font(14), spacing=5)
    return image


def title(key: str, meta: SampleMeta, width: int) -> list[str]:
    """Return the lines above a clip's tiles, none wider than `width` pixels."""
    height, wide = meta.display_size
    words = [
        f"{meta.end - meta.start:.3f} s" + (f" from {meta.start:.3f} s" if meta.start else ""),
        f"read by {meta.decoder}",
        f"flags: {', '.join(meta.flags) or 'none'}",
        f"{len(meta.timestamps)} of {meta.frame_count} frames",
        f"{wide}x{height} at {meta.fps:.4g} fps",
        f"{meta.patch_grid[0]}x{meta.patch_grid[1]} patches",
        f"key {key}",
    ]
    lines = [words[0]]
    for word in words[1:]:
        longer = f"{lines[-1]}  \u00b7  {word}"
        if font(15).getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return [shortened(meta.id, 20, width), *(shortened(line, 15, width) for line in lines)]


def shortened(text: str, size: int, width: int) -> str:
    """Return text the font can draw, its middle left out where it is wider than `width` pixels."""
    # The font that comes with Pillow draws little beyond ASCII.
    text = "".join(
        c if c in "·" else c.encode("ascii", "backslashreplace").decode() for c in printable(text)
    )
    whole, keep = text, len(text) // 2
    while font(size).getlength(text) > width and keep:
        keep -= 1
        text = f"{whole[:keep]}…{whole[len(whole) - keep :]}"
    return text


@cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def frame_tile(
    frame: np.ndarray | None, note: str, layout: Layout, covered: Sequence[float]
) -> Image.Image:
    """Return a frame at the size of a tile, with the border of what the tower saw of it."""
    size = (layout.width, layout.height)
    if frame is None:
        tile = Image.new("RGB", size, GONE)
        centre = (layout.width / 2, layout.height / 2)
        lines = note.replace(" ", "\n")
        ImageDraw.Draw(tile).text(centre, lines, FAINT, font(14), anchor="mm", align="center")
    else:
        tile = Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS)
    if tuple(covered) != (0, 0, 1, 1):
        y0, x0, y1, x1 = covered
        box = (x0 * size[0], y0 * size[1], x1 * size[0] - 1, y1 * size[1] - 1)
        ImageDraw.Draw(tile).rectangle([round(edge) for edge in box], outline=SEEN)
    return tile


def cells_tile(
    cells: np.ndarray,
    row_edges: np.ndarray,
    column_edges: np.ndarray,
    layout: Layout,
    covered: Sequence[float],
) -> Image.Image:
    """Return a grid of colours laid over the covered part of a frame's outline.

    cells: uint8 `(rows, cols, 3)`; edges: where they begin and end, as fractions of the grid.
    """
    tile = Image.new("RGB", (layout.width, layout.height), PAPER)
    ImageDraw.Draw(tile).rectangle((0, 0, layout.width - 1, layout.height - 1), outline=OUTLINE)
    y0, x0, y1, x1 = covered
    pixels = np.array(tile)
    ys = ((y0 + row_edges * (y1 - y0)) * layout.height).round().astype(int).clip(0, layout.height)
    xs = ((x0 + column_edges * (x1 - x0)) * layout.width).round().astype(int).clip(0, layout.width)
    gap = int(min(np.diff(ys).min(), np.diff(xs).min()) >= 8)
    for row, (top, bottom) in enumerate(pairwise(ys)):
        for column, (left, right) in enumerate(pairwise(xs)):
            pixels[top : bottom - gap, left : right - gap] = cells[row, column]
    return Image.fromarray(pixels)
