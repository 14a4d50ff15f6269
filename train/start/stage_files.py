"""Checks of a stage's files before loading: whether they can be a model at all.

A stage that cannot be loaded is refused in a line within a moment, whatever its size: only config files
and the headers of weight files are read, and no code beside them is ever run.
"""

import importlib.util
import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model.config import read_model_config
from model.family import qwen_vl
from model.fsdp.parts import is_cut
from shards.errors import UserError
from shards.kinds import LFS
from train.settings.packages import installed
from train.start.stage import kind_of, read_config

Json = dict[str, Any]

COPY = "copy or download it again"
LLM = "name a causal LLM, such as Qwen/Qwen2.5-0.5B"
PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.(safetensors|bin)")
TOWERS = re.compile(
    r"(siglip2?|clip|dinov2.*|dinov3.*|vit|deit|beit|eva.*|internvit.*|radio|.*vision(_model)?)$"
)
ENCODERS = re.compile(
    r"(bert|roberta|xlm-roberta|distilbert|albert|electra|deberta(-v2)?|modernbert|mpnet|nomic_bert|"
    r"camembert|ernie|longformer|funnel|squeezebert|xlm|convbert)$"
)
CLASSIFIERS = re.compile(
    r".*For(Sequence|Token|Image)Classification$|.*For(QuestionAnswering|Reward)$"
)
PARTS = {"run": ("", "llm", "llm/lora", "lape"), "vila": ("llm", "mm_projector")}
"""The folders of a stage whose files are read."""
JSON_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
WHOLE = {
    "internvl": ", over a bank of its tower (preprocess encode --tower)",
    "perception_lm": ", over a bank of SigLIP 2 or DINOv3",
    "video_llama_3": ", over a bank of SigLIP 2",
}
"""`model_type` of a vision-language model that is no stage -> a bank that suits an LLM alone instead."""
QUANTISED_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
QUANTISED_TENSOR = re.compile(
    r".*\.(qweight|qzeros|weight_packed|weight_scale(_inv)?|SCB|absmax|quant_map)$"
)
MOST_HEADER = 100_000_000
"""Bytes of a safetensors header, safetensors' own limit; the first 8 bytes of a text read as more."""
QUANTISED_TYPES = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F4")


def stage_problem(stage_path: str) -> str | None:
    """Return in a line why a run cannot start from a stage, None where no reason is found.

    Of a Hub model only the config is read: its weights are not on this machine yet.
    """
    place = Path(stage_path)
    if not place.exists():
        return _config_problem(stage_path, read_config(stage_path) or {})
    if not place.is_dir():
        return f"{place}: a file; name the folder that holds config.json and the weights"
    if problem := _content_problem(place):
        return problem
    kind = kind_of(stage_path)
    if kind in ("run", "vila") and not (place / "llm" / "config.json").exists():
        return f"{place}: its LLM is missing (llm/config.json); {COPY}"
    if kind == "run":
        try:
            read_model_config(place)
        except UserError as error:
            return str(error)
    if (place / "llm" / "lora").is_dir() and not installed("peft"):
        return (
            f"{place}: has a LoRA adapter (llm/lora), and peft is not installed; pip install peft"
        )
    for part in [place / name for name in PARTS.get(kind, ("",)) if (place / name).is_dir()]:
        if problem := _folder_problem(
            part, is_llm=part.name == "llm" or kind in ("llm", "llava", "qwen_vl")
        ):
            return problem
    return None


def model_problem(folder: Path) -> str | None:
    """Return why a trained model's folder cannot be loaded: a file is cut off or missing. Or None."""
    for part in [folder / name for name in PARTS["run"] if (folder / name).is_dir()]:
        problem = _pointer_problem(part) or _json_problem(part)
        if problem := problem or _weights_problem(part, must=_has_weights(part)):
            return problem
    return None


def _has_weights(folder: Path) -> bool:
    """Return whether a part of a trained model is an LLM with weights, not a reference to one."""
    return folder.name == "llm" and not (folder / "base.json").exists()


