"""The supported vision towers, a row each; torch-free, so that training can count their FLOPs.

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
"""The layer of a tower's merger: tokens of several patches, as they go to the LLM."""
Layer = int | str
"""Index into a tower's hidden states, -1 the last; or `MERGED`, after the numbers of layers that have a
merger of their own: `5,11,17,merged`."""


def named_layers(layer: Layer) -> list[int]:
    """Return the layers before `merged`, counted from 0: 5, 11 and 17 of `5,11,17,merged`."""
    return [int(word) for word in layer.split(",")[:-1]] if isinstance(layer, str) else []


def merged_layer(earlier: Iterable[int] = ()) -> str:
    """Return the text that `named_layers` reads: `5,11,17,merged` for 5, 11 and 17."""
    return ",".join(map(str, (*earlier, MERGED)))


def named(name: str) -> Any:
    """Return the object that `module:name` names, importing the module."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def patch_of(config: Mapping[str, Any]) -> int:
    """Return the pixels on a side of a patch; UserError where its sides differ."""
    sides = config["patch_size"]
    # some configs write one number, some a list
    sides = {sides} if isinstance(sides, int) else set(sides)
    if len(sides) > 1:
        raise UserError("its patches are not square", got=f"patch_size {sorted(sides)}")
    return int(sides.pop())


def vit_flops(config: Mapping[str, Any], patches: int, layer: int) -> int:
    """Return the FLOPs of a plain vision transformer on one frame, up to a hidden state.

    patches (8 w^2 + 4 w m + 4 patches w) a layer (width w, MLP m): four square matrices, two of the MLP,
    scores and values of attention; and 6 side^2 w for each patch's projection. 2 FLOPs per multiply-add.
    Layers after the one that is taken are not counted, since a fair competitor would not compute them;
    nor are prefix tokens. Raises KeyError where the config lacks a size.
    """
    if config.get("use_gated_mlp"):  # a third matrix, which the formula does not have
        raise KeyError("use_gated_mlp")
    width, depth, side = config["hidden_size"], config["num_hidden_layers"], patch_of(config)
    mlp = config.get("intermediate_size") or width * config["mlp_ratio"]
    # of `depth` + 1 hidden states the first is the patches' embeddings: -2 means depth - 1 layers
    used = depth + 1 + layer if layer < 0 else layer
    per_layer = patches * (8 * width**2 + 4 * width * mlp + 4 * patches * width)
    return int(used * per_layer + 2 * 3 * side**2 * width * patches)


@dataclass(frozen=True)
class TowerKind:
    """The facts of a family of towers; names of fields are those of its vision config."""

    model_types: tuple[str, ...]
    """`model_type` in config.json: of the tower alone and of the models that contain it."""
    model: str
    """The vision part's class, as `module:Name`; imported when such a tower is loaded."""
    prefix_tokens: int = 0
    """Tokens before the patches, such as CLS; the config's `num_register_tokens` come on top."""
    width: str = "hidden_size"
    """The field with the channels of a patch."""
    depth: str = "num_hidden_layers"
    """The field with the number of layers."""
    frames_per_unit: str = ""
    """The field with the frames of a temporal unit; without one, a unit is a frame."""
    merge: str = ""
    """The field with the patches on a side that a merger joins; frames then keep a size of their own, in
    multiples of these. Without one, all frames are brought to one size."""
    any_shape: bool = False
    """Whether frames keep their shape, in multiples of a patch, without a merger."""
    window: str = ""
    """The field with the frames that attend to each other: a clip is encoded in windows of this many."""
    inside: tuple[str, ...] = ()
    """Patterns of the prefix of the tower's weights in a model that contains it, where transformers does
    not find the class's weights by itself."""
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
        """Return the frames of one temporal unit."""
        return int(getattr(config, self.frames_per_unit)) if self.frames_per_unit else 1

    def joined(self, config: Any, layer: Layer) -> int:
        """Return the patches on a side of one of a layer's tokens."""
        return int(getattr(config, self.merge)) if isinstance(layer, str) else 1

    def width_of(self, config: Any, layer: Layer) -> int:
        """Return the channels of a layer's tokens."""
        if isinstance(layer, str):
            return int(getattr(config, self.merged_width)) * (len(named_layers(layer)) + 1)
        return int(getattr(config, self.width))

    def merged_layers(self, config: Any) -> list[str]:
        """Return the values of `layer` that are no number: merged tokens, if there is a merger."""
        if not self.merge:
            return []
        earlier = getattr(config, self.deepstack) if self.deepstack else ()
        return [MERGED, *([merged_layer(earlier)] if earlier else [])]

    def side_of(self, config: Any) -> int | None:
        """Return the multiple of frames' sides, in pixels, where frames keep a size of their own."""
        if self.merge:
            return int(config.patch_size * getattr(config, self.merge))
        return int(config.patch_size) if self.any_shape else None

    def window_of(self, config: Any) -> int:
        """Return how many frames attend to each other, in whole units; 0 where units are independent."""
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
        encode="model.tower.forward.naflex:encode",
        lay_out="model.tower.forward.naflex:lay_out",
    ),
    TowerKind(
        ("vjepa2",),
        "transformers:VJEPA2Model",
        frames_per_unit="tubelet_size",
        window="frames_per_clip",
        encode="model.tower.forward.vjepa:encode",
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
        encode="model.tower.forward.qwen:encode",
        lay_out="model.tower.forward.qwen:lay_out",
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
        encode="model.tower.forward.qwen:encode",
        lay_out="model.tower.forward.qwen:lay_out",
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
        encode="model.tower.forward.qwen:encode",
        lay_out="model.tower.forward.qwen:lay_out",
        flops=None,
    ),
]

