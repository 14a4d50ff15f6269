"""Chat templates: ours for tokenizers without one, and a fixed date for those that write today's."""

import re
from datetime import date
from pathlib import Path
from typing import Any

from model.config import CHAT_TEMPLATES
from model.family.limits import load_tokenizer
from shards.errors import UserError

TODAY = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
"""A template's call for today's date."""

TEMPLATES = {
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "plain": (
        "{% for m in messages %}{{ m.role + ': ' + m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    ),
    "vicuna": (
        "{% for m in messages %}{% if m.role == 'system' %}{{ m.content + ' ' }}"
        "{% elif m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}"
        "{% else %}{{ 'ASSISTANT: ' + m.content + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    ),
    "llama2": (
        "{% for m in messages %}{% if m.role == 'system' %}"
        "{{ '[INST] <<SYS>>\n' + m.content + '\n<</SYS>>\n\n' }}{% elif m.role == 'user' %}"
        "{% if loop.index0 == 0 or messages[loop.index0 - 1].role != 'system' %}"
        "{{ (bos_token if loop.index0 and bos_token is defined else '') + '[INST] ' }}{% endif %}"
        "{{ m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
}
"""Chat templates for tokenizers without one. Where a tokenizer puts a BOS before its texts, one is put
before the conversation too."""


def dated(template: str, today: date) -> str:
    """Return a chat template with the date in place of its calls for today's.

    Raises UserError for a call whose format is not a literal.
    """
    # a template that writes today's date would give other tokens tomorrow: a resumed
    # run would not be the same
    written = TODAY.sub(lambda call: repr(today.strftime(call[2])), template)
    if "strftime_now(" in written:
        raise UserError("the chat template asks for the date by a format that is not written in it")
    return written


def give_template(tokenizer: Any, name: str) -> None:
    """Set a tokenizer's chat template to one of `TEMPLATES`, which is then saved with it."""
    # asked by use: tokenizers differ in how they say that they begin texts with a BOS
    ids = tokenizer("a").input_ids
    starts = tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
    tokenizer.chat_template = ("{{ bos_token }}" if starts else "") + TEMPLATES[name]


def load_with_template(name: str | Path, template: str, rows: int | None = None) -> Any:
    """Load the tokenizer of a folder or Hub name; UserError where it does not fit the LLM.

    template: one of ours, or empty for its own. rows: of the LLM's input matrix, where known.
    """
    tokenizer = load_tokenizer(name, rows)
    if template:
        give_template(tokenizer, template)
    return tokenizer


assert set(TEMPLATES) == {*CHAT_TEMPLATES} - {""}
