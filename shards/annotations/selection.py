"""The rows of a file that are used: all, the first or last ones, or a random choice."""

import re
from dataclasses import dataclass
from fractions import Fraction
from math import ceil

import numpy as np

from shards.errors import UserError


@dataclass(frozen=True)
class Selection:
    """Which rows of a file are used: LLaVA's `sampling_strategy` (LLaVA-NeXT, llava/train/train.py)."""

    how: str = "all"
    """all, first, end or random."""
    rows: int = 0
    share: Fraction = Fraction(0)
    """Fraction of all rows, rounded up; used if `rows` is 0."""
    seed: int = 0

    @classmethod
    def parse(cls, text: str, seed: int = 0) -> "Selection":
        """Parse `all`, `first:N`, `end:N`, `random:N` (N rows or N%), or `N%`, which is random."""
        match = re.fullmatch(r"(?:(first|end|random):)?(\d+(?:\.\d+)?)(%?)", text.strip())
        if text.strip() == "all":
            return cls()
        how, number, percent = match.groups() if match else ("", "0", "")
        share = Fraction(number) / 100 if percent else Fraction(0)
        whole = number.isdigit() and int(number) > 0
        if (percent and 0 < share <= 1) or (how and whole and not percent):
            return cls(how or "random", 0 if percent else int(number), share, seed)
        raise UserError(
            f"sampling_strategy {text!r}: expected all, first:N, end:N, random:N or N%, N rows or N%"
        )

    def of(self, count: int) -> list[int]:
        """Return the indices of the chosen rows among `count`, ascending.

        A larger random choice contains every smaller one of the same seed.
        """
        wanted = min(count, self.rows or ceil(self.share * count))
        if self.how == "first":
            return list(range(wanted))
        if self.how == "end":
            return list(range(count - wanted, count))
        if self.how == "random":
            # A prefix of one permutation: 10 % of the rows are among the 20 % of the same seed.
            chosen = np.random.default_rng(self.seed).permutation(count)[:wanted]
            return sorted(chosen.tolist())
        return list(range(count))


ALL = Selection()
