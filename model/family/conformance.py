"""Checks that our forward of an LLM equals its own, before it trains or answers; else it is refused.

A tiny twin of the LLM's class and config is run both ways: a text row of several windows, two records
packed against each alone, frames with attention both ways, independent turns against each alone, cached
decoding against the whole row, and rows under the LLM's own causal mask. The checks that fail decide what
is refused: attention back-ends, packing, `frame_attention: block`, `turns: independent`. Then one row of
the real weights is run both ways.

Why at all: transformers' attention silently ignores or reinterprets masks that a family does not know.
Two examples: eager attention adds a boolean mask to its scores, and a 4-D mask replaces a sliding window.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from model.config import VLMConfig
from model.cpu.threads import cpu_threads
from model.family.head import plain_llm
from model.family.limits import context_length
from model.family.rows import text_batch
from model.family.twin import WINDOW, make_twin
from model.family.windows import KINDS, reaches, text_config
from model.generate import Cached, Reread
from model.vlm import VLM
from shards.errors import UserError, first_line

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
"""dtype -> largest difference of a logit, over the RMS of all. The twin's is that of fp32."""
LOSS_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.01, torch.float16: 0.002}
"""dtype -> largest relative difference of a row's mean loss."""
IMPLEMENTATIONS = ("sdpa", "eager")
KERNELS = {"flex_attention": "_supports_flex_attn", "flash_attention_2": "_supports_flash_attn"}
"""Back-ends that run on CUDA only -> the class attribute of transformers that says it supports them."""
ROW = 5 * WINDOW
"""Tokens of the twin's row: several windows, so that the first tokens are out of reach of the last."""
REAL_ROW = 128
"""Tokens of the real weights' row."""


@dataclass(frozen=True)
class Verdict:
    """Which checks a family passes under each back-end, and why others fail."""

    family: str
    """Model type and class: `gemma2 (Gemma2ForCausalLM)`."""
    failed: dict[str, dict[str, str]] = field(default_factory=dict)
    """Back-end of attention -> check that failed -> the reason."""
    kernels: tuple[str, ...] = ()
    """Supported back-ends that need CUDA: the twin cannot try them, so other back-ends' results count."""
    unbuilt: str = ""
    """Why there is no twin, where there is none."""
    stateful: bool = False
    """Whether layers carry a state from token to token, which no mask cuts."""

    def masked(self, attention: str) -> bool:
        """Return whether layers take our masks and allow cached keys."""
        return not {"alone", "cached"} & self._failed(attention).keys()

    def refusal(
        self, attention: str, *, packed: bool, block: bool, apart: bool = False
    ) -> str | None:
        """Return in one line why rows of a kind are wrong under a back-end; None if they are right.

        packed: rows of several records. block: `frame_attention: block`. apart: `turns: independent`.
        """
        failed = self._failed(attention)
        if "plain" in failed:
            return f"{self.family} is refused: {failed['plain']}"
        asked = {"packed": packed, "turns": apart, "frames": block}
        needed = [name for name, on in asked.items() if on]
        if not self.masked(attention):
            needed = needed and ["alone", "cached", *needed]
        reasons = [failed[name] for name in needed if name in failed]
        if not reasons:
            return None
        what = next(words for name, words in ASKED_BY.items() if asked[name])
        why = STATE if self.stateful else reasons[0]
        # setting that avoids the failure -> whether it would change anything
        otherwise = {"frame_attention: token": block or packed, "pack_tokens: 0": packed}
        otherwise["turns: dialogue"] = apart
        fix = " and ".join(setting for setting, on in otherwise.items() if on)
        return f"{self.family} is refused with {what}: {why}; use {fix}"

    def right(self, *, packed: bool, block: bool, apart: bool = False) -> list[str]:
        """Return the back-ends under which rows of a kind are right, the preferred one first."""
        kinds = {"packed": packed, "block": block, "apart": apart}
        names = (*self.failed, *self.kernels)
        return [name for name in names if self.refusal(name, **kinds) is None]

    def _failed(self, attention: str) -> dict[str, str]:
        if attention in self.failed:
            return self.failed[attention]
        # a CUDA back-end is checked later, by the row of real weights
        return next((f for f in self.failed.values() if not f), self.failed.get("eager", {}))


