"""Pictures as clips: a folder of frames, an animated WebP or PNG, a still picture.

    scan = scan_pictures(Path("frames/clip-1"), fps="2")
    frames = read_pictures(scan, [0, 5, 9], transform)

The frames of a folder are its picture files in natural order of name (frame2 before frame10),
shown at a rate that the caller gives. An animation keeps the duration of each of its frames. A
still picture is a clip of no duration. Colours are those of Pillow's `convert("RGB")`, as image
datasets are read everywhere, blended with white where they are transparent; a picture is
turned as its EXIF orientation says.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from preprocess.decode.events import Transform, over_white
from preprocess.decode.scan import Scan, VideoError
from preprocess.decode.stream.orientation import Orientation
from shards.format.quarantine import Reason
from shards.kinds import HEAD, MOVING_AVIF, MOVING_PNG, MOVING_WEBP, kind_of

PICTURE_FPS = "2"
"""Frames per second of a folder of pictures, as LLaVA-Video's frame folders have."""
PICTURE_SUFFIXES = frozenset(
    (
        *(".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff"),
        *(".avif", ".heic", ".heif"),
    )
)
PICTURES = "pictures"
"""The value of `Scan.codec` for pictures."""
NO_DURATION = 100  # ms for which browsers show a frame without a duration
ANIMATIONS = (MOVING_AVIF, MOVING_WEBP)
"""Read as pictures under any name: FFmpeg decodes no WebP that moves."""


def holds_pictures(path: Path) -> bool:
    """Return whether a source is a folder, a picture by its suffix, or an animation by its content."""
    if path.is_dir():
        return True
    by_name = path.suffix.lower() in PICTURE_SUFFIXES
    try:
        # an unpacked member of an archive has no suffix, and must be read as in a folder
        # is_file: opening a pipe would wait for ever
        with open(path if path.is_file() else os.devnull, "rb") as file:
            kind = kind_of(file.read(HEAD))
    except OSError:
        return by_name
    # FFmpeg's: Pillow lays some frames of a PNG over the wrong one
    return kind != MOVING_PNG and (by_name or kind in ANIMATIONS)


def picture_files(folder: Path) -> list[Path]:
    """Return the picture files of a folder in natural order of name, hidden ones left out."""
    with os.scandir(folder) as entries:  # is_file: opening a pipe would wait for ever
        files = [Path(entry.path) for entry in entries if entry.is_file()]
    files = [
        file
        for file in files
        if file.suffix.lower() in PICTURE_SUFFIXES and not file.name.startswith(".")
    ]
    return sorted(files, key=_natural)


def scan_pictures(path: Path, fps: str = PICTURE_FPS) -> Scan:
    """Return the scan of a folder of pictures or of a picture file; raises VideoError."""
    if path.is_dir():
        files = picture_files(path)
        if not files:
            raise VideoError(
                Reason.NO_PICTURES,
                "a folder without pictures",
                where=path,
                fix="name a video or a folder of pictures",
            )
        first = files[0]
        ends = list(range(1, len(files) + 1))
        tick, kind = 1 / Fraction(fps), "folder"
    else:
        if not path.is_file():
            raise VideoError(Reason.CANNOT_OPEN, "no such file", where=path, fix="check the path")
        first = path
        ends = _animation_ends(path)
        tick, kind = Fraction(1, 1000), "animation" if len(ends) > 1 else "still"
    starts = [0, *ends[:-1]]
    # the first picture's size is the clip's; others are compared with it as they are read
    (picture,) = _frames(first, [0])
    height, width, _ = picture.shape
    return Scan(
        path=path,
        container=kind,
        stream=0,
        codec=PICTURES,
        width=width,
        height=height,
        orientation=Orientation(),
        time_base=tick,
        pts=tuple(starts),
        key_pts=tuple(starts),
        last_duration=ends[-1] - starts[-1],
        packets=len(ends),
        promised_frames=len(ends),
        flags=(kind,),
    )


def read_pictures(scan: Scan, index: Sequence[int], transform: Transform) -> Iterator[np.ndarray]:
    """Yield the frames `index` (ascending), each passed through `transform`; raises VideoError."""
    if not scan.path.is_dir():
        yield from map(transform, _frames(scan.path, index))
        return
    files = picture_files(scan.path)
    for path in [files[place] for place in index]:
        (picture,) = _frames(path, [0])
        if picture.shape[:2] != scan.display_size:
            raise VideoError(
                Reason.MIXED_SIZES,
                f"{picture.shape[0]}x{picture.shape[1]} pixels, the folder's first picture "
                f"has {scan.height}x{scan.width}",
                where=path,
                fix="bring them to one size or into two folders",
            )
        yield transform(picture)


def _natural(file: Path) -> tuple[list[tuple[int, int | str]], str]:
    """Return a sort key that compares numbers by value: frame2.jpg before frame10.jpg."""
    words = re.split(r"([0-9]+)", file.name)
    return [(0, int(word)) if word.isdecimal() else (1, word) for word in words if word], file.name


def _frames(path: Path, index: Sequence[int]) -> Iterator[np.ndarray]:
    """Yield frames of a picture file: uint8 `(height, width, 3)`."""
    with _pillow(path):
        image = _opened(path)
    with image:
        if image.mode.startswith(("I", "F")):
            raise VideoError(
                Reason.CANNOT_OPEN,
                f"its pixels are of mode {image.mode}, not 8 bits a colour",
                where=path,
                fix="convert it to 8 bits a colour",
            )
        for frame in index:
            with _pillow(path):
                image.seek(frame)
                upright = ImageOps.exif_transpose(image)
                clear = upright.has_transparency_data
                picture = np.asarray(upright.convert("RGBA" if clear else "RGB"))
                picture = over_white(picture) if clear else picture
            yield picture


def _animation_ends(path: Path) -> list[int]:
    """Return the ms at which each frame stops being shown; [0] for a still picture."""
    with _pillow(path), _opened(path) as image:
        count = getattr(image, "n_frames", 1)
        if count == 1 or image.format in ("TIFF", "MPO"):  # pages, views
            return [0]
        ends, end = [], Fraction(0)
        for frame in range(count):
            image.seek(frame)
            image.load()  # Pillow knows the duration of a WebP frame only after decoding it
            end += Fraction(image.info.get("duration") or NO_DURATION)
            # rounded sums, not a sum of rounded ones: errors of half a millisecond would add up
            ends.append(round(end))
        return ends


def _opened(path: Path) -> Image.Image:
    if path.suffix.lower() in (".heic", ".heif"):
        with suppress(ImportError):
            import pillow_heif  # Pillow does not find this plugin by itself

            pillow_heif.register_heif_opener()
    return Image.open(path)


@contextmanager
def _pillow(path: Path) -> Iterator[None]:
    """Turn whatever Pillow raises into a VideoError that names the file."""
    # `Exception`, because its plugins raise any type (struct.error, SyntaxError ...) on damaged files.
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        raise _unreadable(path, " ".join(str(error).split())) from None


def _unreadable(path: Path, why: str) -> VideoError:
    empty = path.is_file() and not path.stat().st_size
    what = "empty" if empty else f"not a readable picture ({why})"
    return VideoError(Reason.CANNOT_OPEN, what, where=path, fix="fetch it again or remove it")
