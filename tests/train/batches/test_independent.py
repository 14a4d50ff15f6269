"""Turns that do not see each other: K of them are K records of one turn each, in loss and gradients.

The K records are made by hand, laid out and trained by what is tested elsewhere; forwards and backwards
run in float64. The frame-causal loss is of each clip once, and is left out of what is compared.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.batch import Batch
from model.vlm import VLM
from train.ask import FreshClip
from train.batches.chat import Chat
from train.batches.collate import Row, collate, lay_out, pack
from train.batches.turns import encode_apart
from train.data.records import Record, Turn, made_independent, tasks_of

Talk = tuple[list[FreshClip], list[tuple[str, str]], str]
"""Media, questions with their answers, what the system says (or nothing)."""
ASKED = [
    ("When is the red circle visible?", "from <t:0.5> to <t:1.5>"),
    ("Where?", "<x:0.25> <y:0.75>"),
    ("Who is there?", "nobody at all"),
    ("", "0.25"),
    ("at <t:1.5>?", "a box: <x:0.1> <y:0.1> <x:0.5> <y:0.25> and so on"),
]


@pytest.fixture(scope="module")
def models(make_llm: Callable[..., Any], make_model: Callable[..., VLM]) -> Callable[..., VLM]:
    made: dict[Any, VLM] = {}

    def model(attention: str, **chosen: Any) -> VLM:
        key = (attention, *sorted(chosen.items()))
        if key not in made:
            made[key] = make_model(make_llm(attention=attention), loss_weight=0, **chosen)
            for name, part in made[key].named_children():
                if name != "lape":
                    part.double()
        return made[key]

    return model


def record_of(talk: Talk) -> Record:
    """The record of a talk, its media first."""
    clips, asked, system = talk
    turns = [Turn("system", system)] if system else []
    for k, (question, answer) in enumerate(asked):
        tags = "<video>" * len(clips) + "\n" if clips and not k else ""
        turns += [Turn("user", tags + question), Turn("assistant", answer)]
    return Record("r", tuple(c.info.id for c in clips), tuple(turns), "", "here")


def laid(model: VLM, talk: Talk) -> Row:
    record, chat = made_independent(record_of(talk)), Chat.of(model)
    infos = [clip.info for clip in talk[0]]
    seconds = [info.duration for info in infos]
    encoded = (
        encode_apart(chat, record, seconds)
        if record.independent
        else chat.encode(record.turns, seconds)
    )
    return lay_out(encoded, infos, model.config, "average", stamp=chat.stamp)


def batch_of(model: VLM, rows: list[list[Talk]]) -> Batch:
    clips = [[clip for own, _, _ in row for clip in own] for row in rows]
    packed = [pack([laid(model, talk) for talk in row]) for row in rows]
    tasks = [t for row in rows for talk in row for t in tasks_of(made_independent(record_of(talk)))]
    return collate(packed, clips, model.config, [""] * len(rows), tasks=tasks)


def learned(model: VLM, *batches: Batch) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Return the summed language loss, its gradients, and the losses by task."""
    model.zero_grad()
    loss, by_task = torch.zeros((), dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    for batch in batches:
        out = model(batch)
        out["ce"].backward()
        loss = loss + out["ce"].detach()
        by_task = by_task.index_add(0, batch.label_task, out["token_ce"].double())
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss, found, by_task


def assert_the_same(model: VLM, ours: list[Batch], theirs: list[Batch]) -> None:
    loss, gradients, tasks = learned(model, *ours)
    expected, wanted, split = learned(model, *theirs)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(tasks, split, rtol=1e-6, atol=1e-6)
    assert gradients.keys() == wanted.keys()
    for name, value in wanted.items():
        # LAPE's own products are in fp32, whatever the rest is in: another order of sums shows
        tolerance = 5e-6 if name.startswith("lape.") else 1e-6
        error = (gradients[name] - value).abs().max() / (value.abs().max() + 1e-12)
        assert error < tolerance, f"{name}: {error:.1e}"


def one_by_one(talk: Talk) -> list[Talk]:
    clips, asked, system = talk
    return [(clips, [pair], system) for pair in asked]


@st.composite
def talks(draw: st.DrawFn) -> Any:
    media = draw(st.lists(st.integers(0, 3), max_size=2))
    asked = draw(st.lists(st.sampled_from(ASKED), min_size=1, max_size=4))
    return media, [(q or "?", a) for q, a in asked], draw(st.sampled_from(["", "Be brief."]))


CASES = [
    (a, f, lape) for a in ("sdpa", "eager") for f in ("block", "token") for lape in (True, False)
]


@pytest.mark.parametrize(("attention", "frames", "lape"), CASES)
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=st.lists(talks(), min_size=1, max_size=3), data=st.data())
def test_k_turns_are_k_records_packed_and_alone(
    models: Callable[..., VLM],
    make_clip: Callable[..., FreshClip],
    attention: str,
    frames: str,
    lape: bool,
    drawn: list[Any],
    data: st.DataObject,
) -> None:
    model = models(attention, frame_attention=frames, enable_lape=lape)
    clips = [make_clip(k, 1 + k, (4, 4 + k)) for k in range(4)]
    own: list[Talk] = [([clips[k] for k in media], asked, system) for media, asked, system in drawn]
    if not lape:
        own = [(c, [(q, a) for q, a in asked], s) for c, asked, s in own]
    own = [talk if talk[0] else ([], [ASKED[2]] * len(talk[1]), talk[2]) for talk in own]
    apart = [batch_of(model, [[one]]) for talk in own for one in one_by_one(talk)]
    assert_the_same(model, [batch_of(model, [[talk] for talk in own])], apart)
    assert_the_same(model, [batch_of(model, [own])], apart)
