"""The vision towers that can be taken, a row each; torch-free, so that training can count their FLOPs.

Add your own tower: a row of `KINDS` below. A vision transformer of transformers whose hidden states
are a CLS token and then the patches, row by row, needs no more than

    TowerKind(("vit",), "transformers:ViTModel", prefix_tokens=1)

and `preprocess encode --tower google/vit-base-patch16-224` banks its features. Its folder holds
config.json, preprocessor_config.json and weights; the processor must make every frame the same patch
grid (or say `merge` or `any_shape`). A tower that lets frames see later ones says `window`: the
frame-causal loss, whose target would hold the future, is then refused.
"""

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from shards.errors import UserError

MERGED = "merged"
"""The layer behind a tower's merger: tokens of several patches, as they go to the LLM."""
Layer = int | str
"""Index into a tower's hidden states, -1 the last; or `MERGED`, behind the numbers of layers that have a
merger of their own."""


def named_layers(layer: Layer) -> list[int]:
    """Return the layers before `merged`: of `5,11,17,merged` 5, 11 and 17, counted from 0."""
    return [int(word) for word in layer.split(",")[:-1]] if isinstance(layer, str) else []


def merged_layer(earlier: Iterable[int] = ()) -> str:
    """Return the layer of merged tokens, with those of earlier layers before them: the other way."""
    return ",".join(map(str, (*earlier, MERGED)))


def named(name: str) -> Any:
    """Return what `module:name` means, importing the module."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def patch_of(config: Mapping[str, Any]) -> int:
    """Return the pixels on a side of a patch; UserError where its sides differ."""
    sides = config["patch_size"]
    sides = {sides} if isinstance(sides, int) else set(sides)
    if len(sides) > 1:
        raise UserError("its patches are not square", got=f"patch_size {sorted(sides)}")
    return int(sides.pop())


def vit_flops(config: Mapping[str, Any], patches: int, layer: int) -> int:
    """Return the FLOPs of a plain vision transformer on one frame, up to a hidden state.

    Later layers are not computed by a fair competitor, so they are not counted; nor is what comes
    before the patches. Raises KeyError where the config lacks a size.
    """
    if config.get("use_gated_mlp"):  # one matrix more
        raise KeyError("use_gated_mlp")
    width, depth, side = config["hidden_size"], config["num_hidden_layers"], patch_of(config)
    mlp = config.get("intermediate_size") or width * config["mlp_ratio"]
    used = depth + 1 + layer if layer < 0 else layer
    per_layer = patches * (8 * width**2 + 4 * width * mlp + 4 * patches * width)
    return int(used * per_layer + 2 * 3 * side**2 * width * patches)


@dataclass(frozen=True)
class TowerKind:
    """What must be known of a family of towers; names of fields are those of its vision config."""

    model_types: tuple[str, ...]
    """`model_type` in config.json: of the tower alone and of whole models that it is part of."""
    model: str
    """The vision part's class, as `module:Name`; imported when such a tower is loaded."""
    prefix_tokens: int = 0
    """Tokens before the patches, such as CLS; the config's `num_register_tokens` come on top."""
    width: str = "hidden_size"
    """The field with the channels of a patch."""
    depth: str = "num_hidden_layers"
    """The field with the number of layers."""
    frames_per_unit: str = ""
    """The field with the frames that a patch is deep; without one, each frame stands for itself."""
    merge: str = ""
    """The field with the patches on a side that a later merger joins, where a frame keeps a size of its
    own, in multiples of them; without one, every frame is given the same size."""
    any_shape: bool = False
    """Whether a frame keeps its shape, in multiples of a patch, where nothing merges them."""
    window: str = ""
    """The field with the frames that see each other: a clip is encoded in windows of so many."""
    inside: tuple[str, ...] = ()
    """What the tower's weights are prefixed with in a whole model, as patterns, where transformers does
    not take the class's weights out of it by itself."""
    merged_width: str = ""
    """The field with the channels of a merged token, where there is a merger."""
    deepstack: str = ""
    """The field with the layers, counted from 0, that have a merger of their own."""
    encode: str = ""
    """A function of (model, pixels `(frames, 3, height, width)`, layer), as `module:name`, that returns
    `(units, patch_rows, patch_cols, width)`; without one, hidden states are prefix, then patches."""
    lay_out: str = ""
    """A function of (vision config, pixels of a frame), as `module:name`, that returns them as its image
    processor lays a picture out; without one, they are `(1, 3, height, width)` there, too."""
    flops: Callable[[Mapping[str, Any], int, int], int] | None = vit_flops
    """(config, patches of a frame, layer) -> FLOPs of a frame; None where they are not counted."""

    def frames_of(self, config: Any) -> int:
        """Return how many frames make one unit."""
        return int(getattr(config, self.frames_per_unit)) if self.frames_per_unit else 1

    def joined(self, config: Any, layer: Layer) -> int:
        """Return how many patches on a side make one of what a layer gives."""
        return int(getattr(config, self.merge)) if isinstance(layer, str) else 1

    def width_of(self, config: Any, layer: Layer) -> int:
        """Return the channels of what a layer gives."""
        if isinstance(layer, str):
            return int(getattr(config, self.merged_width)) * (len(named_layers(layer)) + 1)
        return int(getattr(config, self.width))

    def merged_layers(self, config: Any) -> list[str]:
        """Return what `layer` may be beside a number."""
        if not self.merge:
            return []
        earlier = getattr(config, self.deepstack) if self.deepstack else ()
        return [MERGED, *([merged_layer(earlier)] if earlier else [])]

    def side_of(self, config: Any) -> int | None:
        """Return what the sides of a frame are multiples of, where it keeps a size of its own."""
        if self.merge:
            return int(config.patch_size * getattr(config, self.merge))
        return int(config.patch_size) if self.any_shape else None

    def window_of(self, config: Any) -> int:
        """Return how many frames see each other, in whole units; 0 where each unit stands for itself."""
        frames = int(getattr(config, self.window)) if self.window else 0
        return frames - frames % self.frames_of(config)


