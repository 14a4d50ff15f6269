"""Conversations as tokens: what is supervised, what stays text, and how coordinates are written."""

import re
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models
from transformers import PreTrainedTokenizerFast

from model.lape.tokens import LapeTokens
from shards.errors import UserError
from train.batches.chat import MEDIA, Chat, Encoded
from train.data.coordinates import in_numbers
from train.data.markup import kind_of
from train.data.records import Turn
from train.start.templates import give_template

LLAMA3 = (
    "{{ '<|begin_of_text|>' }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
HEADERS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
CLOSER = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "plain": "<|im_end|>"}
BLANK = {"chatml": "", "llama3": "", "plain": " "}
"""A blank before an answer is of its first token, and learned with it."""
TEMPLATES = list(CLOSER)
FORGERIES = [
    "<|im_end|>",
    "<|eot_id|>",
    "<|im_start|>assistant\n",
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "<|endoftext|>",
    "<|begin_of_text|>",
    "<s>",
    "</s>",
    "[INST]",
    "<TEMP-INPUT>",
    "assistant: ",
    "\ue0000\ue001",
]
BINS = (20, 30)
"""Anchors on the time axis, and on each of the other two."""


@pytest.fixture(scope="module")
def tokenizers(make_tokenizer: Callable[[], Any]) -> dict[str, Any]:
    found = {name: make_tokenizer() for name in TEMPLATES}
    # as Llama 3 has them: special, and none but the eos a named token of the tokenizer
    found["llama3"].add_tokens([AddedToken(name, special=True) for name in HEADERS])
    found["llama3"].chat_template = LLAMA3
    give_template(found["plain"], "plain")
    return found


@pytest.fixture(scope="module")
def chats(tokenizers: dict[str, Any]) -> dict[tuple[str, bool], Chat]:
    """By template and LAPE; the tokenizer has the anchors either way."""
    made = {}
    for name, tokenizer in tokenizers.items():
        anchors = LapeTokens.add_to(tokenizer, *BINS)
        made[name, True] = Chat(tokenizer, anchors)
        made[name, False] = Chat(tokenizer, None)
    return made


def turns_of(*texts: str) -> list[Turn]:
    return [Turn(("user", "assistant")[k % 2], text) for k, text in enumerate(texts)]


def answers_of(chat: Chat, encoded: Encoded) -> list[str]:
    """Return each run of supervised tokens as text."""
    pairs = zip(encoded.ids, encoded.supervised, strict=True)
    runs = groupby(pairs, key=lambda pair: pair[1])
    return [chat.tokenizer.decode([id_ for id_, _ in run]) for on, run in runs if on]


WHOLE = {
    "chatml": [
        ("<|im_start|>user\n <|im_end|>\n<|im_start|>assistant\n", False),
        ("two<|im_end|>", True),
        ("\n<|im_start|>user\nthree <|im_end|>\n<|im_start|>assistant\n", False),
        (" four<|im_end|>", True),
        ("\n", False),
    ],
    "llama3": [
        (
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n <|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            False,
        ),
        ("two<|eot_id|>", True),
        (
            "<|start_header_id|>user<|end_header_id|>\n\nthree <|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            False,
        ),
        (" four<|eot_id|>", True),
    ],
    "plain": [
        ("user:  \nassistant:", False),
        (" two<|im_end|>", True),
        ("\nuser: three \nassistant:", False),
        ("  four<|im_end|>", True),
        ("\n", False),
    ],
}
"""Of each template, a conversation of two rounds by hand: the text, and what of it is learned."""


@pytest.mark.parametrize("template", TEMPLATES)
def test_what_is_learned_of_two_rounds_is_as_written_by_hand(
    chats: dict[tuple[str, bool], Chat], template: str
) -> None:
    chat = chats[template, True]
    encoded = chat.encode(turns_of("<video> ", "two", "three ", " four"), [4.0])
    place = encoded.ids.index(MEDIA)
    assert not encoded.supervised[place]
    kept = [(k, on) for k, on in enumerate(encoded.supervised) if k != place]
    runs = [
        (chat.tokenizer.decode([encoded.ids[k] for k, _ in run]), on)
        for on, run in groupby(kept, key=lambda pair: pair[1])
    ]
    assert runs == WHOLE[template]


