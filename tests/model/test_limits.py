"""Context lengths and tokenizers: what an LLM cannot take is refused, each in one line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from model.family.limits import check_tokenizer, context_length, load_tokenizer
from model.generate import generate
from shards.errors import UserError
from train.batches.lengths import tokenizer_digest

YARN = {"factor": 4.0, "original_max_position_embeddings": 32768}
LLAMA3 = {"factor": 8.0, "original_max_position_embeddings": 8192}
CONTEXTS: list[tuple[dict[str, Any], float | None, int | None]] = [
    ({"max_position_embeddings": 4096}, None, 4096),
    ({"n_positions": 1024}, 1e30, 1024),
    ({"max_position_embeddings": 4096}, 2048, 2048),
    ({"max_position_embeddings": 32768, "rope_scaling": YARN}, 131072, 131072),
    ({"max_position_embeddings": 131072, "rope_parameters": LLAMA3}, None, 131072),
    ({"text_config": {"max_position_embeddings": 77}}, None, 77),
    ({"model_type": "bloom"}, None, None),
    ({"model_type": "bloom"}, 300, 300),
]


@pytest.mark.parametrize(("config", "tokenizer", "expected"), CONTEXTS)
def test_the_context_is_the_shorter_of_what_llm_and_tokenizer_say(
    config: dict[str, Any], tokenizer: float | None, expected: int | None
) -> None:
    assert context_length(config, tokenizer) == expected


def test_a_prompt_that_leaves_no_room_for_its_answer_is_refused(
    make_llm: Callable[..., Any],
    make_model: Callable[..., Any],
    make_batch: Callable[..., Any],
) -> None:
    model = make_model()
    batch = make_batch(model, ([], "Where is it?"), prompt=True)
    tokens = int(batch.lengths[0])
    model.llm.config.max_position_embeddings = tokens + 4
    assert len(generate(model, batch, stop=frozenset(), max_new_tokens=4)[0]) == 4
    expected = (
        rf"a prompt with 5 new tokens has {tokens + 5} tokens, and the LLM reads {tokens + 4} .*; "
        "use fewer than 5 new tokens, or fewer frames"
    )
    with pytest.raises(UserError, match=expected) as refused:
        generate(model, batch, stop=frozenset(), max_new_tokens=5)
    assert "\n" not in str(refused.value)


def test_a_folder_without_a_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    for kind in ("qwen2", "llama"):
        folder = tmp_path / kind
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": kind}))
        for refused in (load_tokenizer, lambda where: tokenizer_digest(str(where))):
            with pytest.raises(
                UserError, match=rf"{kind}: .*tokenizer.*; put the tokenizer's files"
            ):
                refused(folder)


def test_a_tokenizer_of_another_llm_is_refused(make_tokenizer: Callable[[], Any]) -> None:
    tokenizer = make_tokenizer()
    check_tokenizer(tokenizer, 512, "here")
    with pytest.raises(UserError, match=r"here: its tokenizer is of another LLM: .* 200 rows"):
        check_tokenizer(tokenizer, 200, "here")
    known = len(tokenizer)
    tokenizer.add_tokens(["<a-token-of-its-own>"], special_tokens=True)
    check_tokenizer(tokenizer, known, "here")  # as of coordinates: no row is read for it


def test_a_tokenizer_that_loses_text_is_refused(make_tokenizer: Callable[[], Any]) -> None:
    tokenizer = make_tokenizer()
    whole = tokenizer.decode
    tokenizer.decode = lambda ids: whole(ids[:-3])
    with pytest.raises(UserError, match=r"here: its tokenizer loses text: 'When does it begin\?"):
        check_tokenizer(tokenizer, 512, "here")


def test_tokenizers_in_files_of_other_names_have_digests_of_their_own(
    make_tokenizer: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = set()
    for number in range(2):
        folder = tmp_path / str(number)
        tokenizer = make_tokenizer()
        tokenizer.add_tokens([f"<{number}>"])
        tokenizer.save_pretrained(folder)
        monkeypatch.setattr("train.batches.lengths.TOKENIZER_FILES", ("chat_template.jinja",))
        digests.add(tokenizer_digest(str(folder)))
    assert len(digests) == 2
