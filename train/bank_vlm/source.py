"""What a processor asks of a bank: a clip by its name, with its facts, or why it cannot be had."""

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers.video_utils import VideoMetadata

from model.batch import as_tensor
from model.tower.frames import processor_frames
from preprocess.decode.decode_child import DecodeChild
from shards.errors import UserError
from shards.format.features import Sampling
from shards.format.quarantine import read_quarantine
from shards.read.bank import Bank
from shards.storage import LocalFiles
from train.ask import encoded, load_tower, tower_places
from train.bank_vlm.kinds import Kind

OTHERWISE = "pass do_sample_frames=False to take those banked"


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

    def __init__(self, bank: Bank, kind: Kind, media_dir: Path, missing: str, tower: str) -> None:
        self.bank, self.kind, self.media_dir, self.missing = bank, kind, media_dir, missing
        self.live = 0
        """Clips whose features were made by the tower."""
        self._tower_place = tower
        self._tower: Any = None

    def __deepcopy__(self, _: Any) -> "Source":
        return self  # what is saved of a processor is a copy of it

    def __getstate__(self) -> Mapping[str, Any]:
        # a worker process loads the tower itself if it needs it: its weights are too much to be pickled
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
        # asked to sample, a processor would choose by its own rule: the bank
        # has to hold that very choice
        if given.get("do_sample_frames"):
            check_frames(found, plain, given, self.bank, self.kind)
        units, rows, cols, _ = found.features.shape
        if self.kind.is_merged:
            rows, cols = rows * plain.merge_size, cols * plain.merge_size
            count = len(found.metadata.frames_indices)
            # the last unit is filled up, which transformers before 5.9 does not count
            count += -count % plain.temporal_patch_size
            # asked of the processor itself, so that its own limits of pixels and rounding decide
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
        # one unit holds what one picture gives, and nothing else says whether a clip was one
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
        index = columns["frame_index"][begin:end]
        clip = self.bank.clip(row)
        fps = float(columns["fps"][row])
        if (
            "#" in clip.id
        ):  # of a part: its frames count from its first one, as if it had been cut out
            count, index = self.bank.meta(row).frame_count, index - index[0]
        else:
            # a bank keeps duration and mean rate: their product is the number
            # of frames, but for rounding
            count = max(round(clip.duration * fps), 1)
        facts = count, fps, clip.duration, clip.display_size
        return _taken(name, self.bank.read(row, 1), index, *facts)

    def _live(self, name: str) -> Taken:
        """Return a file's features, made now by the bank's own tower."""
        config = self.bank.config
        if self.missing != "live":
            raise self._absent(self._id(name))
        if self._tower is None:
            self._tower = self._load_tower()
        # made as encode makes them, frames by the bank's own sampling
        with DecodeChild() as child:
            clip, stored = encoded(Path(name), config, self._tower, child)
        self.live += 1
        facts = clip.frame_count, clip.fps, clip.end - clip.start, clip.display_size
        return _taken(name, stored[1], clip.frame_index, *facts)

    def _load_tower(self) -> Any:
        name = self.bank.manifest.provenance.tower
        if self._tower_place:
            places = [self._tower_place]
        elif isinstance(self.bank.files, LocalFiles):
            places = tower_places(name, self.bank.path)
        else:  # a URL has no folder beside it
            places = [name]
        try:
            return load_tower(self.bank.config, places)
        except UserError as error:
            fix = "give bank_processor its place now: tower=FOLDER"
            raise UserError(
                f"clips that the bank lacks cannot be made: {error.what}",
                error.got,
                error.expected,
                where=error.where or name,
                fix=fix,
            ) from None

    def _absent(self, id_: str) -> UserError:
        failed = {entry.id: entry for entry in read_quarantine(self.bank.where)}
        if id_ in failed:
            return UserError(
                f"the clip {id_!r} is in quarantine: {failed[id_].reason}",
                where=self.bank.where,
                fix="leave it out, or repair the file and encode again",
            )
        is_local = isinstance(self.bank.files, LocalFiles)
        # nothing can be added at a URL: the command names a copy
        out = self.bank.where if is_local else "A-COPY-OF-IT"
        return UserError(
            f"the clip {id_!r} is not in the bank",
            where=self.bank.where,
            fix=f"add it with {encode_command(self.bank, self.bank.config.sampling, out)}, say by "
            "media_dir what comes before ids in names, or say missing='live'",
        )

    def _id(self, name: str) -> str:
        path = Path(name)
        if self.media_dir != Path() and path.is_relative_to(self.media_dir):
            path = path.relative_to(self.media_dir)
        return path.as_posix()