def _content_problem(place: Path) -> str | None:
    """Return a line on what a folder holds, where that is not a model; else None."""
    if (place / "bank.json").exists() or (place / "plan.json").exists():
        return (
            f"{place}: a bank of features, not a model; give it by --bank, and {LLM} by stage_path"
        )
    if problem := _pointer_problem(place) or _json_problem(place):
        return problem
    if (place / "adapter_config.json").exists():
        return (
            f"{place}: a LoRA adapter (adapter_config.json), not an LLM; merge it first: PeftModel."
            "from_pretrained(llm, adapter).merge_and_unload().save_pretrained(FOLDER), and name FOLDER"
        )
    if (place / "config.json").exists() or (place / "llm" / "config.json").exists():
        return None
    names = {path.name for path in place.iterdir()}
    if names & {"tokenizer.json", "tokenizer_config.json", "tokenizer.model"}:
        return f"{place}: a tokenizer without an LLM; name the folder that holds both"
    if any(name.endswith(".gguf") for name in names):
        return f"{place}: GGUF weights, which are not read; name the LLM's safetensors folder"
    if "params.json" in names:
        return f"{place}: weights in their maker's own form; name their Hugging Face form (config.json)"
    held = ", ".join(sorted(names)[:5]) if names else "nothing"
    return f"{place}: no model here: config.json is missing, the folder holds {held}; {LLM}"


def _folder_problem(folder: Path, *, is_llm: bool) -> str | None:
    """Return what is wrong with a part of a stage: Git LFS pointers, its config, its weights; or None."""
    if problem := _pointer_problem(folder) or _json_problem(folder):
        return problem
    if is_llm and (problem := _config_problem(str(folder), _read(folder / "config.json"))):
        return problem
    for name, method in QUANTISED_FILES.items():
        if is_llm and (folder / name).exists():
            return _quantised(str(folder), method)
    return _weights_problem(folder, must=is_llm and not (folder / "base.json").exists())


def _config_problem(where: str, config: Json) -> str | None:
    """Return why a model of this config cannot be trained here; None if the config shows no reason."""
    inner = config.get("text_config") if isinstance(config.get("text_config"), dict) else {}
    for facts in (config, inner or {}):
        written = facts.get("quantization_config") or facts.get("compression_config")
        if isinstance(written, dict):
            # GPTQ and AWQ say bits, bitsandbytes says which of two loaders
            bits = written.get("bits") or (4 if written.get("load_in_4bit") else None)
            bits = bits or (8 if written.get("load_in_8bit") else None)
            return _quantised(where, str(written.get("quant_method", "")), bits)
    kind, names = str(config.get("model_type", "")), config.get("architectures") or []
    if problem := qwen_vl.config_problem(config):
        return f"{where}: {problem}"
    if kind in WHOLE:
        return (
            f"{where}: a vision-language model ({kind}), whose LLM is not taken out; start "
            f"from an LLM alone ({LLM.removeprefix('name a causal LLM, such as ')}){WHOLE[kind]}"
        )
    if kind.startswith("llava"):
        return None
    if TOWERS.fullmatch(kind) or any(str(name).endswith("VisionModel") for name in names):
        return f"{where}: a vision tower ({kind}), which `preprocess encode --tower` takes; {LLM}"
    if config.get("is_encoder_decoder"):
        return f"{where}: an encoder-decoder ({kind}), not a causal LLM; {LLM}"
    # some encoders can be built as decoders, and their config says so
    if ENCODERS.fullmatch(kind) and not config.get("is_decoder"):
        return f"{where}: an encoder ({kind}), whose tokens see later ones; {LLM}"
    if any(CLASSIFIERS.fullmatch(str(name)) for name in names):
        return f"{where}: a classifier ({names[0]}), whose head writes no text; {LLM}"
    if config.get("auto_map") and not is_known(kind):
        return (
            f"{where}: its model is code in its own folder (auto_map, model_type {kind or 'unnamed'}), "
            "which is never run; take a form of it that transformers itself has, or another LLM"
        )
    return None


def is_known(kind: str) -> bool:
    """Return whether transformers itself has a model type, so that code in a folder is not needed.

    Its tables are read as text, since importing them imports torch.
    """
    spec = importlib.util.find_spec("transformers")
    assert spec is not None
    assert spec.origin is not None
    tables = (Path(spec.origin).parent / "models" / "auto").glob("*.py")
    return any(f'"{kind}"' in table.read_text("utf-8") for table in tables)


def _quantised(where: str, method: str, bits: object = None) -> str:
    size = f", {bits} bits" if bits else ""
    name = f"{method}{size}" if method else f"of another type{size}"
    return (
        f"{where}: its weights are quantised ({name.strip(', ')}), and only unquantised ones can be "
        "trained or trained over; name the model it was made from"
    )


def _json_problem(folder: Path) -> str | None:
    """Return a line where a config's or tokenizer's file is invalid, usually cut off; else None."""
    for path in [folder / name for name in JSON_FILES if (folder / name).exists()]:
        try:
            is_mapping = isinstance(json.loads(path.read_bytes()), dict)
        except ValueError as error:
            return f"{path}: not valid JSON ({error}); {COPY}"
        if not is_mapping:
            return f"{path}: not what a model's {path.name} holds; {COPY}"
    return None


