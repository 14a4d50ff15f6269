"""Which frames the video processors of transformers take of a video; torch-free.

    processor_frames("qwen3_vl", total=300, rate=29.97, count=None, fps=2.0, most=768)

Of the same length and rate, frame for frame, what `sample_frames` of the processor gives.
"""

from collections.abc import Callable, Mapping

import numpy as np

LEAST = 4
"""Frames that Qwen-VL's processors take at least, of a video that has them: their `min_frames`."""
PAIR = 2
"""Frames of a unit of Qwen-VL's, their `temporal_patch_size`."""


def processor_frames(
    like: str, total: int, rate: float, count: int | None, fps: float | None, most: int | None
) -> list[int]:
    """Return the indices of the frames that a processor takes, rising, each once, one at least.

    like: a key of `RULES`; total, rate: of the video, frames and frames a second; count: frames to
    take, else fps, frames a second, `most` at most.
    """
    return RULES[like](total, rate, count, fps, most)


def _qwen2_vl(
    total: int, rate: float, count: int | None, fps: float | None, most: int | None
) -> list[int]:
    """Whole pairs, from the first frame on in equal steps, rounded down."""
    if count is not None:
        count = round(count / PAIR) * PAIR
    else:
        # an odd last frame would be half a unit: the processor leaves it out
        limit = min(most or total, total) // PAIR * PAIR
        count = int(min(max(_within(total, rate, fps), LEAST), limit)) // PAIR * PAIR
    if not 0 < count < total:
        return list(range(total))
    # steps in float32, as torch.arange makes them
    steps = np.arange(count, dtype=np.float64) * (total / count)
    return [int(k) for k in steps.astype(np.float32)]


def _qwen3_vl(
    total: int, rate: float, count: int | None, fps: float | None, most: int | None
) -> list[int]:
    """In equal steps from the first frame to the last, rounded to the nearest."""
    if count is None:
        count = min(max(int(_within(total, rate, fps)), LEAST), most or total)
    count = max(min(count, total), 1)
    return [int(k) for k in np.linspace(0, total - 1, count).round()]


def _llava(
    total: int, rate: float, count: int | None, fps: float | None, most: int | None
) -> list[int]:
    """In equal steps from the first frame on, rounded down."""
    if count is None:
        count = min(max(int(_within(total, rate, fps)), 1), most or total)
    count = min(count, total)
    return [k * total // count for k in range(count)]


def _within(total: int, rate: float, fps: float | None) -> float:
    """Return how many frames a video has at a rate; a still, which has none, has its one."""
    assert fps is not None
    return total / rate * fps if rate else 1.0


RULES: Mapping[str, Callable[[int, float, int | None, float | None, int | None], list[int]]] = {
    "qwen2_vl": _qwen2_vl,
    "qwen3_vl": _qwen3_vl,
    "llava": _llava,
}
"""Qwen2.5-VL's is Qwen2-VL's; LLaVA-OneVision's and LLaVA-NeXT-Video's are transformers' default."""