def _taken(
    name: str,
    stored: np.ndarray,
    frame_index: np.ndarray,
    count: int,
    fps: float,
    duration: float,
    size: tuple[int, int],
) -> Taken:
    metadata = VideoMetadata(
        total_num_frames=count,
        fps=fps,
        height=size[0],
        width=size[1],
        duration=duration,
        video_backend="framebank",
        frames_indices=[int(k) for k in frame_index],
    )
    return Taken(name, as_tensor(stored), metadata, size)


def encode_command(bank: Bank, sampling: Sampling, out: str) -> str:
    """Return the command that encodes as a bank was, but for the frames."""
    config, tower = bank.config, bank.manifest.provenance.tower
    strides = ",".join(map(str, config.strides))
    return (
        f"preprocess encode VIDEOS --tower {tower} --layer {config.layer} --stride {strides} "
        f"{flags_of(sampling)} --out {out}"
    )


def flags_of(sampling: Sampling) -> str:
    """Return the flags of `encode` that sample so."""
    flags = f"--fps {sampling.fps} --max-frames {sampling.max_frames}"
    if sampling.num_frames is not None:
        flags = f"--frames {sampling.num_frames}"
    return flags if sampling.like is None else f"{flags} --frames-like {sampling.like}"


def check_frames(
    found: Taken, plain: Any, given: Mapping[str, Any], bank: Bank, kind: Kind
) -> None:
    """Raise UserError where a processor would take other frames of a clip than were banked.

    The processor itself is asked, with the length and mean frame rate that the file had when it was
    encoded; a video reader of its own may count the frames of a damaged file otherwise.
    """
    metadata = found.metadata
    # one frame: nothing to choose from
    if metadata.total_num_frames == 1:
        return
    wanted = {name: given[name] for name in given if name not in ("videos", "video_metadata")}
    try:
        taken = [int(k) for k in plain.sample_frames(metadata=copy(metadata), **wanted)]
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"this processor cannot sample it: {error}", where=found.name, fix=OTHERWISE
        ) from None
    # rounding makes Qwen2-VL's name a frame behind the last at some lengths, which no reader has
    expected = [k for k in taken if k < metadata.total_num_frames]
    banked = metadata.frames_indices
    if banked == expected:
        return
    sampling = _sampling_of(given, len(expected), kind)
    got, wanted_ = f"{len(banked)} frames", f"{len(expected)} of them"
    if len(banked) == len(expected):
        # the first that differs: of equally many frames the numbers tell nothing
        place = next(k for k in range(len(banked)) if banked[k] != expected[k])
        got, wanted_ = (f"frame {one[place]} at place {place}" for one in (banked, expected))
    raise UserError(
        "the bank holds other frames than this processor takes",
        got=f"{got}, by {flags_of(bank.config.sampling)}",
        expected=wanted_,
        where=found.name,
        fix=f"{_right(sampling, metadata, expected, bank)}{OTHERWISE}",
    )


def _sampling_of(given: Mapping[str, Any], count: int, kind: Kind) -> Sampling:
    """Return the sampling with which `encode` takes the frames that a processor does."""
    fps, frames = given.get("fps"), given.get("num_frames")
    if frames is None and fps is not None:
        most = int(given.get("max_frames") or count)
        # by its digits: Fraction(0.1) would be the binary number beside it
        rate = str(Fraction(str(fps)))
        return Sampling(fps=rate, max_frames=most, like=kind.frames_like)
    return Sampling(num_frames=int(frames or count), like=kind.frames_like)


def _right(sampling: Sampling, metadata: VideoMetadata, expected: list[int], bank: Bank) -> str:
    """Return the command that makes the expected frames, or nothing where none does."""
    assert sampling.like is not None
    fps = None if sampling.fps is None else float(Fraction(sampling.fps))
    asked = sampling.num_frames, fps, sampling.max_frames
    total, rate = metadata.total_num_frames, metadata.fps
    # tried before it is advised: a command that does not give these frames would be refused once more
    if processor_frames(sampling.like, total, rate, *asked) != expected:
        return "encode has no flags for its way to sample: "
    return f"encode with {encode_command(bank, sampling, 'ANOTHER')}, or "


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
