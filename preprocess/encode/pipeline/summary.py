"""The summary of a run: what was done and where its time went, for the bar and the last lines."""

import sys
from dataclasses import dataclass, field, replace
from typing import Any

from tqdm import tqdm

from shards.format.quarantine import QuarantineEntry

STAGES = ("decode", "tower", "write")
MUCH = 0.2
"""The share of its time that a tower may wait before the advice is about the stage it waits for."""
ADVICE = {
    "decode": "the tower waited {} of the time for decoding: more --decoders or cores",
    "write": "the tower waited {} of the time for writing: a faster disk",
    "tower": "the tower was at work {} of the time: a faster device, or more of them",
}


def progress_bar(total: int | None = None) -> "tqdm[Any]":
    return tqdm(
        total=total,
        unit="clip",
        desc="encode",
        mininterval=0.2 if sys.stderr.isatty() else 10,  # a log file wants few lines
    )


@dataclass
class Summary:
    """The result of a run."""

    clips: int = 0
    frames: int = 0
    nbytes: int = 0
    skipped: int = 0
    """Clips that were in the bank already."""
    seconds: float = 0.0
    failures: list[QuarantineEntry] = field(default_factory=list)
    spent: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    """Seconds of all towers together: waiting for decoding, working, waiting for writing."""

    def copy(self) -> "Summary":
        # lists and dicts too: the original goes on to change
        return replace(self, failures=[*self.failures], spent=dict(self.spent))

    @classmethod
    def of(cls, summaries: "list[Summary]") -> "Summary":
        """Return the sum over several processes, without `seconds`."""
        total = cls()
        for one in summaries:
            total.clips += one.clips
            total.frames += one.frames
            total.nbytes += one.nbytes
            total.failures += one.failures
            for stage in STAGES:
                total.spent[stage] += one.spent[stage]
        return total

    def beside(self, more: "Summary") -> "Summary":
        """Return what a run did to a bank and then beside it: clips are counted where they were made."""
        # a clip that failed in the bank fails beside it, too: it is one failure
        counted = {entry.id for entry in self.failures}
        total = Summary.of([replace(self, failures=[]), replace(more, failures=[])])
        total.failures = self.failures + [one for one in more.failures if one.id not in counted]
        total.seconds = self.seconds + more.seconds
        total.skipped = self.skipped if not total.clips else more.skipped
        return total

    @property
    def shares(self) -> dict[str, float]:
        """The share of the time of each stage; empty if nothing was encoded."""
        whole = sum(self.spent.values())
        return {stage: spent / whole for stage, spent in self.spent.items()} if whole else {}

    @property
    def advice(self) -> str | None:
        """What would make encoding faster; None if no frame was encoded."""
        shares = self.shares
        if not shares or not self.frames:
            return None
        waited = max(("decode", "write"), key=lambda stage: shares[stage])
        stage = waited if shares[waited] > MUCH else "tower"
        return ADVICE[stage].format(f"{shares[stage]:.0%}")


def show_pace(bar: "tqdm[Any]", summary: Summary) -> None:
    """Show frames per second and the shares of the towers' time beside a bar."""
    # 1e-9: the first clip may come before the clock has moved
    rate = summary.frames / max(bar.format_dict["elapsed"], 1e-9)
    shown = {stage: f"{share:.0%}" for stage, share in summary.shares.items()}
    bar.set_postfix({"frames/s": f"{rate:.1f}"} | shown, refresh=False)
