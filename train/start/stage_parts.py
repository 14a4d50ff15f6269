"""The parts of a stage beside its LLM, loaded into a fresh model: projector, tables, LLaVA's newline."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shards.errors import UserError
from train.start.pooled import pooled_problem, pools_as
from train.start.vila_llava import Tensors, read_llava, read_vila

if TYPE_CHECKING:
    from model.vlm import VLM

Json = Mapping[str, Any]
LLAVA_TOWERS = (
    ("model.vision_tower.", "vision_tower."),
    ("model.vision_tower.vision_model.", "vision_tower.vision_model."),
)
"""Prefixes of the tower's weights in a LLaVA checkpoint of transformers; the latter as published."""


def load_parts(model: "VLM", kind: str, folder: Path, written: Json) -> list[str]:
    """Load the parts of a VILA or LLaVA stage that fit into a new model; return a line for each part.

    written: its config.json.
    """
    config, features = model.config, model.features
    strides = {config.slow_stride, config.fast_stride}
    pooled = config.pool_after_projector and kind == "llava"
    if pooled and (problem := pooled_problem(written, features)):
        raise UserError(problem, where=folder)
    as_there = kind == "llava" and pools_as(written, config, features, strides)
    made, projector, tables, others, newline = (
        read_vila(folder) if kind == "vila" else read_llava(folder)
    )
    asked, tower = config.mm_projector_type, tower_of(written)
    lines = []
    # -- the projector: it fits only behind the same tower, pooled the same way;
    # each line says what differs
    if not projector:
        lines.append(f"projector: new ({asked}), the stage has none")
    elif made != asked:
        lines.append(
            f"projector: new ({asked}), the stage's is {made}: set mm_projector_type to it"
        )
    else:
        load_weights(
            model.projector,
            projector,
            f"{folder}: projector ({made})",
            f"the bank's tower has width {model.tower_width}; use a bank of the tower that the stage "
            f"was trained with{tower and f' (preprocess encode --tower {tower})'}, or "
            "another mm_projector_type, which starts untrained",
        )
        other = tower and Path(tower).name != Path(model.tower).name
        lines.append(
            f"projector: from the stage ({made}, {len(projector)} tensors); features are pooled "
            + ("as there" if as_there else "before it here, so it has to be tuned again")
            + (
                f"; it was trained behind {tower}, the bank's tower is {model.tower}"
                if other
                else ""
            )
        )
        if as_there and not holds_tower(folder, features["tower_digest"]):
            lines[-1] += (
                f"; the bank's tower, {model.tower}, has other weights than that in the checkpoint, "
                "which vision_tower.save_pretrained of transformers takes out of it"
            )
    # -- what closes a medium: one vector for both, as a video of LLaVA-OneVision ends with image_newline
    closes = newline is not None and config.frame_marks == "media"
    if closes:
        load_newline(model.visual, newline, folder)
        lines.append("visual: media are closed by the stage's image_newline")
    elif newline is not None:
        others = ["image_newline (1 tensor)", *others]
    lines += load_tables(model, folder, tables)
    lines += new_parts(model, but=("visual",) if closes else ())
    return lines + [f"ignored: {other}" for other in others]


def holds_tower(folder: Path, digest: str) -> bool:
    """Return whether the tower in a LLaVA checkpoint of transformers is that of a bank."""
    from model.llm import own_tower_digest

    return any(own_tower_digest(folder, names) == digest for names in LLAVA_TOWERS)


def new_parts(model: "VLM", but: Sequence[str] = ()) -> list[str]:
    """Return a line for each part that no other project's stage has, so that it is new."""
    parts = ["visual"] if model.config.frame_marks != "none" else []
    parts += ["frame_causal"] if model.frame_causal is not None else []
    return [f"{name}: new, the stage has none" for name in parts if name not in but]


def load_qwen(model: "VLM", folder: Path) -> list[str]:
    """Return the lines about a Qwen-VL stage; UserError where the bank is not of its own tower."""
    from model.llm import own_tower_digest

    asked, features = model.config.mm_projector_type, model.features
    if asked != "identity":
        line = (
            f"projector: new ({asked}); merged tokens of its own tower go to the LLM as they are with "
            "mm_projector_type: identity"
        )
    else:
        # not by name: merged tokens of a fine-tuned tower have the same shape and another meaning
        own = own_tower_digest(folder, ("model.visual.", "visual."))
        if features["tower_digest"] != own:
            raise UserError(
                "mm_projector_type identity: its LLM reads the merged tokens of its own tower",
                got=f"a bank of {model.tower} (digest {features['tower_digest'][:12]})",
                expected=f"its own (digest {own[:12]})",
                where=folder,
                fix=f"set bank to one of preprocess encode --tower {folder} --layer {features['layer']} "
                "--stride 1",
            )
        line = (
            "projector: none (identity): the bank holds the merged tokens of the stage's own tower"
        )
        if {model.config.slow_stride, model.config.fast_stride} != {1}:
            line += ", pooled at coarser strides than it was trained with"
    return [line, *load_tables(model, folder, {}), *new_parts(model)]


def load_newline(visual: Any, newline: Any, folder: Path) -> None:
    """Copy a stage's image_newline into the vector that closes each medium."""
    if newline.shape != visual.frame_end.shape:
        raise UserError(
            f"image_newline is {tuple(newline.shape)}, the LLM's width {len(visual.frame_end)}",
            where=folder,
            fix="its config.json is of another model",
        )
    visual.frame_end.data.copy_(newline)


def tower_of(written: Json) -> str:
    """Return the name of the vision tower in a VILA or LLaVA stage's config; empty without one."""
    own = written.get("vision_tower_cfg")
    own = own.get("_name_or_path") if isinstance(own, dict) else own
    return str(written.get("mm_vision_tower") or written.get("vision_tower") or own or "")


def load_tables(model: "VLM", folder: Path, tables: Tensors) -> list[str]:
    """Load LLaVA-ST's coordinate tables; return the lines about them."""
    if model.lape is None:
        return ["ignored: coordinate tables, enable_lape is off"] if tables else []
    if not tables:
        return ["lape: new, the stage has no coordinate tables"]
    if model.lape.preset != "st":
        raise UserError(
            f"{folder}: its coordinate tables are of LAPE preset st (LLaVA-ST), asked "
            f"{model.lape.preset}; set lape_preset: st"
        )
    gamma = {"gamma": model.lape.gamma.detach()}  # LLaVA-ST has none: it is 1
    counts = [len(tables.get(f"input_tables.{axis}", ())) for axis in (0, 1)]
    fix = f"set num_temporal_tokens {counts[0]}, num_spatial_tokens {counts[1]}"
    load_weights(model.lape, tables | gamma, f"{folder}: coordinate tables", fix)
    # what the stage gives needs no measuring; what it lacks still does
    model.calibrated = not model.unmeasured()
    return [f"lape: from the stage, {counts[0]} temporal, {counts[1]} spatial anchors (LLaVA-ST)"]


def load_weights(module: Any, weights: Tensors, what: str, fix: str) -> None:
    """Load a part's weights in fp32, or raise UserError naming each tensor that does not fit."""
    from model.llm import shape_problems

    if wrong := shape_problems(weights, module.state_dict()):
        raise UserError(f"{what}: {'; '.join(wrong)}; {fix}")
    # in fp32, whatever type they were saved in: trained weights are fp32 here
    module.load_state_dict({name: value.float() for name, value in weights.items()})
