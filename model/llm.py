"""A model folder's files: the LLM in Hugging Face form, the other parts as safetensors.

Weights that are missing, or that have another shape than the config says, are refused by name. A
checkpoint over an LLM that is not trained names it in `llm/base.json` instead of holding a copy: a frozen
7B in bfloat16 is 15 GB at each save.
"""

import hashlib
import json
import os
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

from model.adapter.targets import base_state, in_order, saved_name
from model.family.inner import PREFIXES, QWEN_PREFIXES, Prefixes, own_name
from model.family.qwen_vl import INNER, config_problem, inner_config
from model.fsdp.parts import PARTS, is_cut, read_parts
from shards.errors import UserError, first_line

ORIGINAL_LLAVA = {"llava_qwen": "qwen2", "llava_llama": "llama", "llava_mistral": "mistral"}
"""The `model_type` of LLaVA's own checkpoints -> the family of the LLM whose config they extend."""
COPY = "copy or download it again"
VOLATILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")
"""Fields of a tower's config that its features do not depend on."""


@dataclass(frozen=True)
class LlmBase:
    """A reference to an LLM that is not trained, which a checkpoint holds in place of a copy."""

    path: str
    digest: str
    """sha256 of its files, see `llm_digest`."""
    dtype: str
    """The dtype that it had in training: `float32`, `bfloat16`."""
    merged: bool
    """Whether the LoRA adapter in its `lora/` folder was merged into it first."""


def load_llm(
    path: str | Path, dtype: torch.dtype = torch.float32, base: LlmBase | None = None
) -> Any:
    """Load a causal LLM by Hub name or folder, with the LoRA adapter in its `lora/` if it has one.

    base: the present place of the LLM that a checkpoint only names; without it, the place when it was
    written. Raises UserError for a missing weight, which transformers would draw at random, and warn.
    """
    named = read_base(path)
    llm = _load_base(named, path, base) if named else _load_plain(path, dtype)
    # not `llm.to`, which rounds buffers too: rotary frequencies stay fp32
    for weight in llm.parameters():
        weight.data = weight.data.to(dtype)
    if (Path(path) / "lora").exists():
        llm = _load_adapter(llm, Path(path) / "lora")
    return llm


def _load_adapter(llm: Any, folder: Path) -> Any:
    """Return an LLM with a saved adapter; UserError lists each tensor that does not fit."""
    from peft import PeftConfig, get_peft_model

    config = PeftConfig.from_pretrained(folder)
    config.inference_mode, base = False, config.base_model_name_or_path
    llm = in_order(get_peft_model(llm, config))
    llm.peft_config["default"].base_model_name_or_path = base  # as written, wherever it is now
    # not by `PeftModel.from_pretrained`: it renames tensors as the family's published weights are
    # renamed, and what it then does not find (Laguna's shared experts) stays new, with a warning
    live = {saved_name(name): value for name, value in llm.state_dict().items() if "lora_" in name}
    file = folder / "adapter_model.safetensors"
    saved = _read_weights(file)
    if wrong := shape_problems(saved, live):
        raise UserError("; ".join(wrong), where=file)
    for name, value in live.items():
        value.copy_(saved[name])
    return llm


def _load_plain(path: str | Path, dtype: torch.dtype) -> Any:
    logging.disable_progress_bar()  # a bar for each file would hide the run's own lines
    folder = Path(path)
    written = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    kind = written.get("model_type", "")
    if problem := config_problem(written):
        raise UserError(problem, where=path)
    whole = kind in ORIGINAL_LLAVA or (kind.startswith("llava") and "text_config" in written)
    if is_cut(folder):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        llm, found = _filled(_empty(config), read_parts(folder), dtype, folder)
    elif whole or kind in INNER:
        llm, found = _load_inner(folder, written, dtype)
    else:
        try:
            llm, found = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=dtype,
                output_loading_info=True,
                trust_remote_code=False,  # unset, transformers asks on the terminal
            )
        except SafetensorError as error:
            raise UserError(f"its weights do not read ({error})", where=path, fix=COPY) from None
        except ValueError as error:  # many lines, for a model that is no causal LLM
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
    # transformers draws them at random and only warns
    if found["missing_keys"]:
        raise UserError(f"{path}: weights are missing: {', '.join(sorted(found['missing_keys']))}")
    if not isinstance(llm.get_input_embeddings(), nn.Embedding):
        raise UserError(
            f"not an LLM of text: {type(llm).__name__} has no single embedding table", where=path
        )
    return llm


