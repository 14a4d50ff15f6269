"""The settings asked of a derived bank -> its features, or an error that says why it is not possible.

target = target_of(source.manifest, Asked(strides=(8,), codec="int8", frames=8), where=bank)
target.features            # the new bank's FeatureConfig
target.pooled              # {8: None}: copied; {16: 4}: pooled from the cells of stride 4
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from preprocess.derive.cells import NESTING
from shards.errors import UserError
from shards.format.features import Derived, FeatureConfig


@dataclass(frozen=True)
class Asked:
    """The requested differences; None keeps the source's value."""

    strides: tuple[int, ...] | None = None
    codec: str | None = None
    frames: int | None = None
    """Largest number of banked frames to keep of each clip, uniformly."""


@dataclass(frozen=True)
class Target:
    """The features of a derived bank, and how they are made."""

    features: FeatureConfig
    pooled: Mapping[int, int | None]
    """By stride: the banked stride that it is pooled from; None if it is banked itself."""

    @property
    def as_stored(self) -> bool:
        """Whether streams are copied in stored form: same codec, nothing pooled."""
        assert self.features.derived
        banked = all(finer is None for finer in self.pooled.values())
        return banked and self.features.codec == self.features.derived.codec


def target_of(features: FeatureConfig, asked: Asked, where: Path) -> Target:
    """Return the target for a bank of these features.

    Raises UserError, with an alternative, for features that need videos and tower, and if nothing would
    differ.
    """
    strides, codec = asked.strides or features.strides, asked.codec or features.codec
    sampling = replace(features.sampling, kept=_kept(features, asked.frames, where))
    if (strides, codec, sampling) == (features.strides, features.codec, features.sampling):
        raise UserError(
            "has exactly what is asked for",
            where=where,
            fix="ask for another stride, codec or count",
        )
    pooled = {stride: _finer(features, stride, where) for stride in strides}
    # int8 rounds by token and channel: pooled or stored otherwise, the error would have no bound here
    if features.codec == "int8" and (codec != "int8" or any(pooled.values())):
        raise UserError(
            "its features are already rounded to int8",
            got=f"--stride {','.join(map(str, strides))} --codec {codec}",
            expected=f"--codec int8 and strides of {','.join(map(str, features.strides))}",
            where=where,
            fix="derive from a bank of another codec, or encode",
        )
    derived = Derived(features.fingerprint, features.strides, features.codec)
    made = replace(features, strides=strides, codec=codec, sampling=sampling, derived=derived)
    return Target(made, pooled)


def _kept(features: FeatureConfig, frames: int | None, where: Path) -> int | None:
    sampling = features.sampling
    if frames is None or frames == sampling.kept:
        return sampling.kept
    if sampling.kept is not None:
        raise UserError(
            f"--frames {frames}: choosing from chosen frames differs from choosing from all",
            got=f"a bank derived with --frames {sampling.kept}",
            where=where,
            fix="derive from the bank that it was derived from",
        )
    if frames >= sampling.most_frames:
        raise UserError(
            f"--frames {frames}: leaves nothing out",
            got=f"at most {sampling.most_frames} banked frames of a clip",
            where=where,
        )
    return frames


def _finer(features: FeatureConfig, stride: int, where: Path) -> int | None:
    """Return the finest banked stride that divides this one; None if this one is banked itself."""
    if stride in features.strides:
        return None
    banked = ",".join(map(str, features.strides))
    encode = f"`preprocess encode INPUT --stride {stride} --out NEW` makes it, with the tower"
    found = [finer for finer in features.strides if stride % finer == 0]
    if not found:
        raise UserError(
            f"--stride {stride}: its cells are not made of whole cells of the bank",
            got=f"banked strides {banked}",
            expected="multiples of one of them",
            where=where,
            fix=encode,
        )
    if features.pool not in NESTING:
        raise UserError(
            f"--stride {stride}: pool {features.pool} interpolates patches, which the bank does not have",
            expected=f"banked strides {banked}, or a bank of pool {', '.join(NESTING)}",
            where=where,
            fix=encode,
        )
    # the finest: of most cells, whose rounding errors average out
    return found[0]
