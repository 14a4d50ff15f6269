"""The end of every run: catalogue, quarantine, then the manifest, from plan and commit records."""

import math
import platform
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

from shards.format.catalogue import build_columns, checksums, write_columns
from shards.format.commits import read_commits
from shards.format.manifest import shard_entries
from shards.format.plan import Plan
from shards.format.quarantine import settle
from shards.signed import Json, canonical_json, signed_json, write_atomic


class NamedTower(Protocol):
    """What the manifest tells of a tower beside the `FeatureConfig`."""

    @property
    def name(self) -> str: ...
    @property
    def width(self) -> int: ...


def finish(out: Path, plan: Plan, tower: NamedTower) -> None:
    """Write the catalogue, let banked clips leave the quarantine, and write the manifest last."""
    commits = read_commits(out, plan)
    served = plan.served()
    columns = build_columns(out / "shards", commits, plan.features.strides, served)
    write_columns(out / "index.zarr", columns)
    banked: list[Json] = []
    superseded: dict[str, list[str]] = {}
    for commit in commits:
        for sample in commit["samples"]:
            if served.get(sample["key"]) == commit["unit"]:
                banked.append(sample)
            else:
                superseded.setdefault(commit["shard"], []).append(sample["key"])
    settle(out, {sample["key"] for sample in banked} | plan.pruned)
    manifest: Json = {
        "format_version": plan.features.format_version,
        "features": plan.features.to_json(),
        "fingerprint": plan.features.fingerprint,
        "tower_width": tower.width,
        "clips": len(columns["shard"]),
        "frames": len(columns["timestamps"]),
        "nbytes": sum(commit["nbytes"] for commit in commits),
        "shards": shard_entries(commits),
        "catalogue": checksums(columns),
        "superseded": superseded,
        "codec": {
            "name": plan.features.codec,
            "strides": {
                stride: {"ratio": ratio, **(plan.quality or {}).get(stride, {})}
                for stride, ratio in compression(banked, plan.features.strides).items()
            },
        },
        "calibration": plan.calibration,
        "provenance": {
            "tower": tower.name,
            "torch": version("torch"),
            "python": platform.python_version(),
            "machine": platform.machine(),
            "underflowed": sum(commit["underflowed"] for commit in commits),
            "encoded": distinct([commit.get("provenance", {}) for commit in commits]),
        },
    }
    write_atomic(out / "bank.json", signed_json(manifest))


def compression(samples: Sequence[Json], strides: Sequence[int]) -> dict[str, float | None]:
    """Return stored bytes / bytes of the plain features per stride, as text; None of no samples."""
    stored: dict[str, int] = defaultdict(int)
    plain: dict[str, int] = defaultdict(int)
    for sample in samples:
        for stride, stream in sample["streams"].items():
            stored[stride] += stream["nbytes"] + stream.get("scale", {"nbytes": 0})["nbytes"]
            plain[stride] += 2 * math.prod(stream["shape"])
    return {
        str(stride): stored[str(stride)] / plain[str(stride)] if plain[str(stride)] else None
        for stride in strides
    }


def distinct(records: Sequence[Mapping[str, object]]) -> list[Mapping[str, object]]:
    """Return the records that differ, in an order of their own."""
    unique = {canonical_json(dict(record)): record for record in records}
    return [unique[text] for text in sorted(unique)]