QWEN_INSIDE = (r"^model\.visual\.", r"^visual\.")

KINDS = [
    # SigLIP 2 of a fixed resolution is published as siglip, too
    TowerKind(("siglip", "siglip_vision_model"), "transformers:SiglipVisionModel"),
    TowerKind(("clip", "clip_vision_model"), "transformers:CLIPVisionModel", prefix_tokens=1),
    TowerKind(("dinov2",), "transformers:Dinov2Model", prefix_tokens=1),
    TowerKind(("dinov2_with_registers",), "transformers:Dinov2WithRegistersModel", prefix_tokens=1),
    TowerKind(("dinov3_vit",), "transformers:DINOv3ViTModel", prefix_tokens=1),
    TowerKind(
        ("internvl", "internvl_vision"),
        "transformers:InternVLVisionModel",
        prefix_tokens=1,
        inside=(r"^model\.vision_tower\.", r"^vision_tower\."),
    ),
    TowerKind(
        ("siglip2", "siglip2_vision_model"),
        "transformers:Siglip2VisionModel",
        any_shape=True,
        encode="model.tower.naflex:encode",
        lay_out="model.tower.naflex:lay_out",
    ),
    TowerKind(
        ("vjepa2",),
        "transformers:VJEPA2Model",
        frames_per_unit="tubelet_size",
        window="frames_per_clip",
        encode="model.tower.vjepa:encode",
        flops=None,
    ),
    TowerKind(
        ("qwen2_vl", "qwen2_vl_vision"),
        "transformers.models.qwen2_vl.modeling_qwen2_vl:Qwen2VisionTransformerPretrainedModel",
        width="embed_dim",  # its hidden_size is the LLM's
        depth="depth",
        frames_per_unit="temporal_patch_size",
        merge="spatial_merge_size",
        merged_width="hidden_size",
        inside=QWEN_INSIDE,
        encode="model.tower.qwen:encode",
        lay_out="model.tower.qwen:lay_out",
        flops=None,
    ),
    TowerKind(
        ("qwen2_5_vl", "qwen2_5_vl_vision"),
        "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl:Qwen2_5_VisionTransformerPretrainedModel",
        depth="depth",
        frames_per_unit="temporal_patch_size",
        merge="spatial_merge_size",
        merged_width="out_hidden_size",
        inside=QWEN_INSIDE,
        encode="model.tower.qwen:encode",
        lay_out="model.tower.qwen:lay_out",
        flops=None,
    ),
    TowerKind(
        ("qwen3_vl", "qwen3_vl_vision"),
        "transformers.models.qwen3_vl.modeling_qwen3_vl:Qwen3VLVisionModel",
        depth="depth",
        frames_per_unit="temporal_patch_size",
        merge="spatial_merge_size",
        merged_width="out_hidden_size",
        deepstack="deepstack_visual_indexes",
        inside=QWEN_INSIDE,
        encode="model.tower.qwen:encode",
        lay_out="model.tower.qwen:lay_out",
        flops=None,
    ),
]

MIXES_FRAMES = (
    "mixes frames, and takes a fixed number of them; use SigLIP, CLIP or DINOv2, or V-JEPA 2 with "
    "loss_weight: 0"
)
OF_TIMM = (
    "is a tower of timm (Perception Encoder and others), which is not read; use SigLIP 2 or DINOv3"
)
REFUSED = {
    "vivit": MIXES_FRAMES,
    "videomae": MIXES_FRAMES,
    "timesformer": MIXES_FRAMES,
    "xclip": MIXES_FRAMES,
    "internvideo": MIXES_FRAMES,
    "video_llama": MIXES_FRAMES,
    "perception_lm": OF_TIMM,
    "timm": OF_TIMM,
    "pe_": OF_TIMM,
    "intern_vit": "is code of its own, which is never run; use an InternVL in transformers' form (-hf)",
}
"""A part of a `model_type` -> why towers of such a type cannot serve."""


def find_kind(model_type: str) -> TowerKind:
    """Return the row of a `model_type`; UserError says why there is none."""
    for kind in KINDS:
        if model_type in kind.model_types:
            return kind
    for part, why in REFUSED.items():
        if part in model_type:
            raise UserError(f"{model_type} {why}")
    known = ", ".join(name for kind in KINDS for name in kind.model_types)
    raise UserError(f"{model_type} is not supported (have {known})")


def mixes_frames(model_type: str) -> bool:
    """Tell whether a bank's features of a frame hold what later frames show; type: of its tower."""
    return any(kind.window and model_type in kind.model_types for kind in KINDS)


def frame_flops(config: Mapping[str, Any], patches: int, layer: Layer = -2) -> int | None:
    """Return the FLOPs of encoding one frame, or None where they are not known.

    config: a tower's config.json, or that of a whole model which holds it. patches: of the whole
    frame. layer: which hidden state is taken, as `preprocess encode --layer`.
    """
    kind = next((k for k in KINDS if config.get("model_type") in k.model_types), None)
    if kind is None or kind.flops is None or isinstance(layer, str):
        return None
    try:
        return kind.flops(config.get("vision_config", config), patches, layer)
    except KeyError:
        return None