def _load_inner(folder: Path, written: Any, dtype: torch.dtype) -> tuple[Any, Any]:
    """Return the causal LLM inside a vision-language model, and transformers' loading report."""
    if any(part.get("quantization_config") for part in (written, written.get("text_config") or {})):
        raise UserError(
            "its weights are quantised, and only unquantised ones can be trained or trained over",
            where=folder,
            fix="name the model it was made from",
        )
    prefixes: Prefixes
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

    empty = _empty(config)
    own = empty.state_dict()

    def renamed(name: str) -> str | None:
        return own_name(name, prefixes, own, folder)

    # not by `key_mapping`, which renames the weights back when they are saved
    llm, found = _filled(empty, read_tensors(folder, renamed), dtype, folder)
    llm.name_or_path = llm.config._name_or_path = str(folder)
    return llm, found


def _empty(config: Any) -> Any:
    """Return a causal LLM without weights."""
    # only for its class and names: on "meta" it takes no memory and no time
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _filled(
    empty: Any, weights: dict[str, Tensor], dtype: torch.dtype, folder: Path
) -> tuple[Any, Any]:
    """Return an empty LLM with weights under its own names, and transformers' loading report."""
    own = empty.state_dict()
    wrong = shape_problems(weights, {name: own[name] for name in own if name in weights})
    if wrong:
        raise UserError(f"{folder}: {'; '.join(wrong)}; its config.json is of another model")
    llm, found = type(empty).from_pretrained(
        None,
        config=empty.config,
        state_dict=weights,
        dtype=dtype,
        output_loading_info=True,
    )
    return llm, found


def read_tensors(folder: Path, rename: Callable[[str], str | None]) -> dict[str, Tensor]:
    """Return the tensors of a folder's safetensors files under new names.

    rename: old name -> new name, None to leave a tensor out. Raises UserError for an unreadable file.
    """
    out: dict[str, Tensor] = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt", device="cpu") as saved:
                for name in saved.keys():  # noqa: SIM118 - a safetensors file is not iterable
                    new = rename(name)
                    if new is not None:
                        out[new] = saved.get_tensor(name)
        except SafetensorError as error:
            raise UserError(f"its weights do not read ({error})", where=file, fix=COPY) from None
    return out


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that a folder's weights are in, as transformers chooses them.

    Parts of another number, which an earlier save left there, are none of them.
    """
    if (whole := folder / "model.safetensors").exists():
        return [whole]
    if (index := folder / "model.safetensors.index.json").exists():
        return [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    return sorted(folder.glob("*.safetensors"))


def _load_base(named: LlmBase, named_in: str | Path, base: LlmBase | None) -> Any:
    if base is None:
        base = replace(named, digest=llm_digest(named.path, adapter=named.merged))
    # the same path may hold another model today: weights trained over one mean nothing over the other
    if base.digest != named.digest:
        raise UserError(
            f"{base.path}: not the LLM that {named_in} was trained over (digest {base.digest[:12]}, "
            f"expected {named.digest[:12]}: {named.path}); restore that one, or name it by stage_path"
        )
    dtype = getattr(torch, base.dtype)
    if base.merged:
        # merged once more in the dtype of training, since sums in another dtype round to other weights
        return load_llm(base.path, dtype).merge_and_unload()
    return _load_plain(base.path, dtype)


def read_base(path: str | Path) -> LlmBase | None:
    """Return the LLM that an `llm/` folder refers to; None where it holds weights itself."""
    file = Path(path) / "base.json"
    return LlmBase(**read_json(file)) if file.exists() else None


def base_of(path: str | Path, dtype: torch.dtype, *, merged: bool) -> LlmBase:
    """Return the reference to an LLM (a folder or Hub name) that stands in for its weights.

    dtype: of the LLM in training. merged: whether its adapter was merged into it.
    """
    named, kind = read_base(path), str(dtype).removeprefix("torch.")
    if named is not None and not merged:
        # weights that were once rounded to bfloat16 stay so when they are loaded as float32
        return named if kind == "float32" else replace(named, dtype=kind)
    # an absolute path: a resumed run may start from another working directory
    place = str(Path(path).resolve()) if Path(path).exists() else str(path)
    return LlmBase(place, llm_digest(path, adapter=merged), kind, merged)


def tower_digest(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> str:
    """Return blake2b (16 bytes, hex) over a vision tower's configuration and weights, sorted by name."""
    kept = {key: value for key, value in config.items() if key not in VOLATILE}
    total = hashlib.blake2b(json.dumps(kept, sort_keys=True, default=str).encode(), digest_size=16)
    # by name: the order of tensors depends on how files were split and saved
    for name, weight in sorted(weights.items()):
        total.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        total.update(weight.detach().cpu().contiguous().numpy().data)
    return total.hexdigest()


