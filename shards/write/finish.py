"""The end of every run: catalogue, quarantine, then the manifest, from plan and commit records."""

from pathlib import Path

from shards.format.catalogue import build_columns, write_columns
from shards.format.commits import read_commits
from shards.format.manifest import Manifest, NamedTower
from shards.format.plan import Plan
from shards.format.quarantine import settle
from shards.signed import signed_json, write_atomic


def finish(out: Path, plan: Plan, tower: NamedTower) -> Manifest:
    """Write the catalogue, let banked clips leave the quarantine, and write the manifest last."""
    commits, served = read_commits(out, plan), plan.served()
    columns = build_columns(out / "shards", commits, plan.features.strides, served)
    write_columns(out / "index.zarr", columns)
    banked = {key for one in commits for key in one.keys if served.get(key) == one.unit}
    settle(out, banked | plan.pruned)
    manifest = Manifest.of(plan, commits, columns, tower)
    write_atomic(out / "bank.json", signed_json(manifest.to_json()))
    return manifest
