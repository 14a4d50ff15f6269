"""An answer and what it is scored against -> its scores, by kind.

Each kind has a function in `COORDINATES` or `WORDS`. An answer from which nothing can be read gets 0 for
scores from 0 to 1, and the whole range for errors: leaving it out would reward silence.
"""

import math
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

from shards.signed import Json
from train.scores.kinds import Asked, groups_of
from train.scores.overlap import (
    STRICTNESS,
    Tube,
    average_precision,
    box_iou,
    interval_iou,
    recall_at_one,
    tube_iou,
    windows_iou,
)
from train.scores.reading import Reading, read_coordinates, read_tube, read_windows, words_of
from train.scores.words import (
    decimals,
    folded,
    items_of,
    letter_of,
    number_of,
    one_number,
    without_thinking,
)

RECALLS = (0.3, 0.5, 0.7)
FAR = 1.5
"""A place or time so many times as far as its frame or medium reaches is of another scale: a guess just
beyond the end is none, and pixels, percent, thousandths, frames and milliseconds lie farther."""


def score(asked: Asked, said: str) -> Json:
    """Return the scores of one answer: `kind`, `parsed`, `run_on`, and those of its kind.

    parsed: 1 where a value could be read. run_on: 1 where it could not because the answer goes on.
    """
    if asked.kind in COORDINATES:
        read, compare = COORDINATES[asked.kind]
        reading = read(asked, said)
        out: Json = {"kind": asked.kind, "parsed": float(reading.parsed)}
        out["run_on"] = float(reading.run_on)
        out |= compare(asked, reading.numbers)
        if asked.kind == "mixed":
            same = words_of(asked.reference) == words_of(said)
            out["same_words"] = float(reading.parsed and same)
        return out
    return {"kind": asked.kind} | WORDS[asked.kind](asked, said)


def value_of(asked: Asked, said: str) -> Any:
    """Return the value read from an answer: numbers, a number, a letter, items, its words, or None."""
    if asked.kind in COORDINATES:
        return list(COORDINATES[asked.kind][0](asked, said).numbers) or None
    if asked.kind == "number":
        return one_number(said)
    if asked.kind == "choice":
        return letter_of(said, asked.options)
    return items_of(said) if asked.kind == "order" else without_thinking(said).strip()


