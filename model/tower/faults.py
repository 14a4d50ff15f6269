"""Errors of a tower at work: features that a type cannot hold, batches that a GPU cannot hold."""

from shards.errors import UserError


class FeatureRangeError(UserError):
    """Features that the stored type cannot hold: a fault of the clip, so it is quarantined."""


class GpuMemoryError(UserError):
    """A batch of frames that the GPU has no memory for."""

    def __init__(self, frames: int, fewer: int) -> None:
        """frames: in the batch. fewer: the next smaller batch, 0 if there is none."""
        fix = f"--batch-frames {fewer}" if fewer else "a smaller tower"
        super().__init__(
            "the GPU has no memory left for the tower",
            got=f"a batch of {frames} frames",
            expected="a batch that fits",
            fix=f"encode with {fix}, or on a GPU that nothing else uses",
        )
        self.args = (frames, fewer)  # pickle calls __init__ with these in the parent process
        self.fewer = fewer