MIXES_FRAMES = (
    "mixes frames, and takes a fixed number of them; use SigLIP, CLIP or DINOv2, or V-JEPA 2 with "
    "loss_weight: 0"
)
OF_TIMM = (
    "is a tower of timm (Perception Encoder and others), not supported here; use SigLIP 2 or DINOv3"
)
OWN_CODE = "is code of its own, which is never run"
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
    "intern_vit": f"{OWN_CODE}; use an InternVL in transformers' form (-hf)",
    "internvl_chat": f"{OWN_CODE}; use an InternVL in transformers' form (-hf)",
}
"""A part of a `model_type` -> why towers of such a type are refused."""


def find_kind(model_type: str) -> TowerKind:
    """Return the row of a `model_type`; UserError says why there is none."""
    for kind in KINDS:
        if model_type in kind.model_types:
            return kind
    # towers that people are likely to ask for get their reason, others the list of what there is
    for part, why in REFUSED.items():
        if part in model_type:
            raise UserError(f"{model_type} {why}")
    known = ", ".join(name for kind in KINDS for name in kind.model_types)
    raise UserError(f"{model_type} is not supported (have {known})")


def has_own_model(config: Mapping[str, Any]) -> bool:
    """Return whether a config.json names code of its folder as its model, as EVA-CLIP's does under the
    `model_type` of CLIP: what transformers has by that name would compute something else."""
    return any(name.startswith("AutoModel") for name in config.get("auto_map") or ())


def mixes_frames(model_type: str) -> bool:
    """Return whether features of a frame depend on later frames, given the tower's `model_type`.

    The frame-causal loss is then refused: its input would hold the target.
    """
    return any(kind.window and model_type in kind.model_types for kind in KINDS)


def frame_flops(config: Mapping[str, Any], patches: int, layer: Layer = -2) -> int | None:
    """Return the FLOPs of encoding one frame, or None where they are not known.

    config: config.json of a tower, or of a model that contains it. patches: of the whole frame. layer:
    the hidden state that is taken, as in `preprocess encode --layer`.
    """
    kind = next((k for k in KINDS if config.get("model_type") in k.model_types), None)
    # merged tokens have passed a merger, which the formula does not count
    if kind is None or kind.flops is None or isinstance(layer, str):
        return None
    try:
        return kind.flops(config.get("vision_config", config), patches, layer)
    except KeyError:
        return None