def own_tower_digest(folder: Path, prefixes: Sequence[str]) -> str:
    """Return the digest of the tower in a vision-language model's folder, equal to that in its bank.

    prefixes: possible beginnings of its weights' names. Its weights are taken in fp32, as they are when
    a bank is encoded.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False).vision_config

    def renamed(name: str) -> str | None:
        return next((name[len(p) :] for p in prefixes if name.startswith(p)), None)

    weights = {name: value.float() for name, value in read_tensors(folder, renamed).items()}
    return tower_digest(config.to_dict(), weights)


def llm_digest(path: str | Path, *, adapter: bool) -> str:
    """Return the sha256 over an LLM's config and weight files, with its adapter's if `adapter`.

    path: a folder, or a Hub name that is in the local cache; UserError where neither is found.
    """
    folder = Path(path)
    if not folder.exists():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        try:
            # the cache alone: a digest must be that of what was trained over, not
            # of what is published today
            folder = Path(snapshot_download(str(path), local_files_only=True))
        except (HFValidationError, LocalEntryNotFoundError):
            raise UserError(
                f"{path}: no LLM here any more; give its new place by stage_path, or use the output "
                "folder of the finished run, which is complete by itself"
            ) from None
    index = folder / "model.safetensors.index.json"
    shards = set(read_json(index)["weight_map"].values()) if index.exists() else ()
    names = [*shards, "config.json", "model.safetensors", "pytorch_model.bin", "base.json"]
    files = [folder / name for name in names if (folder / name).exists()]
    files += folder.glob(PARTS)
    if adapter:
        files += [path for path in (folder / "lora").iterdir() if path.is_file()]
    whole = hashlib.sha256()
    for file in sorted(files):
        with open(file, "rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        whole.update(f"{file.relative_to(folder).as_posix()} {digest}\n".encode())
    return whole.hexdigest()


def save_llm(llm: Any, path: Path, base: LlmBase | None = None) -> None:
    """Save an LLM so that transformers alone can load it, an adapter in `lora/` beside the weights.

    With `base`, its weights are not written but referred to by `base.json`.
    """
    adapted = hasattr(llm, "peft_config")
    if base is not None:
        save_reference(llm, path, base)
    elif not adapted:
        llm.save_pretrained(path)
    else:
        base_model = llm.get_base_model()
        base_model.save_pretrained(path, state_dict=base_state(base_model.state_dict()))
    if adapted:
        llm.save_pretrained(path / "lora")
    for file in path.rglob("*.safetensors"):
        open_as_folder(file)


def save_reference(llm: Any, path: Path, base: LlmBase) -> None:
    """Write an LLM's config, and where its weights are."""
    path.mkdir(parents=True)
    write_json(path / "base.json", asdict(base))
    llm.config.save_pretrained(path)


def open_as_folder(file: Path) -> None:
    """Give a file its folder's read and write permissions: safetensors writes for the owner alone."""
    file.chmod(file.parent.stat().st_mode & 0o666)


def save_weights(state: Mapping[str, Tensor], path: Path) -> None:
    """Write a module's state as a safetensors file, making its folder if needed."""
    path.parent.mkdir(exist_ok=True)
    weights = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    save_file(weights, path)
    open_as_folder(path)


def load_weights(module: nn.Module, path: Path) -> None:
    """Load a module's weights; UserError lists each tensor that is missing, extra or of another shape."""
    saved = _read_weights(path)
    if wrong := shape_problems(saved, module.state_dict()):
        raise UserError(f"{path}: {'; '.join(wrong)}")
    module.load_state_dict(saved)


def _read_weights(path: Path) -> dict[str, Tensor]:
    _require(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"its weights do not read ({error})", where=path, fix=COPY) from None


def shape_problems(saved: dict[str, Tensor], own: dict[str, Tensor]) -> list[str]:
    """Return a line for each tensor that only one of the two has, or whose shapes differ."""
    return [
        f"{name} is {tuple(saved[name].shape)}, the config asks for {tuple(own[name].shape)}"
        if name in saved and name in own
        else f"{name} is {'missing' if name in own else 'not in this model'}"
        for name in sorted(set(saved) | set(own))
        if name not in saved or name not in own or saved[name].shape != own[name].shape
    ]


def read_json(path: Path) -> Any:
    """Return the content of a model folder's JSON file; UserError where it is missing."""
    _require(path)
    return json.loads(path.read_text())


def write_json(path: Path, data: Any) -> None:
    """Write a model folder's JSON file, its keys sorted, whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n")
    os.replace(temporary, path)


def _require(path: Path) -> None:
    if not path.exists():
        raise UserError(f"{path}: missing; the model folder was copied in part; copy all of it")
