"""Eight questions on a clip of 65 tokens: `turns: independent`, beside one record for each question.

Forward and backward of the language loss, the same clips and questions both ways, with equal losses.
The LLM has the shape of Qwen2.5-0.5B with fewer and narrower layers; a question has 12 tokens with what
the template writes, its answer 8. Interleaved, medians of rounds; ratios are what counts.
"""

import statistics
import time
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from model.batch import Batch
from model.vlm import VLM, VLMConfig
from tests.bench._mix import Mix, make_vlm, vocab_of
from tests.bench.training import SMALL
from train.batches.chat import MEDIA, Encoded
from train.batches.collate import Row, collate, lay_out, pack

QUESTIONS, ASKED, ANSWERED = 8, 12, 8
CLIPS, FRAMES, STRIDE = 4, 13, 12
"""Clips of a batch; frames of a clip, each of 2 x 2 cells and the token that closes it."""
ROUNDS = 5


def talks_of(vocab: int) -> list[list[list[int]]]:
    """Return the ids of each clip's questions with their answers."""
    rng = np.random.default_rng(0)
    ids: list[list[list[int]]] = rng.integers(
        5, vocab, (CLIPS, QUESTIONS, ASKED + ANSWERED)
    ).tolist()
    return ids


def encoded(questions: list[list[int]]) -> Encoded:
    """Return questions about one medium, which do not see each other where they are several."""
    ids = [MEDIA, *(id_ for one in questions for id_ in one)]
    learned = [False, *([False] * ASKED + [True] * ANSWERED) * len(questions)]
    starts = tuple(range(1, len(ids), ASKED + ANSWERED)) if len(questions) > 1 else ()
    return Encoded(ids, [-1] * len(ids), [0.0] * len(ids), learned, starts)


def seconds_of(model: VLM, batch: Batch) -> tuple[float, float]:
    """Return the seconds of a forward and backward, and the loss."""
    model.zero_grad(set_to_none=True)
    began = time.perf_counter()
    loss = model(batch)["ce"]
    loss.backward()
    return time.perf_counter() - began, loss.item()


def run() -> list[dict[str, object]]:
    vocab = vocab_of(512, SMALL["num_hidden_layers"], SMALL["intermediate_size"], 128)
    mix = Mix(CLIPS, vocab, scale=4)
    clips = [mix._clip(FRAMES, np.random.default_rng(k)) for k in range(CLIPS)]
    config = VLMConfig(
        slow_stride=STRIDE,
        fast_stride=STRIDE,
        slow_frame_ratio="1",
        enable_lape=False,
        loss_weight=0,
    )
    with TemporaryDirectory() as folder:
        model = make_vlm(mix, Path(folder) / "tokenizer", **SMALL)
    talks = talks_of(vocab)

    def laid(clip: int, questions: list[list[int]]) -> Row:
        return lay_out(encoded(questions), [clips[clip].info], config, "average")

    def batch(rows: list[list[tuple[int, list[list[int]]]]]) -> Batch:
        media = [[clips[clip] for clip, _ in row] for row in rows]
        packed = [pack([laid(*one) for one in row]) for row in rows]
        return collate(packed, media, config, [""] * len(rows))

    single = [(clip, [one]) for clip, own in enumerate(talks) for one in own]
    forms = {
        "independent turns": batch([[(clip, own)] for clip, own in enumerate(talks)]),
        "one record each, a row each": batch([[one] for one in single]),
        "one record each, packed": batch(
            [single[a:b] for a, b in pairwise(range(0, len(single) + 1, QUESTIONS))]
        ),
    }
    taken: dict[str, list[float]] = {name: [] for name in forms}
    for number in range(ROUNDS + 1):
        found = {name: seconds_of(model, own) for name, own in forms.items()}
        losses = [loss for _, loss in found.values()]
        np.testing.assert_allclose(losses, losses[0], rtol=1e-5)
        for name, (seconds, _) in found.items():
            if number:  # the first warms up
                taken[name].append(seconds)
    asked = CLIPS * QUESTIONS
    median = {name: statistics.median(own) for name, own in taken.items()}
    return [
        {
            "what": name,
            "tokens a question": int(own.lengths.sum()) / asked,
            "ms a question": 1000 * median[name] / asked,
            "questions/s of independent over it (bar 2.5)": median[name]
            / median["independent turns"],
        }
        for name, own in forms.items()
    ]
