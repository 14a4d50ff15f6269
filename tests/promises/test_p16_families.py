"""P16: for every causal LM family of transformers: our forward, loss, packed rows and cached decoding
equal the LLM's own, or the family is refused by name; Llama, Mistral, Mixtral, Qwen2, Qwen3 and their
MoE, Gemma 2 and 3, Phi-3, Cohere, Granite, OLMo 2, SmolLM3 and gpt-oss must pass.

What is right is said here by `llm(input_ids)` of transformers on each record alone.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from model.batch import Batch
from model.family.__main__ import class_and_config, families, row
from model.family.conformance import Verdict, admit, verdict_of
from model.family.twin import WINDOW, make_twin
from model.generate import generate
from model.mask import Reach
from model.vlm import VLM, VLMConfig
from shards.errors import UserError
from tests.params import few
from train.batches.collate import Row, collate, pack

pytestmark = pytest.mark.usefixtures("quiet_thread")
PINNED = [
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "gemma2",
    "gemma3_text",
    "phi3",
    "cohere",
    "granite",
    "olmo2",
    "smollm3",
    "gpt_oss",
    "cohere2",
    "granitemoe",
    "olmo3",
    "gemma",
    "starcoder2",
]
ONE_BY_ONE = ["jamba", "lfm2", "mamba", "qwen3_next", "rwkv", "bloom"]
"""Families whose rows are right when they are single and causal, and not when packed."""
LENGTHS = (43, 29, 17)
"""Tokens of records: several windows, and none a multiple of one."""
CLOSE = 2e-4
"""Of the RMS of logits in fp32; what a mask or a scale that is wrong changes is 0.1 and more."""


def built(family: str, frame_attention: str = "block") -> VLM:
    """Return a model over a tiny random LLM of a family."""
    llm = make_twin(*class_and_config(family), seed=1)
    facts: dict[str, Any] = {"width": 4, "features": {"pool": "average"}, "tower": "none"}
    settings = VLMConfig(
        enable_lape=False,
        loss_weight=0,
        frame_attention=frame_attention,
        mm_projector_type="linear",
    )
    return VLM.assemble(settings, llm, None, **facts).eval()


def records(llm: Any) -> list[Tensor]:
    rows = llm.get_input_embeddings().num_embeddings
    with torch.no_grad():  # some have fewer rows in the head
        rows = min(rows, llm(input_ids=torch.zeros(1, 1, dtype=torch.long)).logits.shape[-1])
    rng = np.random.default_rng(5)
    return [torch.from_numpy(rng.integers(min(8, rows - 1), rows, n)) for n in LENGTHS]


def laid(ids: Tensor) -> Row:
    """Return a record of text, all of it but its first token supervised."""
    n = len(ids)
    return Row(
        ids=ids.numpy(),
        axis=np.full(n, -1),
        coord=np.zeros(n, np.float32),
        supervised=np.arange(n) > 0,
        block=np.full(n, -1),
        sample=np.zeros(n, np.int64),
        position=np.arange(n),
        frames=[],
        clips=0,
    )


SHARED = 20


def apart(texts: list[Tensor]) -> tuple[Row, list[Tensor]]:
    """Return a record of turns behind a common beginning, all of them supervised, and each one alone."""
    turns = [texts[0][SHARED:], *texts[1:]]
    sizes = [SHARED, *map(len, turns)]
    turn = np.repeat(np.arange(len(sizes)), sizes)
    place = [np.arange(SHARED), *(SHARED + np.arange(len(own)) for own in turns)]
    row = laid(torch.cat([texts[0][:SHARED], *turns]))
    row = replace(row, supervised=turn > 0, position=np.concatenate(place), turn=turn)
    return row, [torch.cat([texts[0][:SHARED], own]) for own in turns]


def assert_turns_are_its_own(model: VLM, texts: list[Tensor]) -> None:
    """Turns that do not see each other: the sum of losses, alone and packed with another record."""
    row, alone = apart(texts)
    expected = sum(
        F.cross_entropy(own[SHARED - 1 : -1], text[SHARED:], reduction="sum").item()
        for text, own in zip(alone, truth(model, alone), strict=True)
    )
    assert model(batched(model, [row]))["ce"].item() == pytest.approx(expected, rel=1e-5)
    other = laid(texts[1])
    beside = model(batched(model, [other]))["ce"].item()
    packed = batched(model, [pack([other, row])])
    assert model(packed)["ce"].item() == pytest.approx(expected + beside, rel=1e-5)


def batched(model: VLM, rows: list[Row]) -> Batch:
    return collate(rows, [[] for _ in rows], model.config, [str(k) for k in range(len(rows))])


@torch.no_grad()
def truth(model: VLM, texts: list[Tensor]) -> list[Tensor]:
    """Return what transformers computes of each text alone, in its plainest back-end."""
    was = model.llm.config._attn_implementation
    model.llm.set_attn_implementation("eager")
    out = [model.llm(input_ids=text[None]).logits[0].float() for text in texts]
    model.llm.set_attn_implementation(was)
    return out


@torch.no_grad()
def ours(model: VLM, batch: Batch) -> Tensor:
    return model.logits(model.hidden_states(batch)).view(*batch.input_ids.shape, -1)


def assert_close(one: Tensor, two: Tensor, what: str) -> None:
    error = (one - two).abs().max() / two.square().mean().sqrt()
    assert error < CLOSE, f"{what}: {error:.1e} of the RMS"


def assert_rows_are_its_own(model: VLM, texts: list[Tensor], expected: list[Tensor]) -> None:
    """Padded rows, each of one record: logits and the sum of losses."""
    padded = batched(model, [laid(text) for text in texts])
    for text, own, got in zip(texts, expected, ours(model, padded), strict=True):
        assert_close(got[: len(text)], own, "a row of its own")
    loss = sum(
        F.cross_entropy(own[:-1], text[1:], reduction="sum").item()
        for text, own in zip(texts, expected, strict=True)
    )
    assert model(padded)["ce"].item() == pytest.approx(loss, rel=1e-5)


def assert_answers_are_its_own(model: VLM, texts: list[Tensor]) -> None:
    """Greedy answers to prompts of different lengths, past a window, against reading all again."""
    batch = batched(model, [laid(text) for text in texts])
    answers = generate(model, batch, stop=frozenset(), max_new_tokens=WINDOW + 4)
    for text, answer in zip(texts, answers, strict=True):
        tokens = [piece.token for piece in answer]
        read = truth(model, [torch.cat([text, torch.tensor(tokens)])])[0][len(text) - 1 : -1]
        best = read.max(dim=-1).values
        picked = read[torch.arange(len(tokens)), tokens]  # a tie may fall either way
        assert ((best - picked) < CLOSE * read.square().mean().sqrt()).all()


@pytest.mark.parametrize("family", few(PINNED, 3))
def test_a_pinned_family_is_what_transformers_computes(family: str) -> None:
    found = verdict_of(*class_and_config(family))
    right = found.right(packed=True, block=True, apart=True)
    implementations = [n for n in right if n in found.failed]
    assert implementations, row(family, found)
    model = built(family)
    texts = records(model.llm)
    expected = truth(model, texts)
    for attention in implementations:
        admit(model, attention, packed=True, apart=True)
        assert_rows_are_its_own(model, texts, expected)
        packed = batched(model, [pack([laid(text) for text in texts])])
        parts = ours(model, packed)[0].split(LENGTHS)
        for own, got in zip(expected, parts, strict=True):
            assert_close(got, own, "packed")
        losses = [
            F.cross_entropy(own[:-1], text[1:], reduction="sum").item()
            for text, own in zip(texts, expected, strict=True)
        ]
        assert model(packed)["ce"].item() == pytest.approx(sum(losses), rel=1e-5)
        assert_turns_are_its_own(model, texts)
    assert_answers_are_its_own(model, texts)


@pytest.mark.parametrize("family", few(ONE_BY_ONE, 3))
def test_a_family_that_cannot_be_packed_says_so_and_is_right_by_itself(family: str) -> None:
    model = built(family)
    for packed, words in (
        (False, "refused with frame_attention block"),
        (True, "with pack_tokens"),
    ):
        with pytest.raises(UserError, match=words) as refused:
            admit(model, packed=packed)
        assert str(refused.value).count("\n") == 0
        assert f"({type(model.llm).__name__})" in str(refused.value)
    model = built(family, "token")
    with pytest.raises(UserError, match="with pack_tokens"):
        admit(model, packed=True)
    with pytest.raises(
        UserError, match=r"with turns: independent: .*; use turns: dialogue"
    ) as refused:
        admit(model, apart=True)
    assert str(refused.value).count("\n") == 0
    admit(model)
    texts = records(model.llm)
    assert_rows_are_its_own(model, texts, truth(model, texts))
    assert_answers_are_its_own(model, texts)


STATEFUL = ["jamba", "lfm2", "mamba", "qwen3_next", "rwkv", "falcon_h1", "recurrent_gemma"]


@pytest.mark.parametrize("family", STATEFUL)
def test_layers_that_carry_a_state_are_named_as_the_reason(family: str) -> None:
    found = verdict_of(*class_and_config(family))
    for name in found.failed:
        refusal = found.refusal(name, packed=True, block=False)
        assert refusal
        assert "carry a state from token to token" in refusal
        assert refusal.startswith(f"{family} (")


@pytest.mark.parametrize("family", ["mistral", "gemma3_text", "cohere2"])
def test_a_mask_without_the_window_is_found_out(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.vlm.reaches", lambda config: {"": Reach()})
    monkeypatch.setattr("model.family.conformance._VERDICTS", {})
    found = verdict_of(*class_and_config(family))
    assert all("alone" in failed and "cached" in failed for failed in found.failed.values())
    assert not found.right(packed=True, block=True)


@pytest.mark.parametrize("family", ["cohere", "granite", "gemma2"])
def test_a_head_without_its_scale_is_found_out(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.vlm.own_head", lambda llm: llm.get_output_embeddings())
    monkeypatch.setattr("model.family.conformance._VERDICTS", {})
    if family == "gemma2":  # a cap far above the logits would change nothing
        kind, config = class_and_config(family)
        config.final_logit_softcapping = 1.0
        found = verdict_of(kind, config)
    else:
        found = verdict_of(*class_and_config(family))
    assert not found.right(packed=False, block=False)


def test_real_weights_that_are_not_read_as_they_are_meant_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = built("cohere")
    admit(model)
    monkeypatch.setattr("model.vlm.own_head", lambda llm: llm.get_output_embeddings())
    with pytest.raises(
        UserError, match=r"cohere is refused: on a row of 128 tokens .* the loss is"
    ):
        admit(model)


def test_a_verdict_leaves_the_random_numbers_and_the_model_as_they_are() -> None:
    model = built("qwen2")
    torch.manual_seed(7)
    expected = torch.rand(3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.llm.train()
    torch.manual_seed(7)
    admit(model)
    assert torch.equal(torch.rand(3), expected)
    assert model.llm.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_llm_without_sdpa_takes_eager_and_says_so_when_asked_otherwise() -> None:
    for family in ("gemma2", "gpt_oss"):
        found = verdict_of(*class_and_config(family))
        assert found.right(packed=True, block=True)[0] == "eager"
        assert "sdpa" not in found.right(packed=False, block=False)


@pytest.mark.slow
@pytest.mark.parametrize("family", families())
def test_every_family_is_exact_or_refused_with_a_reason(family: str) -> None:
    try:
        kind, config = class_and_config(family)
    except Exception as error:
        pytest.skip(f"not built: {error}")
    found = verdict_of(kind, config)
    if found.unbuilt:
        assert found.refusal("sdpa", packed=False, block=False)
        pytest.skip(f"not built: {found.unbuilt}")
    assert_verdict_holds(family, found)


def assert_verdict_holds(family: str, found: Verdict) -> None:
    """What is allowed equals transformers; what is not is refused in one line that names it."""
    for packed, block in ((False, False), (False, True), (True, False), (True, True)):
        for attention in found.failed:
            reason = found.refusal(attention, packed=packed, block=block)
            if reason is None:
                continue
            assert reason.startswith(found.family)
            assert "\n" not in reason
            assert len(reason) > len(found.family) + 20
    if not found.right(packed=False, block=False):
        return
    packs = bool(found.right(packed=True, block=True))
    apart_too = bool(found.right(packed=packs, block=packs, apart=True))
    model = built(family, "block" if packs else "token")
    texts = records(model.llm)
    expected = truth(model, texts)
    admit(model, packed=packs)
    assert_rows_are_its_own(model, texts, expected)
    if packs:
        joined = batched(model, [pack([laid(text) for text in texts])])
        for own, got in zip(expected, ours(model, joined)[0].split(LENGTHS), strict=True):
            assert_close(got, own, "packed")
    if apart_too and packs:
        admit(model, packed=True, apart=True)
        assert_turns_are_its_own(model, texts)
    assert_answers_are_its_own(model, texts)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "cohere", "granite"])
def test_new_vectors_start_at_the_scale_that_the_llm_sees(
    family: str, make_tokenizer: Callable[[], Any]
) -> None:
    llm = make_twin(*class_and_config(family), seed=1)
    facts: dict[str, Any] = {"width": 4, "features": {"pool": "average"}, "tower": "none"}
    model = VLM.assemble(VLMConfig(num_temporal_tokens=40), llm, make_tokenizer(), **facts)
    ids = torch.arange(llm.get_input_embeddings().num_embeddings)
    text = llm.get_input_embeddings()(ids)
    anchors = model.lape.input_tables[0]
    for ours_ in (anchors, model.visual.frame_end):
        assert 0.5 < ours_.std() / text.std() < 2
    states = torch.randn(200, text.shape[1])
    logits = model.logits(states)
    ratio = logits[:, len(ids) :].std() / logits[:, : len(ids)].std()
    assert 0.2 < ratio < 1.2  # anchors start at half the spread of the head's rows
