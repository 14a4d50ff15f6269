"""Captions by ROUGE-L and CIDEr, as COCO's caption evaluation computes them (extra `scores`).

Texts are compared as words in lower case without punctuation, split here: COCO's own tokeniser is a
Java program.
"""

import re
from collections.abc import Sequence
from typing import Any

from shards.errors import UserError


def check_captions() -> None:
    """Raise UserError where pycocoevalcap, which compares captions, is not installed."""
    try:
        import pycocoevalcap.cider.cider
        import pycocoevalcap.rouge.rouge  # noqa: F401
    except ImportError as error:
        raise UserError(
            "there are captions to be scored, and ROUGE-L and CIDEr need pycocoevalcap",
            got=str(error),
            fix="pip install 'framebank[scores]'",
        ) from None


def rouge_l(reference: str, said: str) -> float:
    """Return ROUGE-L of a caption, from 0 to 1: recall counts 1.2 times as much as precision."""
    from pycocoevalcap.rouge.rouge import Rouge

    words = split(said)
    # an F-measure of the longest common subsequence, beta 1.2 (Lin 2004); of no words it is undefined
    return float(Rouge().calc_score([words], [split(reference)])) if words else 0.0


def cider(references: Sequence[str], said: Sequence[str]) -> float:
    """Return CIDEr of captions, from 0 to 10: n-grams weigh more the fewer references have them."""
    from pycocoevalcap.cider.cider import Cider

    truth: dict[int, Any] = {k: [split(text)] for k, text in enumerate(references)}
    guess: dict[int, Any] = {k: [split(text)] for k, text in enumerate(said)}
    # cosine of tf-idf weighted n-grams, n to 4, times 10 (Vedantam et al. 2015)
    return float(Cider().compute_score(truth, guess)[0])


def split(text: str) -> str:
    """Return a text's words in lower case, apart by blanks, without punctuation."""
    return " ".join(re.findall(r"\w+(?:'\w+)*", text.lower().replace("\u2019", "'")))
