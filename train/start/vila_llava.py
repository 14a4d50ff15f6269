"""Reads checkpoints of VILA and LLaVA, their tensors under our names."""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from shards.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


Tensors = dict[str, "Tensor"]
NEWLINE = "image_newline"
LINEARS = {"linear_1.": "0.", "linear_2.": "2."}
"""The layers of transformers' `multi_modal_projector` -> those of an `mlp2x_gelu`."""
LAPE_TABLES = {
    f"{where}_{role}_embeddings.weight": f"{role}_tables.{axis}"
    for axis, where in enumerate(("temporal", "spatial_height", "spatial_width"))
    for role in ("input", "output")
}
"""The names of LLaVA-ST's tables (`llava_arch.py`) -> ours."""


class Parts(NamedTuple):
    """The parts of a stage beside its LLM."""

    made: str
    """The type of its projector."""
    projector: Tensors
    tables: Tensors
    """LLaVA-ST's coordinate tables."""
    others: list[str]
    """Parts that are not used, in words."""
    newline: "Tensor | None" = None
    """LLaVA's `image_newline`, which closes a video."""


def read_vila(folder: Path) -> Parts:
    """Read a VILA stage: `mm_projector/` holds `layers.*`, its config.json the type."""
    from model.llm import read_json, read_tensors

    projector: Tensors = {}
    made = ""
    place = folder / "mm_projector"
    if place.is_dir():
        made = read_json(place / "config.json").get("mm_projector_type", "")
        projector = read_tensors(place, lambda name: name.removeprefix("layers."))
    known = {"llm", "mm_projector", "config.json"}
    others = []
    # all else is named in the log: nothing of a stage is dropped without a word
    for path in sorted(folder.iterdir()):
        if path.name == "vision_tower":
            others.append("vision_tower: the bank's features replace it")
        elif path.name not in known and (path.is_dir() or path.suffix in (".bin", ".safetensors")):
            pickled = ": pickles are not read" if path.suffix == ".bin" else ""
            others.append(f"{path.name}{pickled}")
    return Parts(made, projector, {}, others)


def read_llava(folder: Path) -> Parts:
    """Read a LLaVA checkpoint, of transformers or of LLaVA itself: parts by the names of tensors."""
    from model.llm import read_json, read_tensors

    config = read_json(folder / "config.json")
    ignored: dict[str, int] = {}

    def renamed(name: str) -> str | None:
        # newer transformers put one more level around the parts
        name = name.removeprefix("model.")
        if name.startswith("multi_modal_projector."):
            part = name.removeprefix("multi_modal_projector.")
            for old, new in LINEARS.items():
                part = part.replace(old, new)
            return f"projector.{part}"
        if name.startswith("mm_projector."):
            return name.removeprefix("mm_")
        if name == NEWLINE:
            return name
        if name in LAPE_TABLES:
            return f"lape.{LAPE_TABLES[name]}"
        part = name.partition(".")[0]
        # parts of the LLM are read elsewhere, by its own loader
        if part not in ("language_model", "lm_head", "embed_tokens", "layers", "norm"):
            ignored[part] = ignored.get(part, 0) + 1
        return None

    found = read_tensors(folder, renamed)
    # a projector that is silently new would look like a run from the checkpoint
    if not found.keys() - {NEWLINE}:
        raise UserError(
            f"{folder}: no projector in its *.safetensors (pickled weights are not read); convert "
            "the checkpoint to safetensors"
        )

    def part(name: str) -> Tensors:
        own = {key: value for key, value in found.items() if key.startswith(f"{name}.")}
        return {key.removeprefix(f"{name}."): value for key, value in own.items()}

    made = config.get("mm_projector_type", "mlp2x_gelu")
    # LLaVA's own configs have no such field: their type names GELU
    if "text_config" in config and config.get("projector_hidden_act", "gelu") != "gelu":
        made = f"an mlp2x with {config['projector_hidden_act']}"
    others = [
        f"{name} ({count} tensor{'s' if count > 1 else ''})"
        + (": the bank's features replace it" if name == "vision_tower" else "")
        for name, count in sorted(ignored.items())
    ]
    return Parts(made, part("projector"), part("lape"), others, found.get(NEWLINE))
