"""Which frames of a source to read, and how: the request that every reader of clips takes.

ReadRequest(Path("bikes.mp4"), Sampling(fps="1", max_frames=64), start=2.0, end=4.0)
"""

from dataclasses import asdict, dataclass
from pathlib import Path

from model.tower.pixels import Pixels
from preprocess.decode.read_pictures import PICTURE_FPS
from shards.format.features import Sampling
from shards.signed import Json

DECODERS = ("auto", "decord", "pyav")


@dataclass(frozen=True)
class ReadRequest:
    """One clip to read."""

    path: Path
    """A video, a folder of pictures, an animation or a picture."""
    sampling: Sampling
    start: float | None = None
    """Only frames that are shown between start and end, in seconds."""
    end: float | None = None
    next_parts: tuple[tuple[float | None, float | None], ...] = ()
    """Start and end of the parts of the same file that will be asked for next: a file that is read
    from its start can serve them on the way."""
    pixels: Pixels | None = None
    """Resize each frame as it comes, as a tower's image processor does."""
    allow_truncated: bool = False
    """Take what comes of a truncated or damaged file; its flags say so."""
    picture_fps: str = PICTURE_FPS
    """Of a folder of pictures."""
    decoder: str = "auto"
    """For measurements, and to repair a clip with the reader that first read it: `decord` uses decord
    whatever the scan says, `auto` and `pyav` never do."""

    def __post_init__(self) -> None:
        assert self.decoder in DECODERS, self.decoder

    def to_json(self) -> Json:
        return asdict(self) | {
            "path": str(self.path.absolute()),
            "pixels": self.pixels.to_json() if self.pixels else None,
        }

    @classmethod
    def from_json(cls, data: Json) -> "ReadRequest":
        pixels = data["pixels"]
        return cls(
            **data
            | {
                "path": Path(data["path"]),
                "sampling": Sampling(**data["sampling"]),
                "next_parts": tuple((start, end) for start, end in data["next_parts"]),
                "pixels": Pixels.from_json(pixels) if pixels else None,
            }
        )