def is_off_scale(asked: Asked, said: str) -> bool:
    """Return whether an answer's coordinates lie far outside the frame or the medium, see `FAR`.

    Such an answer is read and scores nothing, as if it were wrong; what is wrong is likely its unit.
    """
    if asked.kind not in COORDINATES:
        return False
    numbers = COORDINATES[asked.kind][0](asked, said).numbers
    letters = "".join(groups_of(asked.reference))
    if asked.kind in ("tube", "windows"):  # as many as the answer lists, not the reference
        rows = "tt" if asked.kind == "windows" else "txyxy"
        letters = "t" * (len(numbers) % len(rows)) + rows * (len(numbers) // len(rows))
    # of a picture, times have no end
    reach = {"t": asked.duration or math.inf, "x": 1.0, "y": 1.0}
    return any(
        number > FAR * reach[letter] for letter, number in zip(letters, numbers, strict=False)
    )


# -- coordinates; numbers: those that were read, or none


def of_time(asked: Asked, numbers: Sequence[float]) -> Json:
    """Return the absolute error in seconds."""
    return {"error": _error(asked.coordinates, numbers, asked.duration)}


def of_point(asked: Asked, numbers: Sequence[float]) -> Json:
    """Return the mean absolute error over x and y, as fractions of the frame."""
    return {"error": _error(asked.coordinates, numbers, 1.0)}


def of_span(asked: Asked, numbers: Sequence[float]) -> Json:
    """Return the IoU, whether it reaches each of `RECALLS`, and the mean error of start and end."""
    iou = interval_iou(asked.coordinates, numbers) if numbers else 0.0
    recalls = {f"r@{least}": float(iou >= least) for least in RECALLS}
    return {"iou": iou} | recalls | of_time(asked, numbers)


def of_box(asked: Asked, numbers: Sequence[float]) -> Json:
    """Return the IoU, whether it is 0.5 or more, and the mean error of the four sides."""
    iou = box_iou(asked.coordinates, numbers) if numbers else 0.0
    return {"iou": iou, "acc@0.5": float(iou >= 0.5)} | of_point(asked, numbers)


def of_windows(asked: Asked, numbers: Sequence[float]) -> Json:
    """Return the scores of QVHighlights, and the IoU of all windows together."""
    truth = list(zip(asked.coordinates[::2], asked.coordinates[1::2], strict=True))
    guess = list(zip(numbers[::2], numbers[1::2], strict=True))
    precisions = {least: average_precision(truth, guess, least) for least in STRICTNESS}
    return {
        "map": math.fsum(precisions.values()) / len(precisions),
        "map@0.5": precisions[0.5],
        "map@0.75": precisions[0.75],
        "r1@0.5": recall_at_one(truth, guess, 0.5),
        "r1@0.7": recall_at_one(truth, guess, 0.7),
        "iou": windows_iou(truth, guess),
    }


def of_tube(asked: Asked, numbers: Sequence[float]) -> Json:
    """Return the scores of HC-STVG: vIoU, its recalls, the IoU in time, and the mean box IoU."""
    viou = siou = tiou = 0.0
    if numbers:
        truth, guess = Tube.of(asked.coordinates), Tube.of(numbers)
        viou, siou = tube_iou(truth, guess)
        tiou = interval_iou((truth.start, truth.end), (guess.start, guess.end))
    recalls = {f"viou@{least}": float(viou >= least) for least in (0.3, 0.5)}
    return {"viou": viou} | recalls | {"tiou": tiou, "siou": siou}


def of_mixed(asked: Asked, numbers: Sequence[float]) -> Json:
    """Compare spans and boxes by their mean IoU, other times and places by their errors."""
    ious, times, places, begin = [], [], [], 0
    for group in groups_of(asked.reference):
        own = asked.coordinates[begin : begin + len(group)]
        said = numbers[begin : begin + len(group)]
        begin += len(group)
        # an IoU needs a start before its end: other pairs are compared number by number
        if group == "tt" and own[0] <= own[1]:
            ious.append(interval_iou(own, said) if said else 0.0)
        elif group == "xyxy" and own[0] <= own[2] and own[1] <= own[3]:
            ious.append(box_iou(own, said) if said else 0.0)
        elif group[0] == "t":
            times.append(_error(own, said, asked.duration))
        else:
            places.append(_error(own, said, 1.0))
    found = {"iou": ious, "error_time": times, "error_place": places}
    return {name: math.fsum(values) / len(values) for name, values in found.items() if values}


def _error(truth: Sequence[float], numbers: Sequence[float], most: float) -> float:
    """Return the mean absolute error, each at most the range `most`, which unread answers have too."""
    if not numbers:
        return most
    # at most the range: one wild number must not outweigh a hundred good answers
    errors = [min(abs(a - b), most) for a, b in zip(truth, numbers, strict=True)]
    return math.fsum(errors) / len(errors)


def _fixed(asked: Asked, said: str) -> Reading:
    return read_coordinates(asked.kind, asked.reference, said)


Read = Callable[[Asked, str], Reading]
Compare = Callable[[Asked, Sequence[float]], Json]
COORDINATES: dict[str, tuple[Read, Compare]] = {
    "time": (_fixed, of_time),
    "span": (_fixed, of_span),
    "point": (_fixed, of_point),
    "box": (_fixed, of_box),
    "windows": (lambda asked, said: read_windows(asked.reference, said), of_windows),
    "tube": (lambda asked, said: read_tube(asked.reference, said), of_tube),
    "mixed": (_fixed, of_mixed),
}


# -- words


def of_number(asked: Asked, said: str) -> Json:
    """Compare a number with as many decimals as the reference has; whole ones must be the same."""
    truth, guess = number_of(asked.reference), one_number(said)
    assert truth is not None
    if guess is None:
        return {"parsed": 0.0, "exact": 0.0}
    digits = decimals(asked.reference)
    return {"parsed": 1.0, "exact": float((round(guess, digits) if digits else guess) == truth)}


def of_choice(asked: Asked, said: str) -> Json:
    """Compare the chosen letters."""
    letter = letter_of(said, asked.options)
    same = letter == letter_of(asked.reference, asked.options)
    return {"parsed": float(letter is not None), "exact": float(same)}


def of_order(asked: Asked, said: str) -> Json:
    """Compare an order: equal or not, and the share of pairs in the right order."""
    truth, guess = items_of(asked.reference), items_of(said)
    # with an item left out or made up, pairs have no place in it
    if sorted(truth) != sorted(guess):
        return {"parsed": 0.0, "exact": 0.0, "pairs": 0.0}
    # Kendall's concordant pairs: of n items n (n - 1) / 2, each in the right order or not
    pairs = list(combinations(truth, 2))
    # <=: an item that stands twice is in the right order with itself
    right = [guess.index(a) <= guess.index(b) for a, b in pairs]
    share = sum(right) / len(pairs) if pairs else 1.0
    return {"parsed": 1.0, "exact": float(truth == guess), "pairs": share}


def of_caption(asked: Asked, said: str) -> Json:
    """Return ROUGE-L; CIDEr is computed over all captions, see `summary`."""
    from train.scores.captions import rouge_l

    return {"rouge_l": rouge_l(asked.reference, said)}


def of_text(asked: Asked, said: str) -> Json:
    """Compare texts without case, surrounding marks and repeated blanks."""
    return {"exact": float(folded(said) == folded(asked.reference))}


WORDS: dict[str, Callable[[Asked, str], Json]] = {
    "number": of_number,
    "choice": of_choice,
    "order": of_order,
    "caption": of_caption,
    "text": of_text,
}