def _pointer_problem(folder: Path) -> str | None:
    """Return a line where Git LFS left pointers in place of files; else None."""
    found = []
    for path in sorted(folder.iterdir()):
        # a pointer has some 130 bytes; weights need not be opened
        if path.is_file() and path.stat().st_size < 1024:
            with open(path, "rb") as file:
                if file.read(len(LFS)) == LFS:
                    found.append(path.name)
    if not found:
        return None
    return (
        f"{folder}: {', '.join(found)}: pointers of Git LFS in place of the files; run `git lfs pull` "
        "there, or download the model again"
    )


def _weights_problem(folder: Path, *, must: bool = False) -> str | None:
    """Return what is wrong with a folder's weight files, or None; must: whether it needs some."""
    names = {path.name for path in folder.iterdir()}
    cut = is_cut(folder)
    # safetensors first, as transformers takes them where a folder has both
    for index, one in (
        ("model.safetensors.index.json", "model.safetensors"),
        ("pytorch_model.bin.index.json", "pytorch_model.bin"),
    ):
        if one in names:
            return _file_problem(folder / one)
        if index in names:
            return _index_problem(folder / index, names)
    parts = [found for name in sorted(names) if (found := PART.fullmatch(name))]
    if parts and not cut:
        stem, _, count, ending = parts[0].groups()
        # the count stands in each name: a missing part is known without the index
        every = {f"{stem}-{k:05d}-of-{count}.{ending}" for k in range(1, int(count) + 1)}
        if lacking := _lacking(every, names):
            return f"{folder}: weights are missing: {lacking}; {COPY}"
        if must:
            return (
                f"{folder}: {stem}.{ending}.index.json is missing, which says which of the {int(count)} "
                f"weight files holds which tensor; {COPY}"
            )
    weights = sorted(name for name in names if name.endswith(".safetensors"))
    for name in weights:
        if problem := _file_problem(folder / name):
            return problem
    if must and not weights:
        return f"{folder}: no weights here (model.safetensors is missing); {COPY}"
    return None


def _index_problem(index: Path, names: set[str]) -> str | None:
    try:
        files = set(json.loads(index.read_bytes())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{index}: not an index of weights; {COPY}"
    if lacking := _lacking(files, names):
        return f"{index.parent}: weights are missing: {lacking}; {COPY}"
    for name in sorted(files):
        if problem := _file_problem(index.parent / name):
            return problem
    return None


def _lacking(wanted: set[str], names: set[str]) -> str:
    lacking = sorted(wanted - names)
    more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
    return ", ".join(lacking[:3]) + more


def _file_problem(path: Path) -> str | None:
    """Return what is wrong with a weight file: cut off, not a weight file, quantised; or None."""
    # since torch 1.6 a file of torch.save is a zip, whose directory stands at
    # its end: cut off, it is none
    if path.suffix != ".safetensors":
        return (
            None
            if zipfile.is_zipfile(path)
            else f"{path}: cut off, or no file of torch.save; {COPY}"
        )
    try:
        header = safetensors_header(path)
    except ValueError as error:
        return f"{path}: {error}; {COPY}"
    for name, facts in header.items():
        if QUANTISED_TENSOR.fullmatch(name) or facts["dtype"] in QUANTISED_TYPES:
            return _quantised(str(path), f"{name} is {facts['dtype']}")
    return None


def safetensors_header(path: Path) -> Mapping[str, Json]:
    """Return a safetensors file's tensor -> dtype, shape, place; ValueError if the file is not whole.

    The format: 8 bytes of the header's length, little-endian; the header, JSON; the tensors' bytes.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if size < 8 or length > MOST_HEADER:
            raise ValueError("not a safetensors file" if size else "empty")
        data = file.read(length)
    try:
        header: dict[str, Json] = json.loads(data)
        header.pop("__metadata__", None)
        ends = [facts["data_offsets"][1] for facts in header.values()]
    except (ValueError, KeyError, TypeError, AttributeError):
        cut = len(data) < length
        raise ValueError("cut off in its header" if cut else "not a safetensors file") from None
    # the header says where the last tensor ends: a download that was cut off is found without reading it
    whole = 8 + length + max(ends, default=0)
    if size != whole:
        raise ValueError(f"cut off, it has {size:,} of {whole:,} bytes")
    return header


def _read(path: Path) -> Json:
    found = json.loads(path.read_bytes()) if path.exists() else {}
    return found if isinstance(found, dict) else {}