def test_a_template_that_trims_texts_trims_them_here(make_tokenizer: Callable[[], Any]) -> None:
    tokenizer = make_tokenizer()
    # as Llama 3's own does
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message['content']", "(message['content'] | trim)"
    )
    assert "trim" in tokenizer.chat_template
    chat = Chat(tokenizer, None)
    texts = ["  one ", "\n two", "three\n", "four "]
    encoded = chat.encode(turns_of(*texts), [])
    messages = [{"role": turn.role, "content": turn.text} for turn in turns_of(*texts)]
    assert chat.tokenizer.decode(encoded.ids) == tokenizer.apply_chat_template(
        messages, tokenize=False
    )
    assert answers_of(chat, encoded) == ["two<|im_end|>", "four<|im_end|>"]


def test_a_template_that_refuses_a_role_is_a_problem_of_the_record(
    make_tokenizer: Callable[[], Any],
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.name_or_path = "odd/model"
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role here') }}{% endif %}"
        + tokenizer.chat_template
    )
    chat = Chat(tokenizer, None)
    with pytest.raises(UserError, match=r"odd/model refuses the turns system, user.*no system"):
        chat.encode([Turn("system", "x"), *turns_of("a", "b")], [])


@pytest.fixture(scope="module")
def unigram() -> Chat:
    """A tokenizer whose control tokens are pieces of its plain vocabulary, as SentencePiece has them."""
    letters = sorted({*"<>/sabcdeiournt: ?!\n"})
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((c, -5.0) for c in letters)]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.Unigram(pieces, unk_id=0)),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    )
    give_template(tokenizer, "plain")
    return Chat(tokenizer, None)


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(
        st.lists(st.sampled_from(["<s>", "</s>", "a", "/", "s>", "<", "z", " "]), min_size=1).map(
            "".join
        ),
        min_size=2,
        max_size=2,
    )
)
def test_control_tokens_in_the_plain_vocabulary_cannot_be_forged_either(
    unigram: Chat, texts: list[str]
) -> None:
    encoded = unigram.encode(turns_of(*texts), [])
    assert [id_ for id_ in encoded.ids if id_ in (1, 2)] == [2]  # the one that closes the answer
    spelled = sum(len(text) for text in texts) + len("user: \nassistant: \n") + 1
    assert len(encoded.ids) <= spelled
    # the tokenizer alone would let it through
    plain = unigram.tokenizer(["a</s>"], split_special_tokens=True, add_special_tokens=False)
    assert 2 in plain.input_ids[0]


def controls(chat: Chat, ids: Sequence[int]) -> list[int]:
    """Return the tokens that the tokenizer itself calls special, in order."""
    special = [id_ for id_, token in chat.tokenizer.added_tokens_decoder.items() if token.special]
    return [id_ for id_ in ids if id_ in special]


@pytest.mark.parametrize("lape", [True, False])
@pytest.mark.parametrize("template", TEMPLATES)
def test_supervised_tokens_are_the_answers_and_their_closing_tokens(
    chats: dict[tuple[str, bool], Chat], template: str, lape: bool
) -> None:
    chat = chats[template, lape]
    turns = turns_of(
        "<video>\nWhen is the red circle visible at <x:0.5>?",
        "from <t:2.0> to <t:4.0>.",
        "Where?",
        "<x:0.3104><y:1.0>",
        "Is it?",
        "yes",
    )
    expected = (
        # 2 / 8 * 19 = 4.75, 4 / 8 * 19 = 9.5 (to even), 0.3104 * 29 = 9.0016
        ["from <TEMP-005> to <TEMP-010>.", "<WIDTH-009><HEIGHT-029>", "yes"]
        if lape
        else ["from 2.0 to 4.0.", "0.310 1.000 ", "yes"]
    )
    encoded = chat.encode(turns, [8.0])
    assert answers_of(chat, encoded) == [
        BLANK[template] + text + CLOSER[template] for text in expected
    ]
    assert chat.stop >= {chat.tokenizer.convert_tokens_to_ids(CLOSER[template])}


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_conversation_reads_as_its_template_renders_it(
    chats: dict[tuple[str, bool], Chat], template: str
) -> None:
    chat = chats[template, False]
    texts = ["<video> one", "two", "three", "four"]
    encoded = chat.encode(turns_of(*texts), [3.0])
    assert encoded.ids.count(MEDIA) == 1
    # the tag's place is kept: what comes before and after it is read apart
    place = encoded.ids.index(MEDIA)
    said = chat.tokenizer.decode(encoded.ids[:place])
    said += "<video>" + chat.tokenizer.decode(encoded.ids[place + 1 :])
    messages = [{"role": turn.role, "content": turn.text} for turn in turns_of(*texts)]
    assert said == chat.tokenizer.apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_prompt_is_the_beginning_of_the_conversation_that_answers_it(
    chats: dict[tuple[str, bool], Chat], template: str
) -> None:
    chat = chats[template, True]
    turns = turns_of("<video> When?", "at <t:1.0>", "Where?", "<x:0.5>")
    whole = chat.encode(turns, [4.0])
    for answer in (1, 3):
        prompt = chat.encode(turns, [4.0], answer=answer)
        assert prompt.ids == whole.ids[: len(prompt.ids)]
        assert whole.supervised[len(prompt.ids)], "the answer begins where the prompt ends"
        assert prompt.axis == whole.axis[: len(prompt.ids)]


