"""Mixtures: named datasets, how often each is taken, and how much of it.

Three forms of YAML, told by their shape:
- ours and VILA's registry: `name: {records: FILES, banks: BANKS}`, taken as `a+b*2+c@0.1`; a name
  may stand for a list of such terms;
- LLaVA-NeXT's: `datasets: [{json_path: FILE, sampling_strategy: first:1000}, ...]`;
- lmms-engine's: `datasets: [{path: FILE, data_folder: FOLDER}, ...]`.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from shards.annotations.files import ALL, Selection, is_hub_name
from shards.errors import UserError

FILES = ("records", "data_path", "json_path", "path")
"""What a dataset's annotation files are called: here, in VILA, in LLaVA-NeXT, in lmms-engine."""
KNOWN = (*FILES, "banks", "sampling_strategy", "seed")
ABOUT_VIDEOS = ("_target_", "media_dir", "data_folder", "data_type")
"""Read and left alone: where videos lie was settled when they were encoded."""
TERM = re.compile(r"([^@*]+?)(?:@([\d.]+))?(?:\*(\d+))?")


@dataclass(frozen=True)
class MixturePart:
    """One dataset of a mixture."""

    records: list[str]
    """Files, folders or Hub names."""
    banks: list[str]
    repeats: int
    chosen: Selection = ALL
    """Of the rows of each file."""


def read_mixture(config: str, mixture: str, problems: list[str]) -> list[MixturePart]:
    """Return the datasets of a mixture such as `a+b*2+c@0.1`; an empty mixture takes each once.

    Paths are relative to the YAML. `name@0.1` takes that share at random, by the entry's `seed`.
    """
    try:
        named = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        problems.append(f"data_config {config}: {error}")
        return []
    if not isinstance(named, dict) or not named:
        problems.append(
            f"data_config {config}: expected `name: {{records: ..., banks: ...}}` entries, or "
            "`datasets: [{json_path: ...}]`"
        )
        return []
    if isinstance(named.get("datasets"), list):
        if mixture:
            problems.append(
                f"data_mixture {mixture}: {config} is a list of datasets without names; leave it out"
            )
        entries = enumerate(named["datasets"])
        parts = [_part(entry, f"datasets[{k}]", config, problems) for k, entry in entries]
        return [part for part in parts if part]
    found: list[MixturePart] = []
    for term in _terms(mixture or "+".join(named), named, problems, ()):
        match = TERM.fullmatch(term)
        name, share, times = match.groups() if match else (term, None, None)
        if not match or times == "0":
            problems.append(
                f"data_mixture {term!r}: repeat by a positive integer, like a*2, and take a share "
                "like a@0.1"
            )
            continue
        if name not in named:
            problems.append(
                f"data_mixture: no dataset {name!r} in {config} (has {', '.join(map(str, named))})"
            )
            continue
        part = _part(named[name], str(name), config, problems, share)
        if part:
            found.append(replace(part, repeats=int(times or 1)))
    return found


def _terms(
    mixture: str, named: dict[str, Any], problems: list[str], above: tuple[str, ...]
) -> Iterator[str]:
    """Yield the terms of a mixture; a name that stands for other terms gives those."""
    for term in mixture.split("+"):
        name = term.strip()
        inner = named.get(name)
        if not isinstance(inner, str | list):
            yield name
        elif name in above:
            problems.append(f"data_mixture: {' -> '.join((*above, name))} never ends")
        else:
            text = inner if isinstance(inner, str) else "+".join(map(str, inner))
            yield from _terms(text, named, problems, (*above, name))


def _part(
    entry: Any, name: str, config: str, problems: list[str], share: str | None = None
) -> MixturePart | None:
    """Return a dataset as its YAML entry says, None where that is wrong."""
    where = f"data_config {config}: {name}"
    fields = [field for field in FILES if isinstance(entry, dict) and field in entry]
    if len(fields) != 1:
        wants = f"has both {' and '.join(fields)}; keep one" if fields else "needs `records`"
        problems.append(f"{where} {wants}")
        return None
    unknown = sorted(set(entry) - {*KNOWN, *ABOUT_VIDEOS})
    if unknown:
        problems.append(f"{where}: unknown {', '.join(unknown)} (known: {', '.join(KNOWN)})")
    chosen, seed = ALL, entry.get("seed", 0)
    if not isinstance(seed, int) or seed < 0:
        problems.append(f"{where}: seed must be an integer, not negative, got {seed!r}")
        seed = 0
    strategy = entry.get("sampling_strategy")
    try:
        if share is not None and strategy is not None:
            raise UserError(f"both @{share} and sampling_strategy {strategy!r}; keep one")
        if share is not None:
            chosen = share_of(share, seed)
        elif strategy is not None:
            chosen = Selection.parse(str(strategy), seed)
    except UserError as error:
        problems.append(f"{where}: {error}")
    records = _paths(entry[fields[0]], config)
    problems += [
        f"{where}: no such file: {path}"
        for path in records
        if not Path(path).exists() and not is_hub_name(path)
    ]
    return MixturePart(records, _paths(entry.get("banks", []), config), 1, chosen)


def share_of(text: str, seed: int) -> Selection:
    """Return the random choice that `@0.1` means."""
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise UserError(f"@{text}: take a share above 0, at most 1, like @0.1")
    return Selection.parse(f"random:{share * 100:.6f}%", seed)


def _paths(value: str | list[str], config: str) -> list[str]:
    """Return paths relative to the YAML; `{a,b}.json` gives both, Hub names stay."""
    found = []
    for text in value if isinstance(value, list) else [value]:
        braces = re.fullmatch(r"(.*)\{(.*)\}(.*)", str(text))
        names = [str(text)]
        if braces:
            names = [f"{braces[1]}{part.strip()}{braces[3]}" for part in braces[2].split(",")]
        for name in names:
            path = str(Path(config).parent / name)
            found.append(name if is_hub_name(name) and not Path(path).exists() else path)
    return found