STATES = {"linear_attention", "conv", "mamba", "recurrent", "hybrid", "hybrid_sliding"}
"""Kinds of layers, as transformers names them, that carry a state from token to token."""
STATE = "its layers carry a state from token to token, which no mask cuts"
ASKED_BY = {
    "packed": "pack_tokens",
    "turns": "turns: independent",
    "frames": "frame_attention block",
}
"""Check -> the setting that needs it."""
_VERDICTS: dict[str, Verdict] = {}


def verdict(llm: Any) -> Verdict:
    """Return the verdict on an LLM's family, of its class and config."""
    plain = plain_llm(llm)
    return verdict_of(type(plain), plain.config)


def verdict_of(llm_class: type, config: Any) -> Verdict:
    """Return the verdict on a class and config; computed once per process."""
    facts = {k: v for k, v in config.to_dict().items() if not k.startswith("_")}
    key = f"{llm_class.__qualname__} {json.dumps(facts, sort_keys=True, default=str)}"
    if key not in _VERDICTS:
        with cpu_threads(1):  # on a network this small, more threads cost more than they save
            _VERDICTS[key] = try_twin(llm_class, config)
    return _VERDICTS[key]


def try_twin(llm_class: type, config: Any) -> Verdict:
    """Run the checks on a tiny twin of a class and config; the caller's RNG is left as it was."""
    family = f"{config.model_type} ({llm_class.__name__})"
    try:
        twin = make_twin(llm_class, config)
    except Exception as error:  # a config whose sizes no longer agree may raise anything
        reason = f"no tiny twin of it can be built to check it with: {said_by(error)}"
        failed = {name: {"plain": reason, "alone": reason} for name in IMPLEMENTATIONS}
        return Verdict(family, failed, unbuilt=said_by(error))
    kinds = set(getattr(text_config(twin), "layer_types", None) or ())
    stateful = bool(getattr(twin, "_is_stateful", False) or kinds & STATES)
    kernels = [name for name, flag in KERNELS.items() if getattr(twin, flag, False)]
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        found = {name: _try(twin, name) for name in IMPLEMENTATIONS if _takes(twin, name)}
    return Verdict(family, found, tuple(kernels), stateful=stateful)


def _takes(twin: Any, implementation: str) -> bool:
    try:
        twin.set_attn_implementation(implementation)
    except (ValueError, ImportError):
        return False
    return implementation == "eager" or bool(getattr(twin, f"_supports_{implementation}", False))


def _try(twin: Any, implementation: str) -> dict[str, str]:
    """Return the checks that a twin fails under a back-end, with the reasons."""
    rng = np.random.default_rng(0)
    try:
        rows = int(twin.get_input_embeddings().num_embeddings)
        ids = [torch.from_numpy(rng.integers(min(8, rows - 1), rows, n)) for n in (ROW, ROW - 11)]
        twin.set_attn_implementation("eager")
        truth = [twin(input_ids=row[None]).logits[0].float() for row in ids]
        model = around(twin)
    except Exception as error:
        reason = f"its own forward of a text row fails: {said_by(error)}"
        return {"plain": reason, "alone": reason}
    twin.set_attn_implementation(implementation)
    checks: dict[str, Callable[[VLM, list[Tensor], list[Tensor]], str]] = {
        "plain": _plain,
        "alone": _alone,
        "packed": _packed,
        "frames": _frames,
        "turns": _turns,
        "cached": _cached,
    }
    failed = {}
    model.masked = reaches(text_config(twin)) is not None
    for name, check in checks.items():
        if name != "plain" and not model.masked:
            failed[name] = f"its layers are of kinds that no mask reaches ({_kinds(twin)})"
            continue
        try:
            reason = check(model, ids, truth)
        except Exception as error:  # a family's own code, given arguments it does not expect
            reason = f"{WHAT[name]} fail: {said_by(error)}"
        if reason:
            failed[name] = reason
    return failed


WHAT = {
    "plain": "rows under its own causal mask",
    "alone": "rows under our mask",
    "packed": "two records packed in a row",
    "frames": "frames with attention both ways",
    "turns": "turns that do not see each other",
    "cached": "tokens decoded one by one over cached keys",
}
"""Check -> what is run, for messages."""


