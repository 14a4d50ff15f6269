"""A model folder's files: the LLM in Hugging Face form, the other parts as safetensors.

What is missing, or has another shape than the config says, is refused by name. A checkpoint over an
LLM that is not trained names it in `llm/base.json` instead of holding a copy.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from model.family.qwen_vl import INNER, config_problem, inner_config
from shards.errors import UserError, first_line

ORIGINAL_LLAVA = {"llava_qwen": "qwen2", "llava_llama": "llama", "llava_mistral": "mistral"}
"""The `model_type` of LLaVA's own checkpoints -> the family of the LLM that lies flat in them."""
COPY = "copy or download it again"
VOLATILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")
"""Of a tower's config: what says nothing of its features."""
PREFIXES = (("language_model.", ""), ("model.language_model.", "model."), ("lm_head.", "lm_head."))
"""How the LLM's weights begin in a LLaVA checkpoint of transformers, older and newer, and alone."""
QWEN_PREFIXES = (
    ("model.language_model.", "model."),
    ("model.", "model."),
    ("lm_head.", "lm_head."),
)
"""In a Qwen-VL checkpoint, as transformers names them inside and as they are published."""


@dataclass(frozen=True)
class LlmBase:
    """An LLM that is not trained, lying elsewhere: what a checkpoint names in place of a copy."""

    path: str
    digest: str
    """Of its files, see `llm_digest`."""
    dtype: str
    """Which it was trained over in: `float32`, `bfloat16`."""
    merged: bool
    """Whether the adapter that lies beside it was merged into it."""


def load_llm(
    path: str | Path, dtype: torch.dtype = torch.float32, base: LlmBase | None = None
) -> Any:
    """Load a causal LLM by hub name or folder, with its LoRA adapter where one lies inside.

    base: where the LLM lies now that a checkpoint only names, [as when it was written]. A weight that
    is not there is refused: transformers would draw it at random and warn.
    """
    named = read_base(path)
    llm = _load_base(named, path, base) if named else _load_plain(path, dtype)
    for weight in llm.parameters():  # not `llm.to`: the buffers of rotary positions stay fp32
        weight.data = weight.data.to(dtype)
    if (Path(path) / "lora").exists():
        from peft import PeftModel

        llm = PeftModel.from_pretrained(llm, Path(path) / "lora", is_trainable=True)
    return llm


def _load_plain(path: str | Path, dtype: torch.dtype) -> Any:
    logging.disable_progress_bar()  # its bar for every file drowns the run's own lines
    folder = Path(path)
    written = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    kind = written.get("model_type", "")
    if problem := config_problem(written):
        raise UserError(problem, where=path)
    whole = kind in ORIGINAL_LLAVA or (kind.startswith("llava") and "text_config" in written)
    if whole or kind in INNER:
        llm, found = _load_inner(folder, written, dtype)
    else:
        try:
            llm, found = AutoModelForCausalLM.from_pretrained(
                # else it asks on the terminal whether a folder's own code may run
                path,
                dtype=dtype,
                output_loading_info=True,
                trust_remote_code=False,
            )
        except SafetensorError as error:
            raise UserError(f"its weights do not read ({error})", where=path, fix=COPY) from None
        except ValueError as error:  # of many lines where the model is of another sort
            if "trust_remote_code" in str(error):
                raise UserError(
                    "its model is code of its own, which is never run",
                    where=path,
                    fix="take a form of it that transformers itself has, or another LLM",
                ) from None
            reason = first_line(error).partition(" for this kind of")[0]
            raise UserError(
                f"{path}: not a causal LLM, nor a LLaVA checkpoint that holds one, nor a Qwen-VL one: "
                f"{reason}"
            ) from None
    if found["missing_keys"]:
        raise UserError(f"{path}: weights are missing: {', '.join(sorted(found['missing_keys']))}")
    if not isinstance(llm.get_input_embeddings(), nn.Embedding):
        raise UserError(
            f"not an LLM of text: {type(llm).__name__} has no one table of words", where=path
        )
    return llm


