"""What may be wrong with the features of a clip, or with a batch of frames."""

from shards.errors import UserError


class FeatureRangeError(UserError):
    """Features that the stored type cannot hold: of the clip, not of us."""


class GpuMemoryError(UserError):
    """A batch that the GPU cannot hold."""

    def __init__(self, frames: int, fewer: int) -> None:
        """frames: of the batch. fewer: half of them, 0 where there is no smaller batch."""
        fix = f"--batch-frames {fewer}" if fewer else "a smaller tower"
        super().__init__(
            "the GPU has no memory left for the tower",
            got=f"a batch of {frames} frames",
            expected="a batch that fits",
            fix=f"encode with {fix}, or on a GPU that nothing else uses",
        )
        self.args = (frames, fewer)  # what pickle makes it again of
        self.fewer = fewer