@pytest.mark.parametrize("template", TEMPLATES)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_no_text_can_forge_a_control_token(
    chats: dict[tuple[str, bool], Chat], template: str, data: st.DataObject
) -> None:
    words = st.one_of(st.sampled_from(FORGERIES), st.text(st.characters(codec="ascii"), max_size=6))
    texts = data.draw(st.lists(st.lists(words).map("".join), min_size=2, max_size=6), label="texts")
    texts = texts[: len(texts) // 2 * 2]
    # markup is not at issue here
    texts = [re.sub(r"<(video|image|[txy]:)", "<", text) for text in texts]
    texts = [re.sub(r"<(TEMP|HEIGHT|WIDTH)-\d", r"<\1 ", text) for text in texts]
    chat = chats[template, True]
    encoded = chat.encode(turns_of(*texts), [])
    harmless = chat.encode(turns_of(*["a" for _ in texts]), [])
    assert controls(chat, encoded.ids) == controls(chat, harmless.ids)
    said = [BLANK[template] + text + CLOSER[template] for text in texts[1::2]]
    assert answers_of(chat, encoded) == said
    assert chat.tokenizer.decode(encoded.ids).count(CLOSER[template]) >= len(said)


def test_the_forgeries_would_work_on_the_plain_way(tokenizers: dict[str, Any]) -> None:
    # the check above can fail: tokenised as usual, the same text does give a control token
    ids = tokenizers["chatml"]("x<|im_end|>").input_ids
    assert tokenizers["chatml"].convert_tokens_to_ids("<|im_end|>") in ids


@given(
    seconds=st.floats(0, 100).map(lambda value: round(value, 3)),
    fraction=st.floats(0, 1).map(lambda value: round(value, 4)),
)
@settings(deadline=None)
def test_without_lape_seconds_have_one_decimal_and_fractions_three(
    chats: dict[tuple[str, bool], Chat], seconds: float, fraction: float
) -> None:
    chat = chats["chatml", False]
    markup = f"<t:{seconds:.3f}> then <y:{fraction:.4f}>"
    encoded = chat.encode(turns_of("<video>", markup), [128.0])
    (said,) = answers_of(chat, encoded)
    assert said == f"{seconds:.1f} then {fraction:.3f} <|im_end|>"
    assert set(encoded.axis) == {-1}


@given(
    duration=st.floats(0.5, 100),
    share=st.floats(0, 1),
    y=st.floats(0, 1).map(lambda value: round(value, 4)),
)
@settings(deadline=None)
def test_with_lape_coordinates_are_normalised_and_take_the_nearest_anchor(
    chats: dict[tuple[str, bool], Chat], duration: float, share: float, y: float
) -> None:
    chat = chats["chatml", True]
    seconds = round(duration * share, 3)
    encoded = chat.encode(turns_of("<video>", f"<t:{seconds:.3f}><y:{y:.4f}>"), [duration])
    found = [
        (axis, coord, chat.tokenizer.convert_ids_to_tokens(id_))
        for id_, axis, coord in zip(encoded.ids, encoded.axis, encoded.coord, strict=True)
        if axis >= 0
    ]
    assert [(axis, coord) for axis, coord, _ in found] == [(0, seconds / duration), (1, y)]
    for (_, coord, token), bins in zip(found, BINS, strict=True):
        number = int(token.strip("<>").partition("-")[2])
        distance = [abs(min(coord, 1.0) - k / (bins - 1)) for k in range(bins)]
        assert distance[number] == pytest.approx(min(distance), abs=1e-9)


def test_anchors_can_be_named(chats: dict[tuple[str, bool], Chat]) -> None:
    turns = turns_of("<video>", "<TEMP-019> <HEIGHT-000><WIDTH-010>")
    encoded = chats["chatml", True].encode(turns, [6.0])
    (said,) = answers_of(chats["chatml", True], encoded)
    assert said == "<TEMP-019> <HEIGHT-000><WIDTH-010><|im_end|>"
    coords = [c for c, axis in zip(encoded.coord, encoded.axis, strict=True) if axis >= 0]
    assert coords == [1.0, 0.0, 10 / 29]
    # without anchors the names mean LLaVA-ST's hundred
    off = chats["chatml", False].encode(turns_of("<video>", "<TEMP-099><WIDTH-033>"), [6.0])
    assert answers_of(chats["chatml", False], off) == ["6.00.333 <|im_end|>"]


def test_anchors_by_name_are_scored_as_what_they_mean(
    chats: dict[tuple[str, bool], Chat],
) -> None:
    text = "from <TEMP-019> to <t:1.50> at <WIDTH-010><HEIGHT-000>"
    assert in_numbers(text, 6.0, chats["chatml", True].counts) == (
        "from <t:6.000000> to <t:1.50> at <x:0.344828><y:0.000000>"
    )
    assert in_numbers("<TEMP-033>", 9.0, chats["chatml", False].counts) == "<t:3.000000>"
    assert kind_of("<TEMP-001> <TEMP-002>") == "span"
    assert kind_of("<WIDTH-001><HEIGHT-002><x:1><y:1>") == "box"


def test_an_anchor_that_the_model_lacks_is_refused(chats: dict[tuple[str, bool], Chat]) -> None:
    with pytest.raises(UserError, match="anchor 020 of time: the model has 20, 000 to 019"):
        chats["chatml", True].encode(turns_of("<video>", "<TEMP-020>"), [6.0])


def test_times_are_shares_of_their_own_medium(chats: dict[tuple[str, bool], Chat]) -> None:
    turns = turns_of("<video> <t:1> <video> <t:1>", "<t:2>", "again", "<t:4>")
    encoded = chats["chatml", True].encode(turns, [4.0, 8.0])
    coords = [c for c, axis in zip(encoded.coord, encoded.axis, strict=True) if axis == 0]
    assert coords == [1 / 4, 1 / 8, 2 / 8, 4 / 8]
    assert encoded.ids.count(MEDIA) == 2
    # text before the first tag speaks of the first medium
    early = chats["chatml", True].encode(turns_of("<t:1> <image>", "x"), [4.0])
    assert [c for c, axis in zip(early.coord, early.axis, strict=True) if axis == 0] == [1 / 4]


@pytest.mark.parametrize("lape", [True, False])
@pytest.mark.parametrize(("text", "durations"), [("<video> <t:0>", [0.0]), ("<t:3.5>", [])])
def test_a_time_without_a_clip_to_lie_in_is_refused(
    chats: dict[tuple[str, bool], Chat], lape: bool, text: str, durations: list[float]
) -> None:
    with pytest.raises(UserError, match=r"<t:[\d.]+>: there is no clip with a duration"):
        chats["chatml", lape].encode(turns_of(text, "x"), durations)
    # a place in a picture needs no duration
    chats["chatml", lape].encode(turns_of(text.partition("<t")[0] + "<x:0.5>", "x"), durations)


@pytest.mark.parametrize(("text", "durations"), [("<video><video>", [1.0]), ("x", [1.0])])
def test_tags_and_media_that_do_not_fit_are_refused(
    chats: dict[tuple[str, bool], Chat], text: str, durations: list[float]
) -> None:
    with pytest.raises(UserError, match="write one tag per medium"):
        chats["chatml", False].encode(turns_of(text, "x"), durations)


def test_a_template_that_drops_a_turn_is_refused(make_tokenizer: Callable[[], Any]) -> None:
    tokenizer = make_tokenizer()
    tokenizer.name_or_path = "odd/model"
    tokenizer.chat_template = tokenizer.chat_template.replace("in messages", "in messages[-2:]")
    with pytest.raises(UserError, match=r"odd/model shows the turns \[2, 3\] of 4"):
        Chat(tokenizer, None)


def test_a_template_that_never_closes_an_answer_is_refused(
    make_tokenizer: Callable[[], Any],
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content + '\n' }}{% endfor %}"
    with pytest.raises(UserError, match="closes an answer by no special token"):
        Chat(tokenizer, None)
