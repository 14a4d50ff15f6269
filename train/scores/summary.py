"""Scores of all answers -> a report, and the report as a table."""

import math
from collections import defaultdict
from collections.abc import Sequence

from shards.signed import Json
from train.scores.captions import cider
from train.scores.kinds import Asked
from train.scores.overlap import interval_iou

OFF_SCALE = (
    "lie far outside the frame or the clip, as pixels, percent, frames or milliseconds do: places are "
    "read as fractions from 0 to 1, times as seconds"
)


def summarise_scores(asked: Sequence[Asked], said: Sequence[str], scores: Sequence[Json]) -> Json:
    """Return the mean of each score by kind, over the answers that have it; for captions CIDEr too."""
    by_kind: dict[str, list[Json]] = defaultdict(list)
    for entry in scores:
        by_kind[entry["kind"]].append(entry)
    out: Json = {}
    for kind, entries in sorted(by_kind.items()):
        out[kind] = {"count": len(entries)}
        for name in dict.fromkeys(name for entry in entries for name in entry if name != "kind"):
            values = [entry[name] for entry in entries if name in entry]
            # fsum is exact: the same mean for any order of the answers, so for any number of ranks
            out[kind][name] = math.fsum(values) / len(values)
    captions = [
        (a.reference, text) for a, text in zip(asked, said, strict=True) if a.kind == "caption"
    ]
    if captions:
        out["caption"]["cider"] = cider(*zip(*captions, strict=True))
    return out


def constant_span(asked: Sequence[Asked]) -> float | None:
    """Return the mIoU of the best single span, as shares of each clip; None where no span is asked for.

    The span is chosen with the answers known: no fixed answer, so no model that ignores both video and
    question, scores more (on a grid of twentieths).
    """
    spans = [a for a in asked if a.kind == "span"]
    if not spans:
        return None
    shares = [[n / a.duration for n in a.coordinates] for a in spans]
    # twentieths: 210 spans, each compared with every answer
    grid = [k / 20 for k in range(21)]
    guesses = [(start, end) for start in grid for end in grid if start < end]
    return max(sum(interval_iou(share, guess) for share in shares) for guess in guesses) / len(
        shares
    )


def table(report: Json) -> str:
    """Return a report as the lines that are printed."""
    losses = report.get("losses", {})
    lines = [f"{report['records']} records, {report['answers']} answers"]
    if "limits" in report:
        lines.append(limits_line(report["limits"]))
    frames = "autoregressive_loss", *(f"ar_{name}_baseline" for name in ("copy", "affine", "ridge"))
    shown = ("ce_loss", *frames, "ar_skill")
    if losses:
        lines.append("  ".join(f"{name} {losses[name]:.4f}" for name in shown if name in losses))
    if "ar_copy_baseline" in losses and "ar_ridge_baseline" not in losses:
        lines.append("no ar_skill: floor.safetensors, which a run writes, is not beside the model")
    for kind, entry in report["tasks"].items():
        parts = [f"{kind:7} n={entry['count']:<5}"]
        parts += [f"{name} {value:.3f}" for name, value in entry.items() if name != "count"]
        lines.append("  ".join(parts))
    if "constant_span_miou" in report:
        lines.append(f"best constant span: mIoU {report['constant_span_miou']:.3f}")
    # a model that has not learned to end its answers does not end longer ones
    cut = {} if report.get("untrained") else report.get("cut", {})
    for kind, count in cut.items():
        lines.append(
            f"{count} of {report['tasks'][kind]['count']} {kind} answers had not ended when they were "
            "cut; raise --max_new_tokens"
        )
    off = {} if report.get("untrained") else report.get("off_scale", {})
    lines += [
        f"{count} of {report['tasks'][kind]['count']} {kind} answers {OFF_SCALE}"
        for kind, count in off.items()
    ]
    return "\n".join(lines)


def limits_line(limits: Json) -> str:
    """Return in words which frames of a test set's records were used."""
    line = (
        f"frames as in training: {limits['max_frames_num']} of a clip at most, "
        f"{limits['frame_sampling_strategy']} {limits['slow_frame_ratio']}"
    )
    if limits["frame_time"] != "none":
        line += ", with their times"
    if limits["max_tokens"]:
        line += f"; of records of {limits['max_tokens']} tokens at most"
    if limits["frames_left_out"]:
        wanted = limits["frames"] + limits["frames_left_out"]
        line += (
            f", which leaves out {limits['frames_left_out']:,} of {wanted:,} frames, in "
            f"{limits['records_shortened']:,} records"
        )
    if limits["records_too_long"]:
        line += f"; {limits['records_too_long']:,} are longer with one frame, and have that one"
    return line