def _plain(model: VLM, ids: list[Tensor], truth: list[Tensor]) -> str:
    """Check rows of different lengths under the LLM's own mask, then decoding without a cache."""
    was, model.masked = model.masked, False
    try:
        batch = text_batch(*([row] for row in ids), causal=True)
        logits = model.logits(model.hidden_states(batch)).view(len(ids), ROW, -1)
        ours = [own[: len(row)] for own, row in zip(logits, ids, strict=True)]
        return _compare("plain", ours, truth) or _one_by_one("plain", Reread, model, ids, truth)
    finally:
        model.masked = was


def _alone(model: VLM, ids: list[Tensor], truth: list[Tensor]) -> str:
    batch = text_batch(*([row] for row in ids))
    logits = model.logits(model.hidden_states(batch)).view(len(ids), ROW, -1)
    return _compare("alone", [own[: len(r)] for own, r in zip(logits, ids, strict=True)], truth)


def _packed(model: VLM, ids: list[Tensor], truth: list[Tensor]) -> str:
    logits = model.logits(model.hidden_states(text_batch(ids)))
    return _compare("packed", list(logits.split([len(row) for row in ids])), truth)


def _frames(model: VLM, ids: list[Tensor], truth: list[Tensor]) -> str:
    """Check that a change in a frame's last token reaches the frame's first, and nothing before it."""
    row = ids[0]
    first, last = ROW // 2, ROW // 2 + WINDOW // 2
    block = np.full(len(row), -1)
    block[first : last + 1] = 0

    def logits(changed: int | None) -> Tensor:
        other = row.clone()
        if changed is not None:
            other[changed] = row[changed - 1] if row[changed] != row[changed - 1] else row[0]
        return model.logits(model.hidden_states(text_batch([other], block=block)))

    before, inside, behind = logits(None), logits(last), logits(last + 1)
    leak = max(
        _error(inside[:first], before[:first]), _error(behind[: last + 1], before[: last + 1])
    )
    if leak > TOLERANCE[torch.float32]:
        return f"what follows a frame changes what comes before it, by {leak:.1e}"
    seen = min(_error(inside[k : k + 1], before[k : k + 1]) for k in range(first, last))
    return "" if seen > TOLERANCE[torch.float32] else "tokens of a frame cannot see the later ones"


def _turns(model: VLM, ids: list[Tensor], truth: list[Tensor]) -> str:
    """Check three turns of a record, not multiples of the window long, against each turn alone."""
    row, shared = ids[0], 2 * WINDOW + 3
    turns = [row[shared:], ids[1][shared:], row[shared + 5 : -2]]
    batch = text_batch([torch.cat([row[:shared], *turns])], turns=[shared, *map(len, turns)])
    logits = model.logits(model.hidden_states(batch))
    head, *own = logits.split([shared, *map(len, turns)])
    alone = [
        model.llm(input_ids=torch.cat([row[:shared], turn])[None]).logits[0] for turn in turns[1:]
    ]
    expected = [truth[0], *(logits.float() for logits in alone)]
    return _compare("turns", [torch.cat([head, turn]) for turn in own], expected)


def _cached(model: VLM, ids: list[Tensor], truth: list[Tensor]) -> str:
    return _one_by_one("cached", Cached, model, ids, truth)


def _one_by_one(
    what: str, reader_class: Any, model: VLM, ids: list[Tensor], truth: list[Tensor]
) -> str:
    """Decode after prompts of two lengths, for two windows' tokens, against the whole row."""
    prompts = [len(row) - 2 * WINDOW - 1 for row in ids]
    batch = text_batch(*([row[:n]] for row, n in zip(ids, prompts, strict=True)), causal=True)
    reader = reader_class(model, batch)
    states = [reader.prompt()]
    for step in range(2 * WINDOW):
        after = torch.stack([row[n + step] for row, n in zip(ids, prompts, strict=True)])
        states.append(reader.read(model.llm.get_input_embeddings()(after)))
    ours = [model.logits(torch.stack([step[row] for step in states])) for row in range(len(ids))]
    theirs = [own[n - 1 : n + 2 * WINDOW] for own, n in zip(truth, prompts, strict=True)]
    return _compare(what, ours, theirs)


def _compare(what: str, ours: list[Tensor], theirs: list[Tensor]) -> str:
    error = max(_error(one, two) for one, two in zip(ours, theirs, strict=True))
    if error <= TOLERANCE[torch.float32]:
        return ""
    return f"logits of {WHAT[what]} are not its own (off by {error:.1e} of their RMS)"


