"""`preprocess diff A B`: compare the feature settings of two banks, or of a bank and a plan."""

import json
from pathlib import Path

from shards.errors import UserError
from shards.format.beside import banks_of, together
from shards.format.features import FeatureConfig
from shards.format.plan import planned
from shards.format.version import refuse_other_version
from shards.signed import Json, read_signed_json

LABELS = {
    "tower_type": "kind of tower",
    "tower_digest": "tower's weights and configuration",
    "layer": "layer of the tower",
    "processor": "image processor",
    "dtype": "type of the stored features",
    "tower_dtype": "type of the tower's arithmetic",
    "attention": "attention of the tower",
    "sampling": "sampling of frames",
    "strides": "patches per cell side",
    "pool": "pooling",
    "codec": "codec of the stored bytes",
    "format_version": "format of the bank",
    "derived": "what it was derived from",
}


def diff(a: Path, b: Path) -> list[str]:
    """Return a line for each field in which the features of A and B differ; none if they are equal.

    A, B: a bank, a folder with a plan, or a json file of either or of a `FeatureConfig`.
    """
    ours, theirs = (flat(read_features(path)) for path in (a, b))
    return [
        f"{name} ({LABELS[name.split('.')[0]]}): {ours.get(name)} in {a}, {theirs.get(name)} in {b}"
        # of both: a field that only one of them has is a difference, too
        for name in sorted(set(ours) | set(theirs))
        if ours.get(name) != theirs.get(name)
    ]


def read_features(path: Path) -> Json:
    """Return the feature config, as json, of a bank, a plan, or a json file of either."""
    if path.is_dir():
        files = [path / "bank.json", path / "plan.json"]
        file = next((file for file in files if file.is_file()), None)
        if file is None:
            raise UserError(
                f"{path}: neither a bank nor a plan (bank.json and plan.json are missing); make "
                "one with `preprocess plan` or `preprocess encode`"
            )
    elif path.is_file():
        file = path
    else:
        raise UserError(f"{path}: no such file or folder")
    try:
        data = json.loads(file.read_bytes())
    except ValueError:
        raise UserError(f"{file}: not a json file; name a bank, a plan or a config") from None
    if not isinstance(data, dict):
        raise UserError(f"{file}: not a feature config; name a bank, a plan or a config")
    # a file of a bank; a FeatureConfig alone, as people write it by hand, has no hash
    if "self_hash" in data:
        data = read_signed_json(file)
        refuse_other_version(data, file.parent, file.name)
    try:
        features = FeatureConfig.from_json(data.get("features", data))
    except UserError as error:
        raise UserError(
            f"{file}: not a feature config ({error}); name a bank, a plan or a config"
        ) from None
    # strides that were encoded later count as the bank's own, as they do for readers
    beside = banks_of(path)[1:] if path.is_dir() else []
    return together(features, [planned(side).features for side in beside]).to_json()


def flat(data: Json, prefix: str = "") -> dict[str, object]:
    """Return nested fields by dotted name; `derived`, which most banks do not have, as one field."""
    fields: dict[str, object] = {}
    for name, value in data.items():
        if isinstance(value, dict) and name != "derived":
            fields |= flat(value, f"{prefix}{name}.")
        else:
            fields[f"{prefix}{name}"] = value
    return fields
