"""The frozen vision tower: loading, identity, and pixels -> patch grids.

tower = Tower.load("google/siglip-so400m-patch14-384", layer=-2)
patches = tower.encode(tower.pixels.resize(frames))     # fp32 (frames, 27, 27, 1152)
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, logging

from model.llm import tower_digest
from model.tower.forward.hidden import hidden_state
from model.tower.inlet import Inlet
from model.tower.pixels import Pixels
from model.tower.pooling import Pooling
from model.tower.precision import DTYPES
from model.tower.processor import load_processor
from model.tower.side_by_side import side_by_side
from model.tower.trial import check_processor
from model.tower_kinds import (
    OWN_CODE,
    Layer,
    TowerKind,
    find_kind,
    has_own_model,
    named,
    patch_of,
)
from shards.errors import UserError, first_line


@dataclass
class Tower:
    """A frozen tower on a device, with all that its output depends on."""

    name: str
    """As the user gave it: a Hub name or a folder."""
    model_type: str
    digest: str
    """blake2b of the vision configuration and weights, the same for every copy of them."""
    layer: Layer
    """Index of the hidden state whose patches are the features; or `merged`, the tokens of the tower's
    merger; or `5,11,17,merged`, with the tokens of these layers' own mergers before them."""
    dtype: str
    attention: str
    pixels: Pixels
    patch: int
    """Pixels on a side of a patch, or of a merged token."""
    width: int
    model: nn.Module
    device: torch.device
    kind: TowerKind
    frames_per_unit: int = 1
    """Frames in one temporal unit: 2 for Qwen's towers."""
    window: int = 0
    """Frames that attend to each other: a clip passes in windows of this many. 0: none do."""
    inlet: Inlet | None = None
    """Brings frames to a GPU; None for a tower on another device."""

    @classmethod
    def load(
        cls,
        name: str,
        *,
        layer: Layer = -2,
        dtype: str = "float32",
        device: str | torch.device = "cpu",
        attention: str = "sdpa",
    ) -> "Tower":
        """Load by Hub name or local folder; UserError says why a tower cannot be used."""
        kind, config = _read_config(name)
        processor, model = _load_vision(name, kind, config, attention)
        vision = model.config
        _check_layer(name, kind, layer, vision)
        pixels = _pixels_of(name, processor, kind.side_of(vision))
        # of the fp32 weights as loaded, before they are moved or converted: the same on every device
        digest = tower_digest(vision.to_dict(), model.state_dict())
        _to_device(model, dtype, device)
        tower = cls(
            name=name,
            model_type=type(vision).model_type,
            digest=digest,
            layer=layer,
            dtype=dtype,
            attention=attention,
            pixels=pixels,
            patch=patch_of(vision.to_dict()) * kind.joined(vision, layer),
            width=kind.width_of(vision, layer),
            model=model,
            device=torch.device(device),
            kind=kind,
            frames_per_unit=kind.frames_of(vision),
            window=kind.window_of(vision),
            inlet=Inlet(torch.device(device)) if torch.device(device).type == "cuda" else None,
        )
        # last, since it needs the whole tower: our arithmetic is held against the processor's own
        check_processor(tower, processor)
        return tower

    def fit(self, how: str) -> None:
        """Choose how frames are brought to the tower's size, one of `FITS`; UserError if it cannot be."""
        try:
            self.pixels = self.pixels.fitted(how)
        except UserError as error:
            raise UserError(error.what, where=f"tower {self.name}", fix=error.fix) from None

    def fit_like(self, processor: Mapping[str, Any]) -> None:
        """Choose the one of `FITS` that gives the processor of a bank's fingerprint, if one does."""
        if self.pixels.own_size or self.pixels.to_json() == processor:
            return
        # pad and stretch fit any frame to any size; crop makes a square one alone
        fitted = [self.pixels.fitted(how) for how in ("pad", "stretch")]
        if self.pixels.height == self.pixels.width:
            fitted.append(self.pixels.fitted("crop"))
        found = [pixels for pixels in fitted if pixels.to_json() == processor]
        self.pixels = found[0] if found else self.pixels

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Return the patch (rows, columns) of a frame of this displayed size, in pixels."""
        rows, cols = self.pixels.output_size(height, width)
        return rows // self.patch, cols // self.patch

    def covered(self, height: int, width: int) -> tuple[float, float, float, float]:
        """Return the part of such a frame that its patches cover: y0, x0, y1, x1 as fractions of it."""
        return self.pixels.covered(height, width, self.patch)

    def encode(
        self,
        frames: np.ndarray,
        batch_frames: int = 16,
        shape: int | None = None,
        threads: int = 1,
    ) -> Tensor:
        """Return the patch grid of each unit: fp32 `(units, patch_rows, patch_cols, width)`.

        frames: uint8 `(frames, height, width, 3)` at the tower's size. shape: frames of a batch, given
        where these frames are a part of a longer clip; else it follows from their number alone.
        threads: on a CPU, the parts of a batch that are encoded side by side.
        """
        # kernels round differently for other batch shapes: were clips mixed in a batch, a clip's features
        # would depend on its neighbours
        shape = shape or self.batch_shape(len(frames), batch_frames)
        cuts = range(0, len(frames), shape)
        return torch.cat(
            [self.encode_batch(frames[cut : cut + shape], shape, threads) for cut in cuts]
        )

    def batch_shape(self, frames: int, batch_frames: int) -> int:
        """Return the frames of a batch for a clip of `frames`.

        The least power of two of units (`frames_per_unit` frames) that holds the clip, at most
        `batch_frames`. Where frames attend to each other it is their window, whatever `batch_frames` is.
        The clip's length alone decides, since features' last bits depend on the shape; powers of two, so
        that a short clip is not padded to a full batch.
        """
        units = -(-frames // self.frames_per_unit)
        if self.window:
            return min(units * self.frames_per_unit, self.window)
        most = max(1, batch_frames // self.frames_per_unit)
        return min(1 << (units - 1).bit_length(), most) * self.frames_per_unit

    def encode_batch(self, frames: np.ndarray, shape: int, threads: int = 1) -> Tensor:
        """Return the patch grids of up to `shape` frames: fp32 `(units, rows, cols, width)`.

        The batch is filled with black frames to its shape, unless frames attend to each other; the last
        frame is repeated to fill its unit. threads: see `encode`.
        """
        assert 1 <= len(frames) <= shape
        each = self.frames_per_unit
        units = -(-len(frames) // each)
        shape = units * each if self.window else shape
        filled = np.zeros((shape, *frames.shape[1:]), np.uint8)
        filled[: len(frames)] = frames
        # black frames would be half of the last unit's content; Qwen's processors
        # repeat the last frame too
        filled[len(frames) : units * each] = frames[-1]
        # frames of a window attend to each other, and a GPU has parallelism of its own
        whole = self.window or self.device.type != "cpu"
        # a divisor of both: equal parts have one shape, and so one rounding
        parts = 1 if whole else math.gcd(shape // each, threads)
        if parts == 1:
            return self._forward(filled)[:units]
        return side_by_side(self._forward, filled, parts)[:units]

    def _forward(self, frames: np.ndarray) -> Tensor:
        return self.patches(self.normalise(frames))

    def features(
        self,
        frames: np.ndarray,
        strides: Sequence[int],
        *,
        pool_mode: str = "average",
        dtype: str = "float16",
        batch_frames: int = 16,
        threads: int,
    ) -> tuple[dict[int, np.ndarray], int]:
        """Return the features that a bank stores, and how many of their values underflowed to zero.

        Per stride float16, or uint16 with bfloat16's bits, `(units, cell_rows, cell_cols, width)`.
        frames: uint8 at the tower's size. threads: of the CPU, while the tower runs; with another number
        features may round differently, and a live clip is to have a banked one's.
        Raises FeatureRangeError for the first frame and stride whose values the type cannot hold.
        """
        pooling = Pooling(
            self,
            len(frames),
            strides,
            pool_mode=pool_mode,
            dtype=dtype,
            batch_frames=batch_frames,
            threads=threads,
        )
        return pooling.add_all(frames)

    def normalise(self, frames: np.ndarray) -> Tensor:
        """Rescale and normalise: uint8 `(frames, h, w, 3)` -> the tower's `(frames, 3, h, w)`."""
        there = self.inlet.bring(frames) if self.inlet else torch.from_numpy(frames).to(self.device)
        pixels = self.pixels
        levels = _levels(
            pixels.scale, tuple(pixels.mean), tuple(pixels.std), DTYPES[self.dtype], self.device
        )
        # by table: there are 256 levels, and each then has the same rounding on every device
        places = there.int() * 3 + torch.arange(3, dtype=torch.int32, device=self.device)
        # as frames come, channels last: a GPU's convolution takes them without a copy
        return levels.index_select(0, places.flatten()).view(there.shape).permute(0, 3, 1, 2)

    @torch.inference_mode()
    def patches(self, pixels: Tensor) -> Tensor:
        """Return the patch grids of normalised pixels: fp32 `(units, rows, cols, width)`."""
        if self.kind.encode:
            encode = named(self.kind.encode)
            return encode(self.model, pixels, self.layer).float()
        assert isinstance(self.layer, int), "no merger without a function that reads it"
        hidden = hidden_state(self.model, self.layer, pixel_values=pixels)
        prefix = self.kind.prefix_tokens + getattr(self.model.config, "num_register_tokens", 0)
        grid = [side // self.patch for side in pixels.shape[2:]]
        return hidden[:, prefix:].unflatten(1, grid).float()  # frames, rows, cols, width


@lru_cache(maxsize=4)
def _levels(
    scale: float,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Return what each level is in each channel, rescaled and normalised, `(256 * 3,)`; kept on the
    device, since to bring it there each time would wait for all that the device has still to do."""
    # transformers rescales in double and rounds once; in float the last bit would differ
    levels = (torch.arange(256, dtype=torch.float64) * scale).float()
    values = (levels[:, None] - torch.tensor(mean)) / torch.tensor(std)
    return values.flatten().to(dtype).to(device)


def _read_config(name: str) -> tuple[TowerKind, Any]:
    """Return the kind of tower in a folder or under a Hub name, and its config."""
    try:
        # as written, first: transformers would ask whether it may run code of the folder, and needs
        # timm for its towers, though neither is taken
        written, _ = PreTrainedConfig.get_config_dict(name)
        if not written:
            raise OSError("no config.json")
        kind = find_kind(str(written.get("model_type") or "a config.json without model_type"))
        if has_own_model(written):
            raise UserError(f"{written['model_type']} {OWN_CODE}")
        return kind, AutoConfig.from_pretrained(name, trust_remote_code=False)
    except UserError as error:
        raise UserError(str(error), where=f"tower {name}") from None
    except (OSError, ValueError) as error:
        raise _not_loaded(name, error) from None


def _load_vision(name: str, kind: TowerKind, config: Any, attention: str) -> tuple[Any, Any]:
    """Return a tower's image processor and its vision part, frozen, in fp32; UserError if incomplete."""
    part = {}
    if kind.inside and getattr(config, "vision_config", None) is not None:
        part = {"config": config.vision_config, "key_mapping": dict.fromkeys(kind.inside, "")}
    try:
        processor = load_processor(name)
        with _without_report():
            model, found = named(kind.model).from_pretrained(
                name,
                dtype=torch.float32,
                attn_implementation=attention,
                output_loading_info=True,
                **part,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _not_loaded(name, error) from None
    if found["missing_keys"]:  # transformers would draw them at random, and warn
        raise UserError(
            f"tower {name}: {len(found['missing_keys'])} of its weights are missing, such as "
            f"{min(found['missing_keys'])}; download it again"
        )
    if strange := weights_without_place(model, found["unexpected_keys"]):
        # transformers leaves them out, with a warning that would be lost among a text model's: a tower
        # without a norm or a layer that it was trained with gives other features of the same shape
        raise UserError(
            f"{len(strange)} of its weights have no place in {type(model).__name__} as its config.json "
            f"describes it, such as {strange[0]}",
            where=f"tower {name}",
            fix="restore the config.json that it was trained with, or take a tower of just this class",
        )
    return processor, model.requires_grad_(False).eval()


def weights_without_place(model: nn.Module, unexpected: Iterable[str]) -> list[str]:
    """Return the names of weights of this tower that it does not take, sorted.

    unexpected: of weights in its files, under the tower's own names; those of a text model and of heads
    are not of its parts. Buffers, which older versions of transformers saved, follow from the config.
    """
    parts, buffers = dict(model.named_children()), dict(model.named_buffers())
    return sorted(k for k in unexpected if k.partition(".")[0] in parts and k not in buffers)


def _check_layer(name: str, kind: TowerKind, layer: Layer, vision: Any) -> None:
    layers = getattr(vision, kind.depth)
    if isinstance(layer, str):
        merged = kind.merged_layers(vision)
        if layer not in merged:
            raise UserError(
                f"tower {name}: has no layer {layer}"
                + (
                    ""
                    if merged
                    else ": merged tokens are those of Qwen2-VL, Qwen2.5-VL and Qwen3-VL"
                ),
                fix=f"use a number, -1 to {-layers - 1}" + "".join(f", or {own}" for own in merged),
            )
        return
    if not -layers - 1 <= layer <= layers:
        raise UserError(f"tower {name}: layer {layer} of {layers} layers; use -1 to {-layers - 1}")


def _pixels_of(name: str, processor: Any, side: int | None) -> Pixels:
    """Return a processor's values; side: the multiple of frames' sides, None for a fixed size."""
    pixels = Pixels.from_processor(processor)
    given = pixels.own_size.multiple if pixels.own_size else None
    if given != side:
        raise UserError(
            f"tower {name}: its image processor belongs to another tower: it makes sides that are "
            f"multiples of {given}, expected {side}"
        )
    return pixels


def _to_device(model: nn.Module, dtype: str, device: str | torch.device) -> None:
    """Move a tower to a device, its weights in a dtype; UserError where it does not fit."""
    try:
        for weight in model.parameters():  # no buffers: rotary frequencies stay exact
            weight.data = weight.data.to(DTYPES[dtype])
        model.to(device)
    except (RuntimeError, AssertionError) as error:  # AssertionError where torch has no CUDA
        raise UserError(
            f"device {device}: cannot hold the tower: {first_line(error)}; try --device cpu"
        ) from None
    if torch.device(device).type == "cuda":  # as frames come: no copy before the convolution
        for weight in model.parameters():
            if weight.dim() == 4:
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)


@contextmanager
def _without_report() -> Iterator[None]:
    """Silence transformers' list of unused weights (a text model's); missing ones are checked here."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _not_loaded(name: str, error: Exception) -> UserError:
    return UserError(
        f"tower {name}: cannot be loaded; name a folder with config.json, preprocessor_config.json "
        f"and weights, or a model of the Hub: {first_line(error)}"
    )
