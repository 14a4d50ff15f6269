"""A processor of transformers that takes videos from a bank: names in, features out, no file opened.

    plain = AutoProcessor.from_pretrained(checkpoint)
    processor = bank_processor(plain, "bank", model_config=model.config)
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True)

Messages name videos: {"type": "video", "video": "a.mp4"} is the clip of that id. Ids, grids, time
stamps and positions are those that the processor gives for the frames in the bank.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature

from model.tower.pixels import Pixels
from shards.errors import UserError
from shards.format.features import differences
from shards.read.bank import Bank
from train.bank_vlm.kinds import bank_problem, find_kind
from train.bank_vlm.pairs import join
from train.bank_vlm.source import Source

MISSING = ("refuse", "live")


def refuse_decoding(given: Sequence[str], where: str) -> None:
    """Raise UserError for another trainer's settings of frames, which have no effect on a bank's."""
    if given:
        raise UserError(
            "frames and their size are those of the bank",
            got=", ".join(given),
            where=where,
            fix="leave it out, and give preprocess encode --fps and a tower folder with these limits",
        )


def bank_processor(
    processor: Any,
    bank: str | Path,
    *,
    model_config: Any,
    media_dir: str | Path = "",
    missing: str = "refuse",
    tower: str | Path = "",
) -> Any:
    """Return a copy of a processor, of its class, that reads the clips of a bank.

    bank: a folder or a URL; model_config: of the model that it serves; media_dir: what comes before a
    clip's id in the names that messages give. missing: of a clip that the bank lacks, `refuse` it, or
    make its features `live`; `processor.source.live` counts those. tower: where the
    bank's own is now, which makes them; as a rule it is found where it was when the bank was made, or was
    moved with it.
    """
    if missing not in MISSING:
        raise UserError("must be one of refuse, live", got=missing, where="missing")
    kind = find_kind(model_config.model_type)
    opened = Bank.open(bank)
    if problem := bank_problem(kind, model_config.to_dict(), opened.whole.features):
        raise UserError(problem, where=opened.where)
    # the digest of weights says nothing about how frames were made pixels of
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
    # one source for processor and copies: it counts what was made live, and holds the one loaded tower
    source = Source(opened, kind, Path(media_dir), missing, str(tower))
    join(source, model_config, opened)
    return _made(processor, source)


def pixels_of(pixels: Pixels) -> dict[str, Any]:
    """Return what there is to compare of two ways to make pixels, clip by clip sizes left out."""
    # a crop to the very size of the picture cuts nothing
    crop = None if pixels.crop == (pixels.height, pixels.width) else pixels.crop
    values = asdict(replace(pixels, crop=pixels.crop if pixels.shortest_edge else crop))
    # limits of pixels are compared clip by clip, by the number of patches: other
    # limits may give the same size
    multiple = pixels.own_size.multiple if pixels.own_size else None
    return values | {"own_size": multiple}


def _made(processor: Any, source: Source) -> Any:
    own = type(processor)
    names = {"__module__": own.__module__, "__qualname__": own.__qualname__}
    # a copy: the given processor goes on to take pixels, and is what is saved
    out = copy.copy(processor)
    # its class's name is what the folder of a saved processor says
    out.__class__ = type(own.__name__, (FromBank, own), names)
    out.source, out.plain = source, processor
    out.video_processor = Videos(processor.video_processor, source)
    return out


class FromBank:
    """What is otherwise in a processor that reads a bank."""

    source: Source
    plain: Any
    image_processor: Any

    def __reduce__(self) -> Any:
        # the class was made here and has no name to import it by, which pickle would
        # look for in a worker process
        return _made, (self.plain, self.source)

    def prepare_inputs_layout(self, images: Any = None, **others: Any) -> Any:
        _, *rest = super().prepare_inputs_layout(images=None, **others)  # type: ignore[misc]
        return images, *rest  # names, not pictures that are fetched

    def validate_inputs(self, images: Any = None, **others: Any) -> None:
        # pictures are only counted there, and names are none
        standing_in = None if images is None else [np.zeros((1, 1, 3))] * len(names_of(images))
        super().validate_inputs(images=standing_in, **others)  # type: ignore[misc]

    def save_pretrained(self, folder: str | Path, **kwargs: Any) -> Any:
        # a saved checkpoint is to be loaded by transformers alone, without a bank
        return self.plain.save_pretrained(folder, **kwargs)

    def to_dict(self) -> Any:
        return self.plain.to_dict()

    def _process_images(self, images: Any, **kwargs: Any) -> Any:
        given = _given(self.image_processor, kwargs)
        taken = [self.source.image(name, self.image_processor, given) for name in names_of(images)]
        # field names of pixels, values of features: collators and trainers hand on
        # the fields that they know
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
        # 4: the model pools 2x2 patches to a token
        return str(self.video_token) * (rows * cols // 4 * frames)  # type: ignore[attr-defined]


class Videos:
    """A video processor that takes names; all else is that of the plain one."""

    def __init__(self, plain: Any, source: Source) -> None:
        self.plain, self.source = plain, source

    def __getattr__(self, name: str) -> Any:
        if name in ("plain", "source"):  # while it is unpickled
            raise AttributeError(name)
        # chat templates and trainers ask it for patch sizes, frame rates, limits
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
            # LLaVA stacks the clips of a batch into one tensor, Qwen lays their
            # tokens one after the other
            counts = {len(part) for part in features}
            if len(counts) > 1:
                raise UserError(
                    "the clips of a batch have different numbers of frames",
                    got=", ".join(map(str, sorted(counts))),
                    fix="pass one clip at a time, or encode with --frames N",
                )
            out["pixel_values_videos"] = torch.stack(features)
        # Qwen3-VL writes the seconds of frames into the text, which it computes from these
        if given.get("return_metadata"):
            out["video_metadata"] = [clip.metadata for clip in clips]
        return BatchFeature(out)


def _given(plain: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return a processor's settings, its own where a call does not give them."""
    # transformers lets a call leave out what the processor was saved with
    own = {name: getattr(plain, name, None) for name in plain.valid_kwargs.__annotations__}
    return {name: value for name, value in {**own, **kwargs}.items() if value is not None}


def names_of(media: Any) -> list[str]:
    """Return the names in what a processor was given, in order; UserError where it is no name."""
    if isinstance(media, str | Path):
        return [str(media)]
    # an array can be iterated over, too: its shape (or a picture's size) tells
    # that it is no list of names
    if isinstance(media, Iterable) and not hasattr(media, "shape") and not hasattr(media, "size"):
        return [name for part in media for name in names_of(part)]
    raise UserError(
        "takes names of clips, and got pixels",
        got=type(media).__name__,
        where="bank_processor",
        fix="leave the loading of videos out: messages and records name the file",
    )
