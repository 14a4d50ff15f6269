"""Turns that do not see each other: K of them are K records of one turn each, in loss and gradients.

The K records are written by hand. Models are in float64 but for what computes in fp32 by itself. The
frame-causal loss is of each clip once, whatever is asked about it, and has a test of its own.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.batch import Batch
from model.family.__main__ import class_and_config
from model.family.twin import shrunk
from model.family.windows import reaches, text_config
from model.vlm import VLM
from shards.annotations.fault import RowError
from train.ask import FreshClip
from train.batches.chat import MEDIA, Chat, Encoded
from train.batches.collate import Row, collate, lay_out, pack
from train.batches.turns import encode_apart
from train.data.records import ENTANGLED, Record, Turn, made_independent, tasks_of
from train.start.templates import TEMPLATES

Talk = tuple[list[FreshClip], list[tuple[str, str]], str]
"""Media, questions with their answers, what the system says (or nothing)."""
PLAIN = ("Who is there?", "nobody at all")
ASKED = [
    ("When is the red circle visible?", "from <t:0.5> to <t:1.5>"),
    ("Where?", "<x:0.25> <y:0.75>"),
    PLAIN,
    ("And now", "0.25"),
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
    encoded = encoded_of(chat, record, seconds)
    return lay_out(encoded, infos, model.config, "average", stamp=chat.stamp)


def encoded_of(chat: Chat, record: Record, seconds: list[float]) -> Encoded:
    if record.independent:
        return encode_apart(chat, record, seconds)
    return chat.encode(record.turns, seconds)


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
    # norms, logits and LAPE are in fp32 whatever the rest is in: another order of sums shows in tensors
    # whose gradients nearly cancel, so that 1e-6 is of all of them together
    off = sum(float((gradients[name] - value).square().sum()) for name, value in wanted.items())
    assert off**0.5 < 1e-6 * sum(float(value.square().sum()) for value in wanted.values()) ** 0.5
    for name, value in wanted.items():
        error = (gradients[name] - value).abs().max() / (value.abs().max() + 1e-12)
        assert error < 1e-5, f"{name}: {error:.1e}"


def one_by_one(talk: Talk) -> list[Talk]:
    clips, asked, system = talk
    return [(clips, [pair], system) for pair in asked]


@st.composite
def talks(draw: st.DrawFn) -> Any:
    media = draw(st.lists(st.integers(0, 3), max_size=2))
    asked = draw(st.lists(st.sampled_from(ASKED), min_size=1, max_size=4))
    return media, asked, draw(st.sampled_from(["", "Be brief."]))


CASES = [("sdpa", f, lape) for f in ("block", "token") for lape in (True, False)]
CASES += [("eager", "block", True), ("eager", "token", False)]


@pytest.mark.parametrize(("attention", "frames", "lape"), CASES)
@settings(max_examples=3)
@given(drawn=st.lists(talks(), min_size=1, max_size=3))
def test_k_turns_are_k_records_packed_and_alone(
    models: Callable[..., VLM],
    make_clip: Callable[..., FreshClip],
    attention: str,
    frames: str,
    lape: bool,
    drawn: list[Any],
) -> None:
    model = models(attention, frame_attention=frames, enable_lape=lape)
    assert_the_law(model, with_clips(drawn, make_clip))


def with_clips(drawn: list[Any], make_clip: Callable[..., FreshClip]) -> list[Talk]:
    clips = [make_clip(k, 1 + k, (4, 4 + k)) for k in range(4)]
    # times are of a clip: without one they are refused
    return [
        ([clips[k] for k in media], asked if media else [PLAIN] * len(asked), system)
        for media, asked, system in drawn
    ]


def assert_the_law(model: VLM, own: list[Talk]) -> None:
    apart = [batch_of(model, [[one]]) for talk in own for one in one_by_one(talk)]
    assert_the_same(model, [batch_of(model, [[talk] for talk in own])], apart)
    assert_the_same(model, [batch_of(model, [own])], apart)


@pytest.mark.parametrize(
    ("kind", "frames"),
    [("sliding", "block"), ("sliding", "token"), ("some", "block"), ("chunked", "block")],
)
def test_windows_reach_as_far_as_in_the_k_records(
    make_model: Callable[..., VLM], make_clip: Callable[..., FreshClip], kind: str, frames: str
) -> None:
    model = make_model(windowed(kind), frame_attention=frames, loss_weight=0, enable_lape=False)
    first, second = make_clip(2, 3), make_clip(3, 1)
    talk: Talk = ([first, second], ASKED[:3], "Be brief.")
    assert_the_law(model.double(), [talk, ([second], ASKED[3:], "")])


def windowed(kind: str) -> Any:
    """Return an LLM with windows of 7 tokens in all layers or every other one, or chunks of 7."""
    family = {"sliding": "mistral", "chunked": "llama4_text", "some": "gemma3_text"}[kind]
    llm_class, config = class_and_config(family)
    small = shrunk(config) | {"vocab_size": 512, "sliding_window": 7, "attention_chunk_size": 7}
    llm = llm_class(type(config).from_dict(small))
    limited = [reach for reach in reaches(text_config(llm)).values() if reach.limited]
    assert limited
    assert all(7 in (reach.window, reach.chunk) for reach in limited)
    return llm.eval()


def test_the_frames_of_a_clip_are_predicted_once(
    make_model: Callable[..., VLM], make_clip: Callable[..., FreshClip]
) -> None:
    model = make_model()
    talk: Talk = ([make_clip(1, 4)], ASKED, "")
    together = model(batch_of(model, [[talk]]))
    for one in one_by_one(talk):
        alone = model(batch_of(model, [[one]]))
        assert torch.equal(together["ar_count"], alone["ar_count"])
        torch.testing.assert_close(together["ar"], alone["ar"], rtol=1e-5, atol=1e-6)
    assert together["ar_count"].sum() == 3


THINK = TEMPLATES["chatml"].replace(
    "m.role + '\n' + m.content",
    "m.role + '\n' + ('<think></think>' if m.role == 'assistant' else '') + m.content",
)
SYSTEM_BEHIND = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content }}"
    "{% if loop.index0 and messages[loop.index0 - 1].role == 'system' %}"
    "{{ ' (' + messages[loop.index0 - 1].content + ')' }}{% endif %}{{ ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
NO_HEADER = (
    "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
"""An answer follows its question with nothing between."""
WRITTEN = {**TEMPLATES, "own": "", "think": THINK, "none": NO_HEADER}


@pytest.mark.parametrize("template", WRITTEN)
@pytest.mark.parametrize("system", ["", "Be brief."])
def test_each_turn_has_the_ids_that_its_own_record_has(
    make_tokenizer: Callable[[], Any],
    make_clip: Callable[..., FreshClip],
    template: str,
    system: str,
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = WRITTEN[template] or tokenizer.chat_template
    chat = Chat(tokenizer, None)
    asked = [*ASKED[:3], ("<|im_end|> what?", "<think>hm</think> yes"), ASKED[4]]
    talk: Talk = ([make_clip(1, 2), make_clip(2, 3)], asked, system)
    encoded = encode_apart(chat, made_independent(record_of(talk)), [2.0, 3.0])
    assert encoded.ids[encoded.turns[0] - 1] == MEDIA
    assert encoded.ids.count(MEDIA) == 2
    ends = [*encoded.turns[1:], len(encoded.ids)]
    for one, begin, end in zip(one_by_one(talk), encoded.turns, ends, strict=True):
        expected = chat.encode(record_of(one).turns, [2.0, 3.0])
        for name in ("ids", "axis", "coord", "supervised"):
            column = getattr(encoded, name)
            own = column[: encoded.turns[0]] + column[begin:end]
            assert own == getattr(expected, name), (template, name)


def test_a_first_token_that_is_learned_is_predicted_from_what_all_turns_see(
    make_model: Callable[..., VLM], make_clip: Callable[..., FreshClip]
) -> None:
    model = make_model(loss_weight=0, enable_lape=False).double()
    model.tokenizer.chat_template = NO_HEADER
    pairs = [("", "yes"), ("", "no"), ("", "at 0.5")]
    talk: Talk = ([make_clip(1, 2)], pairs, "")
    record = record_of(talk)
    turns = tuple(Turn(t.role, t.text.rstrip() + "!" * (t.text == "")) for t in record.turns)
    record = made_independent(Record("r", record.clips, turns, "", "here"))
    row = lay_out(
        encode_apart(Chat.of(model), record, [2.0]), [talk[0][0].info], model.config, "average"
    )
    assert row.turn is not None
    before = collate([row], [talk[0]], model.config, [""]).predict_index
    places = np.flatnonzero(row.supervised)
    expected = [
        int(
            np.flatnonzero(
                (row.position == row.position[p] - 1) & np.isin(row.turn, (0, row.turn[p]))
            )[0]
        )
        for p in places
    ]
    assert before.tolist() == expected


REFUSED = {
    "a second medium": (["<video> a", "b", "<video> c", "d"], "media in another turn"),
    "text before": (["a <video>", "b", "c", "d"], "text before them: 'a <video>'"),
    "text between": (["<video> or <video>", "b", "c", "d"], "text before them"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_turns_that_lack_what_they_need_are_refused_by_name(case: str) -> None:
    texts, words = REFUSED[case]
    turns = tuple(Turn(("user", "assistant")[k % 2], text) for k, text in enumerate(texts))
    with pytest.raises(RowError, match="turns: independent") as refused:
        made_independent(Record("r", ("c",), turns, "", "f:1"))
    assert words in str(refused.value)
    assert "turns: dialogue" in str(refused.value)
    assert refused.value.reason == ENTANGLED


@pytest.mark.parametrize("roles", ["aua", "uasua", "uaua"])
def test_questions_without_answers_of_their_own_are_refused(roles: str) -> None:
    names = {"u": "user", "a": "assistant", "s": "system"}
    record = Record("r", (), tuple(Turn(names[r], "text") for r in roles), "", "f:1")
    if roles == "uaua":
        assert made_independent(record).independent
    else:
        with pytest.raises(RowError, match="user, assistant, user, assistant"):
            made_independent(record)


def test_a_single_question_is_as_it_is_wherever_its_medium_stands() -> None:
    turns = (Turn("user", "What is <video>?"), Turn("assistant", "a clip"))
    record = Record("r", ("c",), turns, "", "f:1")
    assert made_independent(record) is record
