"""What a model was trained with, as its folder says, and how long a record of its run may be."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shards.errors import UserError
from shards.signed import Json

CHECKPOINT, RUN = "checkpoint.json", "run.json"
"""Of a checkpoint-N, of a run's own folder: both hold all settings under `config`."""


def token_limit(config: Mapping[str, Any]) -> int:
    """Return the tokens of a record at most, by a run's max_tokens and pack_tokens; 0 for no limit."""
    given = (config.get("max_tokens", 0), config.get("pack_tokens", 0))
    return min((limit for limit in given if limit), default=0)


def trained_with(folder: Path) -> Json | None:
    """Return the settings that a model was trained with; None in a folder that no run has written."""
    path = next((folder / name for name in (CHECKPOINT, RUN) if (folder / name).is_file()), None)
    if path is None:
        return None
    try:
        config = json.loads(path.read_text())["config"]
    except (ValueError, KeyError, TypeError):
        config = None
    if not isinstance(config, dict):
        raise UserError("holds no settings of a run", where=path, fix="copy it from the run again")
    return config


def limit_of_run(folder: Path) -> int:
    """Return the tokens of a record at most that a model was trained with; UserError if nothing says."""
    config = trained_with(folder)
    if config is None:
        raise UserError(
            f"no {RUN} here, which says how long records were in training (max_tokens, pack_tokens)",
            where=folder,
            fix="name the run's own folder, or say it: --max_tokens N, 0 for no limit",
        )
    return token_limit(config)
