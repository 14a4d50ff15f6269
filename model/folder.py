"""A model folder's files: the LLM in Hugging Face form, the other parts as safetensors.

What is missing, or has another shape than the config says, is refused by name. A checkpoint over an
LLM that is not trained names it in `llm/base.json` instead of holding a copy.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging


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
    llm, found = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, attn_implementation="sdpa", output_loading_info=True
    )
    if found["missing_keys"]:
        raise ValueError(f"{path}: weights are missing: {', '.join(sorted(found['missing_keys']))}")
    return llm


def _load_base(named: LlmBase, named_in: str | Path, base: LlmBase | None) -> Any:
    if base is None:
        base = replace(named, digest=llm_digest(named.path, adapter=named.merged))
    if base.digest != named.digest:
        raise ValueError(
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


def llm_digest(path: str | Path, *, adapter: bool) -> str:
    """Return the sha256 over an LLM's config and weight files, and its adapter's if asked."""
    folder = Path(path)
    if not folder.exists():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        try:
            folder = Path(snapshot_download(str(path), local_files_only=True))
        except (HFValidationError, LocalEntryNotFoundError):
            raise ValueError(
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
        if adapted:
            llm.save_pretrained(path / "lora")
        return
    if not adapted:
        llm.save_pretrained(path)
        return
    base_model = llm.get_base_model()
    own = {
        name.replace(".base_layer", ""): value
        for name, value in base_model.state_dict().items()
        if "lora_" not in name
    }
    base_model.save_pretrained(path, state_dict=own)
    llm.save_pretrained(path / "lora")


def save_weights(module: nn.Module, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    weights = {
        name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()
    }
    save_file(weights, path)


def load_weights(module: nn.Module, path: Path) -> None:
    """Load a part's weights; ValueError lists every tensor that is missing, extra or of another shape."""
    _require(path)
    saved, own = load_file(path), module.state_dict()
    wrong = [
        f"{name} is {tuple(saved[name].shape)}, the config asks for {tuple(own[name].shape)}"
        if name in saved and name in own
        else f"{name} is {'missing' if name in own else 'not in this model'}"
        for name in sorted(set(saved) | set(own))
        if name not in saved or name not in own or saved[name].shape != own[name].shape
    ]
    if wrong:
        raise ValueError(f"{path}: {'; '.join(wrong)}")
    module.load_state_dict(saved)


def read_json(path: Path) -> Any:
    _require(path)
    return json.loads(path.read_text())


def write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n")


def _require(path: Path) -> None:
    if not path.exists():
        raise ValueError(f"{path}: missing; the model folder was copied in part, copy it again")
