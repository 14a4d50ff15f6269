"""A processor of transformers that takes videos from a bank: names in, features out, no file opened.

    plain = AutoProcessor.from_pretrained(checkpoint)
    processor = bank_processor(plain, "bank", model_config=model.config)
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True)

Messages name videos as ever: {"type": "video", "video": "a.mp4"} is the clip of that id. Ids, grids, time
stamps and positions are those that the processor gives for the frames in the bank.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BatchFeature
from transformers.video_utils import VideoMetadata

from model.batch import as_tensor
from model.tower.pixels import Pixels
from preprocess.decode.child import DecodeChild
from shards.errors import UserError
from shards.format.features import differences
from shards.format.quarantine import read_quarantine
from shards.read.bank import Bank
from train.ask import encoded, load_tower, tower_places
from train.bank_vlm.kinds import Kind, bank_problem, find_kind

MISSING = ("refuse", "live")


def bank_processor(
    processor: Any,
    bank: str | Path,
    *,
    model_config: Any,
    media_dir: str | Path = "",
    missing: str = "refuse",
) -> Any:
    """Return a copy of a processor, of its class, that reads the clips of a bank.

    model_config: of the model that it serves; media_dir: what comes before a clip's id in the names that
    messages give. missing: of a clip that the bank lacks, `refuse` it, or make its features `live`, with
    the bank's own tower, found where it lay or from here; `processor.source.live` counts those.
    """
    if missing not in MISSING:
        raise UserError("must be one of refuse, live", got=missing, where="missing")
    kind = find_kind(model_config.model_type)
    opened = Bank.open(bank)
    if problem := bank_problem(kind, model_config.to_dict(), opened.whole.features):
        raise UserError(problem, where=opened.where)
    theirs, banked = (
        pixels_of(one)
        for one in (
            Pixels.from_processor(processor.video_processor),
            Pixels.from_json(opened.config.processor),
        )
    )
    if lines := differences(theirs, banked):
        raise UserError(
            f"the processor makes other pixels than the bank was made of: {'; '.join(lines)}",
            where=opened.where,
            fix="encode with a tower folder whose preprocessor_config.json has the processor's values",
        )
    source = Source(opened, kind, Path(media_dir), missing)
    return _made(processor, source)


def pixels_of(pixels: Pixels) -> dict[str, Any]:
    """Return what there is to compare of two ways to make pixels, clip by clip sizes left out."""
    crop = None if pixels.crop == (pixels.height, pixels.width) else pixels.crop
    values = asdict(replace(pixels, crop=pixels.crop if pixels.shortest_edge else crop))
    multiple = pixels.own_size.multiple if pixels.own_size else None
    return values | {"own_size": multiple}


def _made(processor: Any, source: "Source") -> Any:
    own = type(processor)
    names = {"__module__": own.__module__, "__qualname__": own.__qualname__}
    out = copy.copy(processor)
    # its class's name is what the folder of a saved processor says
    out.__class__ = type(own.__name__, (FromBank, own), names)
    out.source, out.plain = source, processor
    out.video_processor = Videos(processor.video_processor, source)
    return out


class FromBank:
    """What is otherwise in a processor that reads a bank."""

    source: "Source"
    plain: Any
    image_processor: Any

    def __reduce__(self) -> Any:
        return _made, (self.plain, self.source)

    def prepare_inputs_layout(self, images: Any = None, **others: Any) -> Any:
        _, *rest = super().prepare_inputs_layout(images=None, **others)  # type: ignore[misc]
        return images, *rest  # names, not pictures that are fetched

    def validate_inputs(self, images: Any = None, **others: Any) -> None:
        # pictures are only counted there, and names are none
        standing_in = None if images is None else [np.zeros((1, 1, 3))] * len(names_of(images))
        super().validate_inputs(images=standing_in, **others)  # type: ignore[misc]

    def save_pretrained(self, folder: str | Path, **kwargs: Any) -> Any:
        return self.plain.save_pretrained(folder, **kwargs)

    def to_dict(self) -> Any:
        return self.plain.to_dict()

    def _process_images(self, images: Any, **kwargs: Any) -> Any:
        given = _given(self.image_processor, kwargs)
        taken = [self.source.image(name, self.image_processor, given) for name in names_of(images)]
        features = torch.cat([picture.features.flatten(0, 2) for picture in taken])
        grids = torch.tensor([picture.grid for picture in taken])
        out = BatchFeature({"pixel_values": features, "image_grid_thw": grids})
        token = self.replace_image_token  # type: ignore[attr-defined]
        return out, [token(out, image_idx=k) for k in range(len(taken))]

    def replace_video_token(self, video_inputs: Any, video_idx: int = 0, **kwargs: Any) -> str:
        if self.source.kind.model_type != "llava_next_video":
            token = super().replace_video_token  # type: ignore[misc]
            return str(token(video_inputs, video_idx=video_idx, **kwargs))
        # it counts by pixels, which are not there
        frames, rows, cols, _ = video_inputs["pixel_values_videos"][video_idx].shape
        return str(self.video_token) * (rows * cols // 4 * frames)  # type: ignore[attr-defined]


class Videos:
    """A video processor that takes names; all else is that of the plain one."""

    def __init__(self, plain: Any, source: "Source") -> None:
        self.plain, self.source = plain, source

    def __getattr__(self, name: str) -> Any:
        if name in ("plain", "source"):  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.plain, name)

    def __call__(self, videos: Any, **kwargs: Any) -> BatchFeature:
        given = _given(self.plain, kwargs)
        clips = [self.source.video(name, self.plain, given) for name in names_of(videos)]
        features = [clip.features for clip in clips]
        out: dict[str, Any] = {}
        if self.source.kind.is_merged:
            out["pixel_values_videos"] = torch.cat([part.flatten(0, 2) for part in features])
            out["video_grid_thw"] = torch.tensor([clip.grid for clip in clips])
        else:
            counts = {len(part) for part in features}
            if len(counts) > 1:
                raise UserError(
                    "the clips of a batch have different numbers of frames",
                    got=", ".join(map(str, sorted(counts))),
                    fix="pass one clip at a time, or encode with --frames N",
                )
            out["pixel_values_videos"] = torch.stack(features)
        if given.get("return_metadata"):
            out["video_metadata"] = [clip.metadata for clip in clips]
        return BatchFeature(out)


@dataclass(frozen=True)
class Taken:
    """One clip as a processor gives it."""

    name: str
    features: Tensor
    """`(units, rows, cols, width)`."""
    metadata: VideoMetadata
    size: tuple[int, int]
    """(height, width) of a frame as displayed."""
    grid: tuple[int, int, int] = (0, 0, 0)
    """Units, rows and columns of patches."""


class Source:
    """The clips of a bank, and of files that it lacks if `missing` is live."""

    def __init__(self, bank: Bank, kind: Kind, media_dir: Path, missing: str) -> None:
        self.bank, self.kind, self.media_dir, self.missing = bank, kind, media_dir, missing
        self.live = 0
        """Clips whose features were made by the tower."""
        self._tower: Any = None

    def __deepcopy__(self, _: Any) -> "Source":
        return self  # what is saved of a processor is a copy of it

    def __getstate__(self) -> Mapping[str, Any]:
        return self.__dict__ | {"_tower": None}

    def video(self, name: str, plain: Any, given: Mapping[str, Any]) -> Taken:
        """Return a clip; UserError where the processor would take other frames or pixels."""
        # Qwen3-VL's count of patches knows of it
        if given.get("cap_pixels_per_frame") and self.kind.model_type != "qwen3_vl":
            raise UserError(
                "the pixels of a frame depend on how many there are, and a bank's do not",
                where="cap_pixels_per_frame",
                fix="leave it out",
            )
        found = self._find(name)
        if given.get("do_sample_frames"):
            check_frames(found, plain, given, self.bank)
        units, rows, cols, _ = found.features.shape
        if self.kind.is_merged:
            rows, cols = rows * plain.merge_size, cols * plain.merge_size
            count = len(found.metadata.frames_indices)
            patches = plain.get_num_of_video_patches(count, *found.size, given)
            check_size(found, units * rows * cols, patches, self.bank)
        return replace(found, grid=(units, rows, cols))

    def image(self, name: str, plain: Any, given: Mapping[str, Any]) -> Taken:
        """Return a picture, whose features are one unit; UserError where it would be of other pixels."""
        if not self.kind.is_merged:
            raise UserError(
                f"pictures of {self.kind.model_type} are cut into crops, which no bank holds",
                got=name,
                fix="train on videos, or keep the model's tower and leave bank_processor out",
            )
        found = self._find(name)
        units, rows, cols, _ = found.features.shape
        if units > 1:
            raise UserError("a video, and asked for as a picture", where=name)
        rows, cols = rows * plain.merge_size, cols * plain.merge_size
        patches = plain.get_number_of_image_patches(*found.size, given)
        check_size(found, rows * cols, patches, self.bank)
        return replace(found, grid=(units, rows, cols))

    def _find(self, name: str) -> Taken:
        row = self.bank.find(self._id(name))
        if row is None:
            return self._live(name)
        columns = self.bank.columns
        begin, end = columns["frame_index_offsets"][row : row + 2].tolist()
        clip = self.bank.clip(row)
        facts = clip.start, clip.end, float(columns["fps"][row]), clip.display_size
        return self._taken(name, self.bank.read(row, 1), columns["frame_index"][begin:end], *facts)

    def _live(self, name: str) -> Taken:
        """Return a file's features, made now by the bank's own tower."""
        config = self.bank.config
        if self.missing != "live":
            raise self._absent(self._id(name))
        if self._tower is None:
            places = tower_places(self.bank.manifest.provenance.tower, self.bank.path)
            self._tower = load_tower(config, places)
        with DecodeChild() as child:
            clip, stored = encoded(Path(name), config, self._tower, child)
        self.live += 1
        facts = clip.start, clip.end, clip.fps, clip.display_size
        return self._taken(name, stored[1], clip.frame_index, *facts)

    def _taken(
        self,
        name: str,
        stored: np.ndarray,
        frame_index: np.ndarray,
        start: float,
        end: float,
        fps: float,
        size: tuple[int, int],
    ) -> Taken:
        # of a part of a file, frames count from where it begins, as if it had been cut out
        frames = [int(k) - round(start * fps) for k in frame_index]
        metadata = VideoMetadata(
            total_num_frames=max(round((end - start) * fps), frames[-1] + 1),
            fps=fps,
            height=size[0],
            width=size[1],
            duration=end - start,
            video_backend="framebank",
            frames_indices=frames,
        )
        return Taken(name, as_tensor(stored), metadata, size)

    def _absent(self, id_: str) -> UserError:
        failed = {entry.id: entry for entry in read_quarantine(self.bank.where)}
        if id_ in failed:
            return UserError(
                f"the clip {id_!r} is in quarantine: {failed[id_].reason}",
                where=self.bank.where,
                fix="leave it out, or mend the file and encode again",
            )
        tower, layer = self.bank.manifest.provenance.tower, self.bank.config.layer
        strides = ",".join(map(str, self.bank.config.strides))
        return UserError(
            f"the clip {id_!r} is not in the bank",
            where=self.bank.where,
            fix=f"add it with preprocess encode VIDEOS --tower {tower} --layer {layer} --stride "
            f"{strides} --out {self.bank.where}, say by media_dir what comes before ids in names, or say "
            "missing='live'",
        )

    def _id(self, name: str) -> str:
        path = Path(name)
        if self.media_dir != Path() and path.is_relative_to(self.media_dir):
            path = path.relative_to(self.media_dir)
        return path.as_posix()


def check_frames(found: Taken, plain: Any, given: Mapping[str, Any], bank: Bank) -> None:
    """Raise UserError where a processor would sample another number of frames than were banked.

    Which ones they are may differ by less than the time between two: the stamps are of those banked.
    """
    wanted = {name: given.get(name) for name in given if name not in ("videos", "video_metadata")}
    expected = len(plain.sample_frames(metadata=found.metadata, **wanted))
    count = len(found.metadata.frames_indices)
    if count != expected:
        rate = given.get("fps")
        flags = f"--fps {rate}" if rate else f"--frames {expected}"
        raise UserError(
            "the bank holds another number of frames than this processor takes",
            got=f"{count} frames, sampled by {bank.config.sampling}",
            expected=f"{expected} of them",
            where=found.name,
            fix=f"encode with {flags}, or pass do_sample_frames=False to take those banked",
        )


def check_size(found: Taken, patches: int, expected: int, bank: Bank) -> None:
    """Raise UserError where a processor would make frames of another size than were banked."""
    if patches != expected:
        height, width = found.size
        raise UserError(
            "the bank's frames are of another size than this processor makes them",
            got=f"{patches} patches of {width}x{height} pixels",
            expected=f"{expected} patches",
            where=f"{bank.where}: {found.name}",
            fix="give the processor the limits of pixels of the preprocessor_config.json that the bank "
            "was encoded with, or encode with one of the processor's",
        )


def _given(plain: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return a processor's settings, its own where a call does not give them."""
    own = {name: getattr(plain, name, None) for name in plain.valid_kwargs.__annotations__}
    return {name: value for name, value in {**own, **kwargs}.items() if value is not None}


def names_of(media: Any) -> list[str]:
    """Return the names in what a processor was given, in order; UserError where it is no name."""
    if isinstance(media, str | Path):
        return [str(media)]
    if isinstance(media, Iterable) and not hasattr(media, "shape") and not hasattr(media, "size"):
        return [name for part in media for name in names_of(part)]
    raise UserError(
        "takes names of clips, and got pixels",
        got=type(media).__name__,
        where="bank_processor",
        fix="leave the loading of videos out: messages and records name the file",
    )
