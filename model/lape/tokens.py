"""The coordinate tokens of LAPE: axes, presets, ids in the vocabulary; torch-free."""

from dataclasses import dataclass
from typing import Any

from shards.errors import UserError

AXES = ("time", "height", "width")
TIME, HEIGHT, WIDTH = range(3)
NAMES = ("TEMP", "HEIGHT", "WIDTH")
PRESETS = ("plus", "st")
MOST_ANCHORS = 1000
"""Anchors on one axis: a token's name has three digits, `<TEMP-037>`."""
LAPE_AXES = {"all": (0, 1, 2), "time": (0,), "space": (1, 2)}
"""The axes (time, height, width) whose coordinates are tokens; on the others numbers stay text."""


@dataclass(frozen=True)
class LapeTokens:
    """The anchors of each axis and their ids. `LapeTokens(counts)` without ids serves to count tokens."""

    counts: tuple[int, int, int]
    """Anchors on time, height and width."""
    axes: tuple[int, ...] = LAPE_AXES["all"]
    """The axes whose coordinates are tokens; anchors of the others get no probability."""
    first: tuple[int, int, int] = (0, 0, 0)
    """Id of anchor 0 per axis, where a tokenizer holds them."""
    placeholders: tuple[int, ...] = ()
    """Ids of LLaVA-ST's six markers for coordinates in its data; none may reach the LLM."""

    @classmethod
    def add_to(
        cls,
        tokenizer: Any,
        num_temporal: int,
        num_spatial: int,
        axes: tuple[int, ...] = LAPE_AXES["all"],
    ) -> "LapeTokens":
        """Add the placeholders and anchors to a tokenizer, unless it has them; return their ids.

        Raises UserError where the tokenizer has coordinate tokens of other counts.
        """
        counts = (num_temporal, num_spatial, num_spatial)
        # the strings of LLaVA-ST's `constants.py`, in its order
        placeholders = [f"<{name}-{role}>" for name in NAMES for role in ("INPUT", "OUTPUT")]
        anchors = [[f"<{NAMES[a]}-{i:03d}>" for i in range(counts[a])] for a in range(3)]
        tokens = placeholders + [token for axis in anchors for token in axis]
        known = tokenizer.get_added_vocab()
        present = [token for token in known if token.startswith(("<TEMP-", "<HEIGHT-", "<WIDTH-"))]
        if present and set(present) != set(tokens):
            raise UserError(
                f"the tokenizer already holds {len(present)} coordinate tokens that do not fit "
                f"num_temporal_tokens {num_temporal}, num_spatial_tokens {num_spatial}; "
                "use the numbers it was made with or a tokenizer without them"
            )
        # special: no tokenizer splits them, and ordinary text is never merged with them
        tokenizer.add_tokens([t for t in tokens if t not in known], special_tokens=True)
        ids = tokenizer.convert_tokens_to_ids(tokens)
        # `first` and `counts` stand for all ids only where there is no gap
        assert ids == list(range(ids[0], ids[0] + len(ids))), "coordinate ids are not contiguous"
        first = ids[len(placeholders)]
        return cls(
            first=(first, first + counts[0], first + counts[0] + counts[1]),
            counts=counts,
            placeholders=tuple(ids[: len(placeholders)]),
            axes=axes,
        )

    def to_json(self) -> dict[str, Any]:
        """Return the ids for `lape/tokens.json`, without the axes, which are a setting of the model."""
        lists = {"first": self.first, "counts": self.counts, "placeholders": self.placeholders}
        return {name: list(values) for name, values in lists.items()}

    def check(self, saved: dict[str, Any], where: object) -> None:
        """Raise UserError where a saved model's token ids differ from its tokenizer's."""
        if saved != self.to_json():
            raise UserError(
                f"token ids {saved} do not match the tokenizer's {self.to_json()}", where=where
            )

    def token_id(self, axis: int, coord: float) -> int:
        """Return the id of the anchor nearest to a coordinate."""
        return self.first[axis] + round(kappa_of(coord, self.counts[axis]))

    @property
    def all_ids(self) -> list[int]:
        """The ids of placeholders and anchors, which are consecutive."""
        last = self.first[WIDTH] + self.counts[WIDTH]
        return list(range(self.placeholders[0], last))


def kappa_of(u: float, bins: int) -> float:
    """Return a coordinate's place on an axis of anchors: clip(u, 0, 1) (bins - 1)."""
    return min(max(u, 0.0), 1.0) * (bins - 1)