def _load_inner(folder: Path, written: Any, dtype: torch.dtype) -> tuple[Any, Any]:
    """Return the causal LLM inside a whole model, and transformers' report of what it lacks."""
    if any(part.get("quantization_config") for part in (written, written.get("text_config") or {})):
        raise UserError(
            "its weights are quantised, and only whole ones can be trained or trained over",
            where=folder,
            fix="name the model that it was made of",
        )
    prefixes: tuple[tuple[str, str], ...]
    if written["model_type"] in INNER:
        whole = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        config = AutoConfig.for_model(INNER[written["model_type"]], **inner_config(whole, written))
        prefixes = QWEN_PREFIXES
    elif written["model_type"] in ORIGINAL_LLAVA:
        facts = {k: v for k, v in written.items() if k not in ("model_type", "architectures")}
        config = AutoConfig.for_model(ORIGINAL_LLAVA[written["model_type"]], **facts)
        prefixes = QWEN_PREFIXES[1:]
    else:
        config, prefixes = (
            AutoConfig.from_pretrained(folder, trust_remote_code=False).text_config,
            PREFIXES,
        )

    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    own = empty.state_dict()

    def renamed(name: str) -> str | None:
        names = (to + name[len(old) :] for old, to in prefixes if name.startswith(old))
        return next((new for new in names if new in own), None)

    weights = read_tensors(folder, renamed)
    wrong = shape_problems(weights, {name: own[name] for name in own if name in weights})
    if wrong:
        raise UserError(f"{folder}: {'; '.join(wrong)}; its config.json is of another model")
    # not by `key_mapping`, which would name the weights the old way again when they are saved
    llm, found = type(empty).from_pretrained(
        None,
        config=config,
        state_dict=weights,
        dtype=dtype,
        output_loading_info=True,
    )
    llm.name_or_path = llm.config._name_or_path = str(folder)
    return llm, found


def read_tensors(folder: Path, rename: Callable[[str], str | None]) -> dict[str, Tensor]:
    """Return the tensors of a folder's safetensors files under their new names; None leaves one out."""
    out: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt", device="cpu") as saved:
                for name in saved.keys():  # noqa: SIM118 - it is no mapping
                    new = rename(name)
                    if new is not None:
                        out[new] = saved.get_tensor(name)
        except SafetensorError as error:
            raise UserError(f"its weights do not read ({error})", where=file, fix=COPY) from None
    return out


def _load_base(named: LlmBase, named_in: str | Path, base: LlmBase | None) -> Any:
    if base is None:
        base = replace(named, digest=llm_digest(named.path, adapter=named.merged))
    if base.digest != named.digest:
        raise UserError(
            f"{base.path}: not the LLM that {named_in} was trained over (digest {base.digest[:12]}, "
            f"expected {named.digest[:12]}: {named.path}); put that one back, or name it by stage_path"
        )
    dtype = getattr(torch, base.dtype)
    if base.merged:
        return load_llm(base.path, dtype).merge_and_unload()
    return _load_plain(base.path, dtype)


def read_base(path: str | Path) -> LlmBase | None:
    """Return what an `llm/` folder names in place of weights, None where it holds them itself."""
    file = Path(path) / "base.json"
    return LlmBase(**read_json(file)) if file.exists() else None


def base_of(path: str | Path, dtype: torch.dtype, *, merged: bool) -> LlmBase:
    """Return how to name an LLM, a folder or a Hub name, in place of a copy of its weights."""
    named, kind = read_base(path), str(dtype).removeprefix("torch.")
    if named is not None and not merged:
        return named if kind == "float32" else replace(named, dtype=kind)  # rounded is rounded
    lies = str(Path(path).resolve()) if Path(path).exists() else str(path)
    return LlmBase(lies, llm_digest(path, adapter=merged), kind, merged)


