"""Captions: what COCO's library says of them, against both formulas written out.

pytest tests/train/scores/test_captions.py
"""

import math
from collections import Counter

import pytest

from train.scores.captions import cider, rouge_l, split
from train.scores.kinds import asked
from train.scores.scoring import score
from train.scores.summary import summarise_scores

pytest.importorskip("pycocoevalcap", reason="pip install 'framebank[scores]'")

TRUTH = [
    "A man in white walks to the car.",
    "A dog runs over the grass.",
    "She sits down, and eats!",
]
SAID = ["a man walks to a red car", "a dog runs over the grass", "He sleeps."]


def common(a: list[str], b: list[str]) -> int:
    """Return the length of the longest common subsequence."""
    if not a or not b:
        return 0
    if a[0] == b[0]:
        return 1 + common(a[1:], b[1:])
    return max(common(a[1:], b), common(a, b[1:]))


@pytest.mark.parametrize(("truth", "said"), [*zip(TRUTH, SAID, strict=True), (TRUTH[0], TRUTH[1])])
def test_rouge_l_weighs_the_longest_common_subsequence(truth: str, said: str) -> None:
    a, b = split(truth).split(), split(said).split()
    shared = common(a, b)
    recall, precision, beta = shared / len(a), shared / len(b), 1.2
    below = recall + beta**2 * precision
    expected = (1 + beta**2) * recall * precision / below if below else 0.0
    assert rouge_l(truth, said) == pytest.approx(expected)


def test_cider_weighs_n_grams_by_how_rare_they_are() -> None:
    def grams(text: str, n: int) -> Counter[tuple[str, ...]]:
        words = split(text).split()
        return Counter(tuple(words[k : k + n]) for k in range(len(words) - n + 1))

    total = 0.0
    for n in (1, 2, 3, 4):
        seen = Counter(gram for text in TRUTH for gram in grams(text, n))
        found = Counter(gram for text in TRUTH for gram in set(grams(text, n)))
        assert set(seen) == set(found)

        def weights(text: str, n: int = n, found: Counter = found) -> dict:  # type: ignore[type-arg]
            counts = grams(text, n).items()
            return {g: c * (math.log(3) - math.log(max(1, found[g]))) for g, c in counts}

        for truth, said in zip(TRUTH, SAID, strict=True):
            a, b = weights(truth), weights(said)
            lengths = [math.sqrt(sum(v * v for v in w.values())) for w in (a, b)]
            dot = sum(min(b[g], a[g]) * a[g] for g in b if g in a)
            apart = len(split(said).split()) - len(split(truth).split())
            fair = math.exp(-(apart**2) / 72)
            total += 10 * dot / math.prod(lengths) * fair / 4 / 3 if all(lengths) else 0
    assert cider(TRUTH, SAID) == pytest.approx(total, rel=1e-6)
    assert cider(TRUTH, TRUTH) > 5 > cider(TRUTH, SAID) > cider(TRUTH, ["", "", ""]) == 0


def test_captions_are_scored_in_the_summary() -> None:
    about = [asked(text, task="caption") for text in TRUTH]
    scores = [score(*pair) for pair in zip(about, SAID, strict=True)]
    found = summarise_scores(about, SAID, scores)["caption"]
    assert found["count"] == 3
    assert found["rouge_l"] == pytest.approx(sum(map(rouge_l, TRUTH, SAID)) / 3)
    assert found["cider"] == pytest.approx(cider(TRUTH, SAID))
    assert score(about[0], "")["rouge_l"] == 0
    assert score(about[0], "a MAN in white: walks to the car")["rouge_l"] == 1
