"""ms-swift from a bank, as its plug-in; Qwen2-VL, Qwen2.5-VL and Qwen3-VL.

swift sft --external_plugins train/recipes/swift_bank.py --model CHECKPOINT \\
    --model_kwargs '{"framebank": "BANK", "framebank_media_dir": ""}' --dataset train.jsonl ...

A row's `videos` (and `images`) name clips of the bank. Frames and their size are those
of the bank; settings of swift about them in the environment are refused.
"""

import os
from typing import Any

import torch
from swift.model import MODEL_MAPPING
from swift.template import TEMPLATE_MAPPING, Template
from swift.template.utils import findall

from shards.errors import UserError
from train.bank_vlm.processor import bank_processor, refuse_decoding
from train.bank_vlm.tower import use_bank

MODELS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
OF_DECODING = ("FPS", "NFRAMES", "FRAMES", "PIXELS", "TOKEN_NUM")
"""How the names end of variables that say how swift reads videos and pictures."""


def named(variable: str) -> str:
    """Return what --model_kwargs says, which swift keeps in the environment."""
    found = os.environ.get(variable.upper(), "")
    if not found and variable == "framebank":
        raise UserError("no bank is named", fix="""add --model_kwargs '{"framebank": "BANK"}'""")
    return found


def of_tokenizer(processor: Any, name: str) -> Any:
    """Return what a processor does not have, from its tokenizer."""
    if name == "tokenizer" or name.startswith("__"):
        raise AttributeError(name)
    return getattr(processor.tokenizer, name)


class BankLoader:
    """What is otherwise in a loader of swift."""

    def get_processor(self, model_dir: str, config: Any) -> Any:
        # swift reads these wherever it decodes, and from the bank nothing is decoded
        set_here = [name for name in sorted(os.environ) if name.endswith(OF_DECODING)]
        refuse_decoding(set_here, where="the environment")
        plain = super().get_processor(model_dir, config)  # type: ignore[misc]
        names = {"media_dir": named("framebank_media_dir"), "model_config": config}
        processor = bank_processor(plain, named("framebank"), **names)
        # swift has a processor's class ask its tokenizer, in a way that no class below one survives
        type(processor).__getattr__ = of_tokenizer
        type(processor)._patch = True
        return processor

    def get_model(self, *args: Any, **kwargs: Any) -> Any:
        model = super().get_model(*args, **kwargs)  # type: ignore[misc]
        # a dummy has no weights and gives only positions
        dummy = self.return_dummy_model  # type: ignore[attr-defined]
        return model if dummy else use_bank(model, named("framebank"))


class BankTemplate:
    """What is otherwise in a template of swift: names stay names, the processor knows the rest."""

    processor: Any
    max_pixels: int | None

    def replace_tag(self, media_type: str, index: int, inputs: Any) -> list[str]:
        if media_type == "audio":
            raise UserError("a bank holds no sound", where=media_type)
        # one token for each medium, filled up in _encode: the number of its
        # tokens comes with its features
        return [getattr(self.processor, f"{media_type}_token")]

    def _encode(self, inputs: Any) -> dict[str, Any]:
        if self.max_pixels is not None:
            raise UserError("the size of frames is that of the bank", where="--max_pixels")
        # Template's own, not that of the Qwen class between, which opens the videos
        encoded: dict[str, Any] = Template._encode(self, inputs)
        row = [encoded[name] for name in ("input_ids", "labels", "loss_scale")]
        mask = [False] * len(row[0])
        for media_type in ("image", "video"):
            names = getattr(inputs, f"{media_type}s")
            if not names:
                continue
            made = [self._made(media_type, name) for name in names]
            places = findall(row[0], getattr(self.processor, f"{media_type}_token_id"))
            *row, mask = self._extend_tokens(  # type: ignore[attr-defined]
                *row,
                places,
                lambda k, made=made: made[k].pop("input_ids")[0].tolist(),
                mm_mask=mask,
            )
            encoded |= _joined(made)
        encoded |= dict(zip(("input_ids", "labels", "loss_scale"), row, strict=True))
        if any(mask):
            make = self.create_mm_token_type_ids  # type: ignore[attr-defined]
            encoded["mm_token_type_ids"] = make(encoded["input_ids"], mask)
        return encoded

    def _made(self, media_type: str, name: Any) -> dict[str, Any]:
        """Return one medium as the processor gives it, with all tokens that stand for it."""
        if not isinstance(name, str):
            raise UserError("a medium is named by its file", got=type(name).__name__)
        text = f"<|vision_start|>{getattr(self.processor, f'{media_type}_token')}<|vision_end|>"
        media = {f"{media_type}s": [name]}
        if media_type == "video":
            media["do_sample_frames"] = False  # type: ignore[assignment]
        made = self.processor(text=[text], return_tensors="pt", **media)
        return {k: v for k, v in made.items() if k not in ("attention_mask", "mm_token_type_ids")}

    def _post_encode(self, model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        has_media = inputs.keys() & {"pixel_values", "pixel_values_videos"}
        # of text alone swift has the tower see a black picture, for the sake of its gradients
        return super()._post_encode(model, inputs) if has_media else inputs  # type: ignore[misc]


def _joined(made: list[dict[str, Any]]) -> dict[str, Any]:
    """Return fields of some media, one after the other."""
    out = {}
    for name in made[0]:
        values = [one[name] for one in made]
        is_tensor = torch.is_tensor(values[0])
        out[name] = torch.cat(values) if is_tensor else [part for own in values for part in own]
    return out


for one in MODELS:
    meta, template = MODEL_MAPPING[one], TEMPLATE_MAPPING[one]
    meta.loader = type(meta.loader.__name__, (BankLoader, meta.loader), {})
    template.template_cls = type(
        template.template_cls.__name__, (BankTemplate, template.template_cls), {}
    )
