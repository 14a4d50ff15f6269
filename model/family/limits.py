"""An LLM's limits, checked: tokens of a row, and ids of its tokenizer; torch-free."""

from typing import Any, NamedTuple

from shards.errors import UserError, first_line

SAMPLE = "When does it begin? From 12.5 s to 14, on the left."
FIX = "put the tokenizer's files beside the weights: tokenizer.json, tokenizer_config.json"
FEWEST_TOKENS = 32
"""Least vocabulary: transformers invents one of a single token where a folder has no tokenizer."""
MOST_SANE = 10**9
"""Above it a tokenizer's `model_max_length` means that none is set."""
LENGTHS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length")


def context_length(config: dict[str, Any], tokenizer_limit: float | None = None) -> int | None:
    """Return an LLM's longest row in tokens; None where neither config nor tokenizer states one.

    config: its config.json. tokenizer_limit: its `model_max_length`. Scaled rotary positions reach
    further than `max_position_embeddings` where that still is the length before scaling.
    """
    inner = config.get("text_config") or config
    limits = [inner[name] for name in LENGTHS if isinstance(inner.get(name), int)]
    scaling = inner.get("rope_parameters") or inner.get("rope_scaling") or {}
    before = scaling.get("original_max_position_embeddings")
    if limits and before and scaling.get("factor"):
        # YaRN and Llama 3's scaling: some configs state the length before it, some the one after
        limits = [max(limits[0], int(before * scaling["factor"]))]
    found = [limits[0]] if limits else []
    if tokenizer_limit is not None and 0 < tokenizer_limit < MOST_SANE:
        found.append(int(tokenizer_limit))
    return min(found, default=None)


def check_context(tokens: int, limit: int | None, what: str, fix: str) -> None:
    """Raise UserError where a row has more tokens than the LLM's limit.

    what: the row in words. fix: the change that helps.
    """
    if limit is not None and tokens > limit:
        raise UserError(
            f"{what} has {tokens} tokens, and the LLM reads {limit} (max_position_embeddings of its "
            "config.json, model_max_length of its tokenizer_config.json)",
            fix=fix,
        )


class Apart(NamedTuple):
    """Up to where an LLM computes a record as if nothing were beside it."""

    tokens: int
    """Of a row, or of any record."""
    by_row: bool
    """Whether of a row: a token's place in it counts, whatever its position in its record is."""
    why: str


def apart_up_to(config: dict[str, Any]) -> Apart | None:
    """Return up to where records of a batch do not change each other; None without such a limit.

    config: an LLM's config.json. So transformers computes it, for lengths that no tiny twin reaches.
    """
    inner = config.get("text_config") or config
    # Llama 4, in its layers without rotary positions
    if inner.get("attn_temperature_tuning") and 0 in (inner.get("no_rope_layers") or ()):
        scale = int(inner.get("floor_scale") or 8192)
        why = f"it scales attention by the place in a row, from token {scale} on (floor_scale)"
        return Apart(scale - 1, by_row=True, why=why)
    rope = inner.get("rope_parameters") or inner.get("rope_scaling") or {}
    # some families have parameters for each kind of layers
    for own in (rope, *(one for one in rope.values() if isinstance(one, dict))):
        # Phi-3's first configs call it su, or yarn
        if "long_factor" in own or "longrope" in (own.get("rope_type"), own.get("type")):
            places = (own, inner)
            lengths = [one.get("original_max_position_embeddings") for one in places]
            length = next(filter(None, lengths), inner.get("max_position_embeddings", 0))
            why = f"longrope turns all records of a batch otherwise where one is beyond {length} tokens"
            return Apart(int(length), by_row=False, why=why)
    return None


def load_tokenizer(where: Any, rows: int | None = None) -> Any:
    """Load the tokenizer of a model folder or Hub name; UserError where it does not fit the LLM.

    rows: of the LLM's input matrix, where known.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
    except ValueError as error:  # many lines, where no tokenizer's files are found
        if "trust_remote_code" in str(error):
            raise UserError(
                "its tokenizer is code of its own, which is never run",
                where=where,
                fix="put a tokenizer.json of the same vocabulary there, or take another LLM",
            ) from None
        said = f"its tokenizer does not load: {first_line(error)}"
        raise UserError(said, where=where, fix=FIX) from None
    check_tokenizer(tokenizer, rows, where)
    return tokenizer


def check_tokenizer(tokenizer: Any, rows: int | None, where: object) -> None:
    """Raise UserError where a tokenizer is empty, loses text or has ids beyond the LLM's `rows`.

    transformers builds a tokenizer of one token, without an error, from a folder without its files.
    """
    if len(tokenizer) < FEWEST_TOKENS:
        raise UserError(
            f"no tokenizer here: it knows {len(tokenizer)} tokens", where=where, fix=FIX
        )
    ids = tokenizer(SAMPLE, add_special_tokens=False).input_ids
    back = tokenizer.decode(ids)
    # without blanks and capitals, which some tokenizers drop by design (uncased ones)
    if _letters(back) != _letters(SAMPLE):
        raise UserError(
            f"its tokenizer loses text: {SAMPLE!r} comes back as {back!r}", where=where, fix=FIX
        )
    added = set(tokenizer.get_added_vocab())
    beyond = {
        token: id_
        for token, id_ in tokenizer.get_vocab().items()
        if rows is not None and id_ >= rows and token not in added
    }
    if beyond:
        token, id_ = max(beyond.items(), key=lambda item: item[1])
        raise UserError(
            f"its tokenizer is of another LLM: it writes ids up to {id_} ({token!r}), and the LLM "
            f"has {rows} rows",
            where=where,
            fix=FIX,
        )


def _letters(text: str) -> str:
    return "".join(text.split()).lower()
