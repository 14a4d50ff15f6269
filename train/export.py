"""Exports a trained model: `hf` writes a folder whose LLM transformers alone can load.

    python -m train.export hf runs/a out/a --merge_lora

OUT is a model folder too (`VLM.load`, train/ask.py, train/evaluate.py), with a README.md that lists its
files and the parts that other trainers would drop.
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.config import read_model_config
from shards.errors import UserError, naming
from train.settings.exits import command
from train.settings.output import folder_problem
from train.settings.recorded import token_limit, trained_with
from train.start.stage_files import model_problem

if TYPE_CHECKING:
    from model.vlm import VLM

DTYPES = ("float32", "bfloat16", "float16")


@command
def main(argv: list[str]) -> None:
    args = arguments().parse_args(argv)
    export(args.run, args.out, merge_lora=args.merge_lora, dtype=args.dtype)
    print(f"written: {args.out}, see {args.out / 'README.md'}")  # noqa: T201


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("form", choices=("hf",), help="the form to write: Hugging Face folders")
    parser.add_argument("run", type=Path, help="a run's folder or a checkpoint-N")
    parser.add_argument("out", type=Path, help="where to write; new or empty")
    parser.add_argument(
        "--merge_lora", action="store_true", help="add the LoRA adapter to the LLM's weights"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of the LLM's weights [float32]"
    )
    return parser


def export(run: Path, out: Path, *, merge_lora: bool = False, dtype: str = "float32") -> None:
    """Write a run's model so that transformers alone loads its LLM; UserError if it cannot be."""
    read_model_config(run)
    if problem := model_problem(run) or folder_problem(out):
        raise UserError(problem)
    if out.exists() and any(out.iterdir()):
        raise UserError("not empty", where=out, fix="name a new folder")
    adapted = (run / "llm" / "lora").exists()
    if merge_lora and not adapted:
        raise UserError("has no LoRA adapter", where=run, fix="leave out --merge_lora")

    import torch

    from model.vlm import VLM

    # everything that can be refused is refused above: this takes the memory of the whole model
    model = VLM.load(run)
    if merge_lora:
        model.llm = model.llm.merge_and_unload()
    # the LLM alone: the parts beside it are small, and stay fp32
    for weight in model.llm.parameters():
        weight.data = weight.data.to(getattr(torch, dtype))
    # an export has no run.json: its README says how long records were
    limit = token_limit(trained_with(run) or {})
    # beside the target, so that the renaming stays on one disk
    aside = out.resolve().with_name(f"{out.resolve().name}.tmp")  # renamed once it is complete
    shutil.rmtree(aside, ignore_errors=True)
    try:
        with naming(out):
            model.save(aside)
            page = readme(model, adapter=adapted and not merge_lora, limit=limit)
            (aside / "README.md").write_text(page)
            os.replace(aside, out.resolve())
    except BaseException:
        # nothing of it is continued, and it may be what fills the disk
        shutil.rmtree(aside, ignore_errors=True)
        raise


def readme(model: "VLM", *, adapter: bool, limit: int) -> str:  # long: it is the page itself
    """Return the README.md of an exported folder; limit: tokens of a record in training."""
    config, features = model.config, model.features
    rows = model.llm.get_input_embeddings().num_embeddings
    with_adapter = (
        "\nThe LLM's weights are those it was trained over; the trained adapter is beside\n"
        'them: `PeftModel.from_pretrained(llm, "llm/lora")`, or export again with `--merge_lora`.\n'
    )
    coordinates = (
        "\nThe whole model reads and writes coordinate tokens from id "
        f"{model.lape.tokens.all_ids[0]} on. Their vectors are the tables in `lape/`,\n"
        f"none of the LLM's {rows} rows, and `VLM.load` adds them to the tokenizer in `llm/`, which\n"
        "does not hold them: alone, the LLM can neither read nor write them.\n"
        if model.lape
        else ""
    )
    files = {
        "llm/": "the LLM and its tokenizer, in Hugging Face form",
        "projector.safetensors": f"{config.mm_projector_type}: pooled tower features -> LLM width",
        "visual.safetensors": "the vector that closes a frame, and one per stream (slow, fast); "
        f"frame_marks: {config.frame_marks}",
        "lape/": "six coordinate tables, gamma, and the ids of their tokens",
        "frame_causal.safetensors": "the frame predictor; only its loss needs it",
        "config.json": "settings of the model, and of the features it was trained on",
    }
    absent = {"lape/": model.lape is None, "frame_causal.safetensors": model.frame_causal is None}
    table = "\n".join(f"| `{n}` | {text} |" for n, text in files.items() if not absent.get(n))
    settings = {
        "tower": Path(model.tower).name if Path(model.tower).is_absolute() else model.tower,
        "layer": features.get("layer"),
        "sampling": json.dumps(_given(features.get("sampling", {}))),
        "pool mode": features.get("pool"),
        "slow, fast stride": f"{config.slow_stride}, {config.fast_stride}",
        "pattern": f"{config.frame_sampling_strategy} {config.slow_frame_ratio}",
        "max_frames_num": config.max_frames_num,
        "frame_attention": config.frame_attention,
        "frame_time": config.frame_time,
        "frame_positions": config.frame_positions,
        "media_tags": config.media_tags,
        "pool_after_projector": config.pool_after_projector,
    }
    frames = "\n".join(f"- {name}: {value}" for name, value in settings.items())
    pooled = (
        "LLaVA and VILA pool after the projector, this model\nbefore it, so the projector's weights mean "
        "something only on features pooled as above."
        if not config.pool_after_projector
        else "As LLaVA-OneVision, this model pools after\nthe projector, 2x2 cells bilinearly."
    )
    return f"""# A video LLM trained by framebank

| file | what it is |
|---|---|
{table}

## The LLM alone

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
llm = AutoModelForCausalLM.from_pretrained("llm")
tokenizer = AutoTokenizer.from_pretrained("llm")
```
{with_adapter if adapter else ""}{coordinates}
## The whole model

With framebank installed; no remote code is run:

```python
from model.vlm import VLM
model = VLM.load(".")
```

`python train/ask.py clip.mp4 "When does it begin?" --model .` asks it about a video,
`train/evaluate.py --model . --max_tokens {limit}` scores it on a bank. Frames go in as it was trained:

{frames}

## What other trainers would drop

VILA sorts weights into files by their names (`llm`, `vision_tower`, `mm_projector`) and leaves out the
rest without a word: of this model `visual`, `lape` and `frame_causal`. It also drops special tokens
when it decodes, and with them every coordinate. {pooled}
"""


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


if __name__ == "__main__":
    main(sys.argv[1:])