def _error(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference over the RMS; infinity where either has NaN."""
    error = (ours.float() - theirs.float()).abs().max() / theirs.float().square().mean().sqrt()
    return float(error) if error.isfinite() else float("inf")


def admit(
    model: VLM,
    attention: str = "sdpa",
    reason: str = "",
    *,
    auto: bool = True,
    packed: bool = False,
    apart: bool = False,
) -> tuple[str, str]:
    """Check a model's LLM and set its attention back-end; return that back-end and the reason.

    attention, reason: the back-end that suits this device best. auto: whether another that passes may
    replace it. packed, apart: kinds of rows, as in `Verdict.refusal`. Raises UserError, in one line,
    where no back-end is right. The real weights are run on the device that they are on.
    """
    found = verdict(model.llm)
    block = model.config.frame_attention == "block"
    kinds = {"packed": packed, "block": block, "apart": apart}
    right = found.right(**kinds)
    if right and attention not in right:
        if not auto:
            raise UserError(
                f"attn {attention}: {found.family} is wrong, or does not run, under it",
                fix=f"use attn: auto or {right[0]}",
            )
        attention, reason = right[0], f"{found.family} has no {attention} that is right"
    if problem := found.refusal(attention, **kinds):
        raise UserError(problem, where=named(model.llm))
    model.masked = found.masked(attention)
    model.llm.set_attn_implementation(attention)
    check_weights(model)
    return attention, reason


def named(llm: Any) -> str | None:
    """Return the folder or Hub name that an LLM was loaded from; None if unknown."""
    return getattr(llm.config, "name_or_path", None) or None


def check_weights(model: VLM) -> None:
    """Run a text row of the real weights both ways; UserError where logits or loss differ."""
    llm = model.llm
    table, attention = llm.get_input_embeddings().weight, llm.config._attn_implementation
    if attention in KERNELS and table.device.type == "cpu":
        return  # with FSDP: CUDA kernels, and weights that are moved to the GPUs later
    rng = np.random.default_rng(0)
    length = min(REAL_ROW, context_length(llm.config.to_dict()) or REAL_ROW)
    rows = min(len(table), len(llm.get_output_embeddings().weight))
    ids = torch.from_numpy(rng.integers(0, rows, length)).to(table.device)
    training = llm.training
    probe = around(llm)  # sets the LLM to eval mode
    probe.masked, probe.visual = model.masked, model.visual
    batch = text_batch([ids], causal=not model.masked or attention == "flash_attention_2")
    with torch.no_grad(), exact_products():
        own = llm(input_ids=ids[None]).logits[0].float()
        ours = probe.logits(probe.hidden_states(batch))
    llm.train(training)
    losses = [F.cross_entropy(logits[:-1], ids[1:]).item() for logits in (ours, own)]
    error = _error(ours, own)
    off = abs(losses[0] - losses[1]) / losses[1]
    if error <= TOLERANCE[table.dtype] and off <= LOSS_TOLERANCE[table.dtype]:
        return
    raise UserError(
        f"{llm.config.model_type} is refused: "
        f"on a row of {length} tokens our logits differ from its own by {error:.1e} of their RMS "
        f"(tolerated {TOLERANCE[table.dtype]}), the loss is {losses[0]:.4f}, its own {losses[1]:.4f}",
        where=named(llm),
    )


@contextmanager
def exact_products() -> Iterator[None]:
    """Multiply fp32 matrices in fp32: with an H200's TF32 equal computations differ by 7e-3 of an RMS."""
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


def around(llm: Any) -> VLM:
    """Return a model of nothing but an LLM, in eval mode; the caller's RNG is left as it was."""
    with torch.random.fork_rng(devices=[]):
        config = VLMConfig(mm_projector_type="linear", enable_lape=False, loss_weight=0)
        return VLM(config, llm, None, width=1, features={}, tower="").eval()


def _kinds(llm: Any) -> str:
    """Return the kinds of an LLM's layers that no mask supports, in words."""
    return ", ".join(sorted(set(text_config(llm).layer_types) - set(KINDS)))


def said_by(error: Exception) -> str:
    """Return the kind of an exception and its first line."""
    return f"{type(error).__name__}: {first_line(error)}"[:160]
