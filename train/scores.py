"""Answers and references -> scores."""

import math
import re
from collections import defaultdict
from collections.abc import Sequence

from shards.signed import Json
from train.data.markup import MARKUP, kind_of

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
RECALLS = (0.3, 0.5, 0.7)


def numbers_of(text: str) -> list[float]:
    """Return the numbers of an answer: those in markup where there is any, else the plain ones."""
    marked = [float(match.group(2)) for match in MARKUP.finditer(text) if match.group(2)]
    return marked or [float(number) for number in NUMBER.findall(text)]


def score(reference: str, said: str, duration: float) -> Json:
    """Return the scores of one answer, by what its reference is; unparsable answers get 0."""
    kind = kind_of(reference)
    if kind == "text":
        same = " ".join(said.lower().split()) == " ".join(reference.lower().split())
        return {"kind": kind, "exact": float(same)}
    truth, guess = numbers_of(reference), numbers_of(said)
    parsed = len(guess) >= len(truth)
    out: Json = {"kind": kind, "parsed": float(parsed)}
    guess = guess[: len(truth)]
    if kind == "span":
        out["iou"] = interval_iou(truth, guess) if parsed else 0.0
        out |= {f"r@{level}": float(out["iou"] >= level) for level in RECALLS}
    elif kind == "box":
        out["iou"] = box_iou(truth, guess) if parsed else 0.0
    # an unparsable answer errs by the whole range
    error = [abs(a - b) for a, b in zip(truth, guess, strict=True)] if parsed else []
    limit = duration if kind in ("span", "time") else 1.0
    out["error"] = sum(error) / len(error) if error else limit
    return out


def interval_iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the overlap of two intervals over their union; an inverted one is put in order."""
    a, b = sorted(a), sorted(b)
    union = max(a[1], b[1]) - min(a[0], b[0])
    return max(0.0, min(a[1], b[1]) - max(a[0], b[0])) / union if union > 0 else 0.0


def box_iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the overlap of two boxes x1 y1 x2 y2 over their union."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1]) for box in (a, b)]
    union = sum(areas) - width * height
    return width * height / union if union > 0 else 0.0


def constant_span(spans: Sequence[tuple[str, float]]) -> float:
    """Return the mIoU of the best single answer, as shares of the clip, found with the answers known.

    A model that has not looked at the videos cannot do better.
    """
    shares = [[n / duration for n in numbers_of(reference)] for reference, duration in spans]
    grid = [k / 20 for k in range(21)]
    guesses = [(start, end) for start in grid for end in grid if start < end]
    return max(sum(interval_iou(share, guess) for share in shares) for guess in guesses) / len(
        shares
    )


def summarise_scores(scores: Sequence[Json]) -> Json:
    """Return the mean of each score, by kind."""
    by_kind: dict[str, list[Json]] = defaultdict(list)
    for entry in scores:
        by_kind[entry["kind"]].append(entry)
    return {
        kind: {"count": len(entries)}
        | {
            name: math.fsum(entry[name] for entry in entries) / len(entries)
            for name in entries[0]
            if name != "kind"
        }
        for kind, entries in sorted(by_kind.items())
    }


def table(report: Json) -> str:
    """Return a report as people read it."""
    losses = report["losses"]
    lines = [f"{report['records']} records, {report['answers']} answers"]
    shown = ("ce_loss", "autoregressive_loss", "ar_copy_baseline", "ar_skill")
    lines.append("  ".join(f"{name} {losses[name]:.4f}" for name in shown if name in losses))
    for kind, entry in report["tasks"].items():
        parts = [f"{kind:6} n={entry['count']:<5}"]
        parts += [f"{name} {value:.3f}" for name, value in entry.items() if name != "count"]
        lines.append("  ".join(parts))
    if "constant_span_miou" in report:
        lines.append(f"best constant span: mIoU {report['constant_span_miou']:.3f}")
    return "\n".join(lines)
