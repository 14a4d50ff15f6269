"""An LLM's own computation from last hidden states to logits, on chosen rows alone.

Families scale logits there (Cohere, Granite), cap them (Gemma 2) or cast them. So their own forward is
run unchanged, over a stand-in for the decoder that returns the chosen rows.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast


def own_head(llm: Any) -> Callable[[Tensor], Tensor]:
    """Return the head of an LLM, or of a PEFT model around one, as `(n, width)` -> `(n, rows)`."""
    plain, decoder = plain_llm(llm), decoder_of(llm)

    def logits(hidden: Tensor) -> Tensor:
        rows = hidden[:, None]  # n rows of one token
        over = _Over(plain, decoder, rows)
        # the class's forward with our proxy as self: scales, caps and casts are whatever the family does
        out = type(plain).forward(over, inputs_embeds=rows, use_cache=False, return_dict=True)
        return out.logits[:, 0]

    return logits


@torch.no_grad()
def seen_embeddings(llm: Any) -> Tensor:
    """Return the input vectors as the LLM's first layer sees them: `(rows, width)`.

    Gemma's table module scales its rows by the root of the width; elsewhere these are the weights.
    """
    table = llm.get_input_embeddings()
    rows: Tensor = table(torch.arange(table.num_embeddings, device=table.weight.device))
    return rows


@torch.no_grad()
def seen_head(llm: Any) -> Tensor:
    """Return the head's rows at the scale of the logits that leave the LLM: `(rows, width)`.

    The factor after the head (Cohere's, Granite's) is fitted by least squares on 16 states of unit RMS.
    """
    head = llm.get_output_embeddings()
    weight: Tensor = head.weight.detach()
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(16, weight.shape[1], generator=generator).to(weight)
    plain, own = head(states).float(), own_head(llm)(states).float()
    if torch.equal(plain, own):
        return weight
    # least squares through the origin: minimising |own - c plain|^2 gives c =
    # <plain, own> / <plain, plain>
    return weight * float((plain * own).sum() / plain.square().sum())


def plain_llm(llm: Any) -> Any:
    """Return the causal LM of transformers, taken out of a PEFT model if it is in one."""
    return llm.get_base_model() if hasattr(llm, "peft_config") else llm


def decoder_of(llm: Any) -> Any:
    """Return an LLM's decoder: embeddings in, last hidden states after the final norm out."""
    plain = plain_llm(llm)
    table = plain.get_input_embeddings()
    names = (plain.base_model_prefix, "model", "transformer")
    # in some families `get_decoder` returns another part, or the whole LLM
    candidates = [plain.get_decoder(), *(getattr(plain, name, None) for name in names)]
    return next(
        c
        for c in candidates
        if isinstance(c, PreTrainedModel)
        and c is not plain
        and any(m is table for m in c.modules())
    )


def layers_of(decoder: Any) -> list[Any]:
    """Return a decoder's layers, first to last."""
    # `layers` in most families, `h`, `blocks`, `encoder.layer` in others; a decoder may have other lists
    # beside them, and an encoder of another kind inside
    lists = [m for m in decoder.children() if isinstance(m, nn.ModuleList)]
    lists = lists or [m for m in decoder.modules() if isinstance(m, nn.ModuleList)]
    return list(max(lists, key=lambda own: sum(p.numel() for p in own.parameters()), default=()))


class _Over:
    """Proxy of a module whose decoder, somewhere inside it, returns given rows without computing."""

    def __init__(self, module: Any, decoder: Any, rows: Tensor) -> None:
        self._module, self._decoder, self._rows = module, decoder, rows

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        modules = getattr(found, "modules", None)
        # the decoder may be nested: whatever contains it is wrapped too, anything else is the LLM's own
        if modules is None or not any(inner is self._decoder for inner in modules()):
            return found
        return _Over(found, self._decoder, self._rows)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._module is self._decoder:
            return _Decoded(last_hidden_state=self._rows)
        return type(self._module).forward(self, *args, **kwargs)


class _Decoded(MoeModelOutputWithPast):
    """A decoder's output with hidden states only; every other field reads as None."""

    def __getattr__(self, name: str) -> None:
        # copy and pickle ask for such names, and must learn that there are none
        if name.startswith("_"):
            raise AttributeError(name)
        return None
