"""The vision towers that can be taken, a row each; torch-free, so that training can count their FLOPs.

Add your own tower: a row of `KINDS` below. A vision transformer of transformers whose hidden states
are a CLS token and then the patches, row by row, needs no more than

    TowerKind(("vit",), "transformers:ViTModel", prefix_tokens=1)

and `preprocess encode --tower google/vit-base-patch16-224` banks its features. Its folder holds
config.json, preprocessor_config.json and weights; the processor must make every frame the same patch
grid (or say `merge`). A tower that lets frames see later ones has no place here: the frame-causal
loss would leak.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from shards.errors import UserError

MERGED = "merged"
"""The layer behind a tower's merger: tokens of several patches, as they go to the LLM."""
Layer = int | str
"""Index into a tower's hidden states, -1 the last; or `MERGED`."""


def vit_flops(config: Mapping[str, Any], patches: int, layer: int) -> int:
    """Return the FLOPs of a plain vision transformer on one frame, up to a hidden state.

    Later layers are not computed by a fair competitor, so they are not counted; nor is what comes
    before the patches. Raises KeyError where the config lacks a size.
    """
    width, depth = config["hidden_size"], config["num_hidden_layers"]
    mlp = config.get("intermediate_size") or width * config["mlp_ratio"]
    used = depth + 1 + layer if layer < 0 else layer
    per_layer = patches * (8 * width**2 + 4 * width * mlp + 4 * patches * width)
    return int(used * per_layer + 2 * 3 * config["patch_size"] ** 2 * width * patches)


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
    inside: tuple[str, ...] = ()
    """What the tower's weights are prefixed with in a whole model, as patterns, where transformers does
    not take the class's weights out of it by itself."""
    merged_width: str = ""
    """The field with the channels of a merged token, where there is a merger."""
    encode: str = ""
    """A function of (model, pixels `(frames, 3, height, width)`, layer), as `module:name`, that returns
    `(units, patch_rows, patch_cols, width)`; without one, hidden states are prefix, then patches."""
    flops: Callable[[Mapping[str, Any], int, int], int] | None = vit_flops
    """(config, patches of a frame, layer) -> FLOPs of a frame; None where they are not counted."""

    def frames_of(self, config: Any) -> int:
        """Return how many frames make one unit."""
        return int(getattr(config, self.frames_per_unit)) if self.frames_per_unit else 1

    def joined(self, config: Any, layer: Layer) -> int:
        """Return how many patches on a side make one of what a layer gives."""
        return int(getattr(config, self.merge)) if layer == MERGED else 1

    def side_of(self, config: Any) -> int | None:
        """Return what the sides of a frame are multiples of, where it keeps a size of its own."""
        return int(config.patch_size * getattr(config, self.merge)) if self.merge else None


QWEN_INSIDE = (r"^model\.visual\.", r"^visual\.")

KINDS = [
    # SigLIP 2 of a fixed resolution is published as siglip, too
    TowerKind(("siglip", "siglip_vision_model"), "transformers:SiglipVisionModel"),
    TowerKind(("clip", "clip_vision_model"), "transformers:CLIPVisionModel", prefix_tokens=1),
    TowerKind(("dinov2",), "transformers:Dinov2Model", prefix_tokens=1),
    TowerKind(("dinov2_with_registers",), "transformers:Dinov2WithRegistersModel", prefix_tokens=1),
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
        flops=None,
    ),
]

MIXES_FRAMES = (
    "mixes frames, so the features of a frame would hold later ones and the frame-causal loss would "
    "leak; use SigLIP, CLIP or DINOv2"
)
REFUSED = {
    "siglip2": "(NaFlex) pads the patches of every picture to one length, and is not supported; use a "
    "SigLIP 2 of fixed resolution, whose model type is siglip",
    "vivit": MIXES_FRAMES,
    "videomae": MIXES_FRAMES,
    "timesformer": MIXES_FRAMES,
    "vjepa2": MIXES_FRAMES,
    "xclip": MIXES_FRAMES,
    "internvideo": MIXES_FRAMES,
    "video_llama": MIXES_FRAMES,
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
