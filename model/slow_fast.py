"""Which frames are taken, and which of them are slow: integer arithmetic, no torch.

The same `uniform_indices` samples a video for the bank, subsamples banked frames for training and
places the slow frames of the `uniform` strategy.
"""

from fractions import Fraction

from shards.errors import UserError

STRATEGIES = ("interleave", "first_slow", "uniform")


def uniform_indices(total: int, count: int) -> list[int]:
    """Return `count` of `range(total)`: floor(k (total - 1) / (count - 1)), one gives 0.

    A `count` above `total` returns all of them once, never a repeat.
    """
    assert total >= 1
    assert count >= 1
    count = min(count, total)
    if count == 1:
        return [0]
    # integers: a floating-point step may fall just below a whole number and take the frame before
    return [k * (total - 1) // (count - 1) for k in range(count)]


def slow_frames(strategy: str, ratio: float | str | Fraction, num_frames: int) -> list[bool]:
    """Return, for each of `num_frames` frames in order of time, whether it is slow (finer grid).

    ceil(ratio * num_frames) frames are slow. `interleave` spreads them (1/2 gives SFSF, 1/4 SFFF:
    for 1/k that is LLaVA-NeXT's `faster_token_stride`, `llava_arch.py`), `first_slow` puts them first,
    `uniform` places them by `uniform_indices`. The ratio is taken as the exact decimal written.
    Raises UserError for an unknown strategy, a ratio outside [0, 1] and less than one frame.
    """
    rho = exact_ratio(ratio)
    if strategy not in STRATEGIES:
        raise UserError(
            f"frame_sampling_strategy must be one of {', '.join(STRATEGIES)}, got {strategy!r}"
        )
    if num_frames < 1:
        raise UserError(f"a slow/fast pattern needs at least one frame, got {num_frames}")
    # rounded up: any ratio above 0 keeps at least one frame at the finer grid
    num_slow = _ceil(rho * num_frames)
    if strategy == "interleave":
        # frame i is slow where the running count ceil(i rho) rises: an even spread for any ratio
        return [_ceil((i + 1) * rho) > _ceil(i * rho) for i in range(num_frames)]
    if strategy == "first_slow":
        return [i < num_slow for i in range(num_frames)]
    # ratio 0: `uniform_indices` would take one frame at least
    slow = set(uniform_indices(num_frames, num_slow)) if num_slow else set()
    return [i in slow for i in range(num_frames)]


def exact_ratio(ratio: float | str | Fraction) -> Fraction:
    """Return the exact fraction that a ratio's decimal text means; UserError outside [0, 1]."""
    try:
        # by way of its text: `Fraction(0.07)` is the nearest binary number, a little above 7/100
        rho = Fraction(str(ratio))
    except (ValueError, ZeroDivisionError):
        raise UserError(f"slow_frame_ratio must be a number in [0, 1], got {ratio!r}") from None
    if not 0 <= rho <= 1:
        raise UserError(f"slow_frame_ratio must be in [0, 1], got {ratio}")
    return rho


def is_ratio(ratio: str) -> bool:
    """Return whether a text is a ratio that `exact_ratio` accepts."""
    try:
        exact_ratio(ratio)
    except UserError:
        return False
    return True


def draw_pattern(slow: list[bool]) -> str:
    """Return the pattern as people read it: `SFSF`."""
    return "".join("S" if is_slow else "F" for is_slow in slow)


def _ceil(value: Fraction) -> int:
    return -(-value.numerator // value.denominator)