def tower_digest(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> str:
    """Return blake2b over a vision tower's configuration and weights, in order of name."""
    kept = {key: value for key, value in config.items() if key not in VOLATILE}
    total = hashlib.blake2b(json.dumps(kept, sort_keys=True, default=str).encode(), digest_size=16)
    for name, weight in sorted(weights.items()):
        total.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        total.update(weight.detach().cpu().contiguous().numpy().data)
    return total.hexdigest()


def own_tower_digest(folder: Path, prefixes: Sequence[str]) -> str:
    """Return the digest of the tower in a whole model's folder, as a bank of it names it.

    prefixes: what the names of its weights begin with.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False).vision_config

    def renamed(name: str) -> str | None:
        return next((name[len(p) :] for p in prefixes if name.startswith(p)), None)

    weights = {name: value.float() for name, value in read_tensors(folder, renamed).items()}
    return tower_digest(config.to_dict(), weights)


def llm_digest(path: str | Path, *, adapter: bool) -> str:
    """Return the sha256 over an LLM's config and weight files, and its adapter's if asked."""
    folder = Path(path)
    if not folder.exists():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        try:
            folder = Path(snapshot_download(str(path), local_files_only=True))
        except (HFValidationError, LocalEntryNotFoundError):
            raise UserError(
                f"{path}: no LLM here any more; name where it lies now by stage_path, or use the "
                "output folder of the finished run, which is complete by itself"
            ) from None
    index = folder / "model.safetensors.index.json"
    shards = set(read_json(index)["weight_map"].values()) if index.exists() else ()
    names = [*shards, "config.json", "model.safetensors", "pytorch_model.bin", "base.json"]
    files = [folder / name for name in names if (folder / name).exists()]
    if adapter:
        files += [path for path in (folder / "lora").iterdir() if path.is_file()]
    whole = hashlib.sha256()
    for file in sorted(files):
        with open(file, "rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        whole.update(f"{file.relative_to(folder).as_posix()} {digest}\n".encode())
    return whole.hexdigest()


def save_llm(llm: Any, path: Path, base: LlmBase | None = None) -> None:
    """Save an LLM so that transformers alone loads it; an adapter lies beside it in `lora/`.

    With `base` only what that LLM lacks is written, and where it lies.
    """
    adapted = hasattr(llm, "peft_config")
    if base is not None:
        path.mkdir(parents=True)
        write_json(path / "base.json", asdict(base))
        llm.config.save_pretrained(path)
    elif not adapted:
        llm.save_pretrained(path)
    else:
        base_model = llm.get_base_model()
        own = {
            name.replace(".base_layer", ""): value
            for name, value in base_model.state_dict().items()
            if "lora_" not in name
        }
        base_model.save_pretrained(path, state_dict=own)
    if adapted:
        llm.save_pretrained(path / "lora")
    for file in path.rglob("*.safetensors"):
        open_as_folder(file)


def open_as_folder(file: Path) -> None:
    """Let those read a file who may read its folder: safetensors writes for the owner alone."""
    file.chmod(file.parent.stat().st_mode & 0o666)


def check_adapter(llm: Any, rank: int, alpha: int) -> None:
    """Raise UserError where an LLM's LoRA adapter is of another rank or scale than is asked."""
    made = llm.peft_config["default"]
    if (made.r, made.lora_alpha) != (rank, alpha):
        raise UserError(
            f"the adapter that the run starts from has lora_r {made.r}, lora_alpha {made.lora_alpha}",
            expected=f"lora_r {rank}, lora_alpha {alpha}",
            fix=f"set lora_r: {made.r} and lora_alpha: {made.lora_alpha}, or merge it first: "
            "python -m train.export hf RUN OUT --merge_lora",
        )


def save_weights(module: nn.Module, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    weights = {
        name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()
    }
    save_file(weights, path)
    open_as_folder(path)


def load_weights(module: nn.Module, path: Path) -> None:
    """Load a part's weights; UserError lists every tensor that is missing, extra or of another shape."""
    _require(path)
    try:
        saved, own = load_file(path), module.state_dict()
    except SafetensorError as error:
        raise UserError(f"its weights do not read ({error})", where=path, fix=COPY) from None
    wrong = shape_problems(saved, own)
    if wrong:
        raise UserError(f"{path}: {'; '.join(wrong)}")
    module.load_state_dict(saved)


def shape_problems(saved: dict[str, Tensor], own: dict[str, Tensor]) -> list[str]:
    """Return a line for each tensor that only one of the two has, or that has another shape."""
    return [
        f"{name} is {tuple(saved[name].shape)}, the config asks for {tuple(own[name].shape)}"
        if name in saved and name in own
        else f"{name} is {'missing' if name in own else 'not in this model'}"
        for name in sorted(set(saved) | set(own))
        if name not in saved or name not in own or saved[name].shape != own[name].shape
    ]


def read_json(path: Path) -> Any:
    _require(path)
    return json.loads(path.read_text())


def write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n")


def _require(path: Path) -> None:
    if not path.exists():
        raise UserError(f"{path}: missing; the model folder was copied in part, copy it again")
