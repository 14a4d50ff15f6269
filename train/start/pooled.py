"""Checks that frames' features become tokens here as in the checkpoint that a run starts from.

LLaVA-OneVision pools bilinearly after its projector (`pool_after_projector`); LLaVA-NeXT-Video pools
before it, as a bank's strides do. Anything else is refused by name, or reported as a difference.
"""

from collections.abc import Collection, Mapping
from typing import Any

from model.config import JOINED, ModelSettings
from model.tower_kinds import merged_layer, mixes_frames

Json = Mapping[str, Any]
NESTING = ("average", "bilinear")
"""Pool modes whose grids at twice the stride have half the cells, rounded up."""
AFTER = "pool_after_projector"
LAYERS = {"llava_onevision": (-1, "full"), "llava_next_video": (-2, "default")}
"""`model_type` -> default layer of the tower and default selection of patches, as in transformers."""
CLS = ("clip_vision_model",)
"""Towers with a CLS token before their patches, which the selection `default` leaves out."""


def tokens_problem(settings: ModelSettings, features: Json, strides: Collection[int]) -> str | None:
    """Return why a bank's features cannot become tokens by these settings; None if they can.

    features: from `FeatureConfig.to_json`. strides: those that are read.
    """
    if settings.loss_weight > 0 and mixes_frames(str(features.get("tower_type"))):
        return (
            f"loss_weight {settings.loss_weight:g}: frames of the bank's tower "
            f"({features['tower_type']}) see later ones, so the input of the frame-causal loss would "
            "hold its target; set loss_weight: 0, or bank features of a tower that encodes frames one by "
            "one, such as SigLIP"
        )
    if settings.mm_projector_type == "identity" and isinstance(features.get("layer"), int):
        return (
            f"mm_projector_type identity: takes a tower's merged tokens as they are, and the bank holds "
            f"layer {features.get('layer')}; set bank to one of preprocess encode --tower CHECKPOINT "
            "--layer merged --stride 1, or take another mm_projector_type"
        )
    if not settings.pool_after_projector:
        return None
    if settings.mm_projector_type in JOINED:
        return (
            f"{AFTER}: {settings.mm_projector_type} joins cells itself; leave {AFTER} out, or use "
            "mlp2x_gelu"
        )
    # bilinear pooling to ceil(n / 2) cells has to start from all patches; a mode
    # that rounds down loses a row
    if features.get("pool") not in NESTING and set(strides) != {1}:
        return (
            f"{AFTER}: the bank's pool mode is {features.get('pool')}, whose coarser grids leave "
            "patches out; read stride 1 alone, or encode with --pool average"
        )
    return None


def deepstack_problem(
    settings: ModelSettings, layers: Collection[int], features: Json
) -> str | None:
    """Return why a bank does not hold exactly the layers that an LLM takes of its tower, or None.

    layers: of the tower, whose features the LLM adds at its first layers (DeepStack); usually none.
    """
    # a projector takes whatever layer is banked; only `identity` hands on the tower's own tokens
    if settings.mm_projector_type != "identity":
        return None
    held, needed = features.get("layer"), merged_layer(layers)
    if held != needed:
        what = (
            f"adds features of the layers {', '.join(map(str, layers))} of its tower (DeepStack)"
            if layers
            else "takes merged tokens alone"
        )
        return (
            f"mm_projector_type identity: its LLM {what}, and the bank holds layer {held}; set bank to "
            f"one of preprocess encode --tower CHECKPOINT --layer {needed} --stride 1, or take another "
            "mm_projector_type, which starts untrained"
        )
    if layers and settings.pool_after_projector:
        return f"{AFTER}: what DeepStack adds would not be pooled; leave it out"
    return None


def pooled_problem(written: Json, features: Json) -> str | None:
    """Return why a LLaVA checkpoint does not pool 2x2 bilinearly after its projector; None if it does.

    written: its config.json.
    """
    kind = written.get("model_type")
    if kind == "llava_next_video":
        mode, stride = pooling_before(written)
        return (
            f"{AFTER}: LLaVA-NeXT-Video pools before its projector; leave it out, and set bank to one of "
            f"preprocess encode --stride {stride} --pool {mode or 'average_floor'}"
        )
    if kind != "llava_onevision":
        return (
            f"{AFTER}: how {kind} pools is not known to be bilinear over 2x2; leave it out, or take the "
            "checkpoint in transformers' form of LLaVA-OneVision"
        )
    if problem := features_problem(written, features):
        return f"{AFTER}: {problem}"
    return None


def features_problem(written: Json, features: Json) -> str | None:
    """Return why a bank's features differ from those that a LLaVA checkpoint of transformers takes."""
    kind, vision = str(written.get("model_type")), written.get("vision_config") or {}
    layer, select = LAYERS[kind]
    # configs leave out what is transformers' default
    layer = written.get("vision_feature_layer", layer)
    select = written.get("vision_feature_select_strategy", select)
    tower = vision.get("model_type", "")
    if isinstance(layer, list):
        return (
            f"it joins the layers {', '.join(map(str, layer))} of its tower, and a bank holds one"
        )
    if features.get("layer") != layer:
        return (
            f"it reads layer {layer} of its tower, and the bank holds layer {features.get('layer')}; "
            f"encode with --layer {layer}"
        )
    # `default` drops the first token: of CLIP that is CLS, of SigLIP a patch
    if (select == "default") != (tower in CLS):
        return (
            f"its vision_feature_select_strategy {select} does not take just the patches of {tower}"
        )
    if features.get("tower_type") != tower:
        return f"its tower is a {tower}, the bank's a {features.get('tower_type')}"
    if (act := written.get("projector_hidden_act", "gelu")) != "gelu":
        return f"its projector's layers have {act} between them, and mlp2x_gelu has gelu"
    size, made = vision.get("image_size"), features.get("processor", {})
    sides = list(made.get("crop") or (made.get("height"), made.get("width")))
    if size is not None and sides != [size, size]:
        return f"its tower reads {size}x{size} pixels, the bank's {sides[0]}x{sides[1]}"
    return None


def pooling_before(written: Json) -> tuple[str | None, int]:
    """Return the pool mode (None if a bank has no such mode) and stride of LLaVA-NeXT-Video's pooling."""
    modes = {"average": "average_floor", "max": "max"}
    mode = modes.get(written.get("spatial_pool_mode", "average"))
    return mode, int(written.get("spatial_pool_stride", 2))


def pools_as(
    written: Json, settings: ModelSettings, features: Json, strides: Collection[int]
) -> bool:
    """Return whether tokens are made exactly as a LLaVA checkpoint of transformers makes a video's."""
    kind = written.get("model_type")
    if kind not in LAYERS or features_problem(written, features):
        return False
    if kind == "llava_onevision":
        return settings.pool_after_projector and set(strides) == {1}
    mode, stride = pooling_before(written)
    return (
        not settings.pool_after_projector
        and features.get("pool") == mode
        and set(strides) == {stride}
    )
