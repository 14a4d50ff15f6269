"""Mixtures: named datasets, how often each is repeated, and how much of it is used.

Three forms of YAML, recognised by their keys:
- ours and VILA's registry: `name: {records: FILES, banks: BANKS}`, taken as `a+b*2+c@0.1`; a name
  may stand for a list of such terms;
- LLaVA-NeXT's: `datasets: [{json_path: FILE, sampling_strategy: first:1000}, ...]`;
- lmms-engine's: `datasets: [{path: FILE, data_folder: FOLDER}, ...]`.

A path is relative to the YAML; one that begins with `${NAME}`, a variable of the environment, and one of
another trainer's `datasets` that is not there, to the working folder.

An entry with `splice: {records: 4000, ...}` has clips and phrases, from which records are drawn; one
with `turns: independent` has records of independent turns.
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from model.config import TURNS
from shards.annotations.files import annotation_files, is_hub_name
from shards.annotations.globs import expanded, is_glob
from shards.annotations.selection import ALL, Selection
from shards.errors import UserError
from train.settings.drawn import SpliceSettings, problem_of, read_splice, words_of
from train.settings.folders import Folders
from train.settings.parse import with_variables

FILES = ("records", "data_path", "json_path", "path")
"""Keys for a dataset's annotation files: here, in VILA, in LLaVA-NeXT, in lmms-engine."""
OF_OTHERS = ("json_path", "path")
"""Of these, keys of trainers that take paths from the working folder."""
BANKS = ("banks", "bank")
FOLDERS = ("media_dir", "data_folder")
"""Keys for the folder of a dataset's media: here and in VILA, in lmms-engine."""
KNOWN = (*FILES, *BANKS, *FOLDERS, "strip_prefix", "sampling_strategy", "seed", "splice", "turns")
LEFT_ALONE = ("_target_", "data_type", "is_video", "source")
"""Keys of other trainers that are ignored: the rows show the same, and LLaVA-ST's `source` is a name of
its data_folder."""
MANNER = {
    "chosen": "choose other rows of it",
    "turns": "have other turns",
    "splice": "splice it otherwise, or one alone does",
}
"""What makes other records of a file -> two datasets that differ in it, in words."""
TERM = re.compile(r"([^@*]+?)(?:@([\d.]+))?(?:\*(\d+))?")


@dataclass(frozen=True)
class MixturePart:
    """One dataset of a mixture."""

    records: list[str]
    """Files, folders or Hub names."""
    banks: list[str]
    repeats: int
    chosen: Selection = ALL
    """The choice of rows of each file."""
    folders: Folders = Folders()
    """How its names of media become ids."""
    name: str = field(default="", compare=False)
    """Its place, for messages."""
    splice: SpliceSettings | None = None
    """How records are spliced from its rows, where its rows are not records."""
    turns: str = ""
    """One of `TURNS`; empty: the run's own setting."""
    repeatable: bool = field(default=False, compare=False)
    """Whether its files may also be in another dataset: a mixture asked for both by name."""


def all_parts(
    paths: Sequence[str],
    data_config: str,
    mixture: str,
    folders: Folders,
    problems: list[str],
    notes: list[str],
    *,
    held_out: bool = False,
) -> list[MixturePart]:
    """Return the datasets of a run: record files, mixtures among them, and a mixture's YAML.

    folders: for datasets that have none of their own. A file that is listed twice is a problem, unless
    a mixture asks for it by two names. held_out: whether models are scored on them, which is of records
    that stay the same.
    """
    found: list[MixturePart] = []
    for path in paths:
        if Path(path).suffix.lower() in (".yaml", ".yml"):
            found += read_mixture(path, "", problems, notes)
        else:
            # without banks of its own a file is looked up in all of the run's
            found.append(MixturePart(expanded([path], problems), [], 1, name=f"data_path {path}"))
    if data_config:
        found += read_mixture(data_config, mixture, problems, notes)
    # a dataset's own folders bind it; the run's are for those that say nothing
    found = [
        part if part.folders != Folders() else replace(part, folders=folders) for part in found
    ]
    refuse_repeats(found, problems)
    problems += [
        f"{part.name}: splice draws other records in each epoch, and a model is scored on the same ones; "
        "name records, or leave this dataset out"
        for part in found
        if held_out and part.splice
    ]
    return found


def refuse_repeats(parts: Sequence[MixturePart], problems: list[str]) -> None:
    """Add a problem for each file that two datasets have, or one has twice."""
    seen: dict[object, MixturePart] = {}
    for part in parts:
        here = set()
        for file in [file for path in part.records for file in files_of(path)]:
            # the same rows of other banks, or under other folders, are other records
            key = (file, part.chosen, real_banks(part), part.folders)
            other = part if key in here else seen.get(key)
            here.add(key)
            seen.setdefault(key, part)
            if other is part or (other and not (other.repeatable and part.repeatable)):
                where = f"{part.name}, twice" if other is part else f"{other.name} and {part.name}"
                problems.append(
                    f"{file}: is listed in {where}; leave one out, or repeat a dataset by a mixture "
                    "such as name*2"
                )


def files_of(path: str) -> list[str]:
    """Return the annotation files of a path by their real paths; a Hub name is one by itself."""
    if not Path(path).exists():
        return [path]
    try:
        return [os.path.realpath(file) for file in annotation_files(Path(path))]
    except UserError:  # reported where the file is read
        return [os.path.realpath(path)]


def real_banks(part: MixturePart) -> tuple[str, ...]:
    """Return the real paths of a dataset's own banks, sorted."""
    return tuple(sorted(map(os.path.realpath, part.banks)))


def read_mixture(
    config: str, mixture: str, problems: list[str], notes: list[str] | None = None
) -> list[MixturePart]:
    """Return the datasets of a mixture such as `a+b*2+c@0.1`; an empty mixture takes each once.

    Paths are relative to the YAML. `name@0.1` takes that share at random, by the entry's `seed`. notes:
    gets a line for what an empty mixture leaves out: names that stand for others, and second names.
    """
    try:
        text = Path(config).read_text(encoding="utf-8")
        named = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        problems.append(f"data_config {config}: {error}")
        return []
    if not isinstance(named, dict) or not named:
        problems.append(
            f"data_config {config}: expected `name: {{records: ..., banks: ...}}` entries, or "
            "`datasets: [{json_path: ...}]`"
        )
        return []
    problems += [f"data_config {config}: {line}" for line in keys_twice(yaml.compose(text))]
    # -- three forms, distinguished by their keys
    if isinstance(named.get("datasets"), list):
        if mixture:
            problems.append(
                f"data_mixture {mixture}: {config} is a list of datasets without names; leave it out"
            )
        found = [
            _part(entry, f"datasets[{k}]", config, problems)
            for k, entry in enumerate(named["datasets"])
        ]
        return [part for part in found if part]
    if mixture:
        return _asked(mixture, named, config, problems)
    notes = [] if notes is None else notes
    joined = [str(name) for name, entry in named.items() if isinstance(entry, str | list)]
    # names that stand for others would give the same records a second time
    if joined:
        notes.append(
            f"{config}: {', '.join(joined)} stand for other names, and are left out without "
            "a data_mixture"
        )
    found = [
        _part(entry, str(name), config, problems)
        for name, entry in named.items()
        if not isinstance(entry, str | list)
    ]
    return _once([part for part in found if part], problems, notes)


def keys_twice(node: Any) -> Iterator[str]:
    """Yield a line for each key that a YAML mapping has twice, at any depth."""
    children = node.value if isinstance(node, yaml.CollectionNode) else []
    seen = dict[str, int]()
    for child in children:
        if isinstance(child, tuple):
            key, child = child
            line = key.start_mark.line + 1
            # PyYAML's loaders keep the last one without a word
            if str(key.value) in seen:
                yield f"line {line}: {key.value} stands in line {seen[key.value]}, too; keep one"
            seen.setdefault(str(key.value), line)
        yield from keys_twice(child)


def _once(parts: Sequence[MixturePart], problems: list[str], notes: list[str]) -> list[MixturePart]:
    """Return the datasets of a registry, each without the files that an earlier one has."""
    seen: dict[object, MixturePart] = {}
    kept = []
    for part in parts:
        records = []
        for path in part.records:
            # VILA's registries have second names for one dataset, which a mixture would choose from
            other = seen.setdefault((*files_of(path), real_banks(part), part.folders), part)
            if other is part:
                records.append(path)
            elif differ := [name for name in MANNER if getattr(other, name) != getattr(part, name)]:
                problems.append(
                    f"{path}: {other.name} and {part.name} {MANNER[differ[0]]}; say in "
                    "data_mixture which to take"
                )
            else:
                notes.append(f"{path}: taken once, {other.name} and {part.name} are names of it")
        if records:
            kept.append(replace(part, records=records))
    return kept


def _asked(
    mixture: str, named: dict[str, Any], config: str, problems: list[str]
) -> list[MixturePart]:
    """Return the datasets that a mixture names."""
    found: list[MixturePart] = []
    for term in _terms(mixture, named, problems, ()):
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
            found.append(replace(part, repeats=int(times or 1), repeatable=True))
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
        # a registry may name itself by way of others
        elif name in above:
            problems.append(f"data_mixture: {' -> '.join((*above, name))} never ends")
        else:
            text = inner if isinstance(inner, str) else "+".join(map(str, inner))
            yield from _terms(text, named, problems, (*above, name))


def _part(
    entry: Any, name: str, config: str, problems: list[str], share: str | None = None
) -> MixturePart | None:
    """Return the dataset of a YAML entry, None where the entry is invalid."""
    where = f"data_config {config}: {name}"
    fields = [field for field in FILES if isinstance(entry, dict) and field in entry]
    if len(fields) != 1:
        wants = f"has both {' and '.join(fields)}; keep one" if fields else "needs `records`"
        problems.append(f"{where} {wants}")
        return None
    unknown = sorted(map(str, set(entry) - {*KNOWN, *LEFT_ALONE}))
    if unknown:
        problems.append(f"{where}: unknown {', '.join(unknown)} (known: {', '.join(KNOWN)})")
    for names in (BANKS, FOLDERS):
        if all(name in entry for name in names):
            problems.append(f"{where} has both {' and '.join(names)}; keep one")
    chosen, seed = ALL, entry.get("seed", 0)
    if not isinstance(seed, int) or seed < 0:
        problems.append(f"{where}: seed must be an integer, not negative, got {seed!r}")
        seed = 0
    strategy = entry.get("sampling_strategy")
    try:
        # both choose rows: a share of a choice could be meant, or the other way round
        if share is not None and strategy is not None:
            raise UserError(f"both @{share} and sampling_strategy {strategy!r}; keep one")
        if share is not None:
            chosen = share_of(share, seed)
        elif strategy is not None:
            chosen = Selection.parse(str(strategy), seed)
    except UserError as error:
        problems.append(f"{where}: {error}")
    lacking: list[str] = []
    records = _paths(entry[fields[0]], config, lacking, foreign=fields[0] in OF_OTHERS)
    problems += [
        f"{where}: no such file: {path}"
        for path in ([] if lacking else records)
        if not is_glob(path) and not Path(path).exists() and not is_hub_name(path)
    ]
    wrong: list[str] = []
    records = [] if lacking else expanded(records, wrong)
    problems += [f"{where}: {problem}" for problem in wrong]
    banks = _paths(_first(entry, BANKS) or [], config, lacking)
    media_dir, unset = with_variables(str(_first(entry, FOLDERS) or ""), os.environ)
    folders = Folders(media_dir, _prefixes(entry.get("strip_prefix")))
    problems += [f"{where}: {line}" for line in dict.fromkeys([*lacking, *unset])]
    splice = _splice(entry["splice"], where, problems) if "splice" in entry else None
    turns = entry.get("turns", "")
    if turns not in ("", *TURNS):
        problems.append(f"{where}: turns must be one of {', '.join(TURNS)}, got {turns!r}")
    return MixturePart(
        records, banks, 1, chosen, folders, name=where, splice=splice, turns=str(turns)
    )


def _splice(value: Any, where: str, problems: list[str]) -> SpliceSettings:
    """Return the settings of an entry's `splice`: a mapping, or words as on a command line."""
    words = (
        words_of(value) if isinstance(value, dict) else str(value or "").replace(",", " ").split()
    )
    if isinstance(value, list):
        words = [str(word) for word in value]
    if problem := problem_of(read_splice, words):
        problems.append(f"{where}: splice: {problem}")
        return SpliceSettings()
    return read_splice(words)


def _first(entry: dict[str, Any], names: Sequence[str]) -> Any:
    return next((entry[name] for name in names if entry.get(name) is not None), None)


def _prefixes(value: Any) -> tuple[str, ...]:
    return tuple(map(str, value)) if isinstance(value, list) else (str(value),) if value else ()


def share_of(text: str, seed: int) -> Selection:
    """Return the random choice of rows for `@0.1`; UserError for a share outside (0, 1]."""
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise UserError(f"@{text}: take a share above 0, at most 1, like @0.1")
    # six digits: @0.1 is exactly a tenth, whatever floats make of it
    return Selection.parse(f"random:{share * 100:.6f}%", seed)


def _paths(
    value: str | list[str], config: str, lacking: list[str], *, foreign: bool = False
) -> list[str]:
    """Return paths relative to the YAML; `{a,b}.json` gives both, Hub names stay.

    lacking: gets a line for each variable that is not set. foreign: those of other trainers, which take
    them from the working folder.
    """
    found = []
    for written in value if isinstance(value, list) else [value]:
        text, unset = with_variables(str(written), os.environ)
        lacking += unset
        braces = re.fullmatch(r"(.*)\{(.*)\}(.*)", text)
        names = [text]
        if braces:
            names = [f"{braces[1]}{part.strip()}{braces[3]}" for part in braces[2].split(",")]
        for name in names:
            path = name if str(written).startswith("${") else str(Path(config).parent / name)
            # a folder on this disk wins over a name of the Hub that looks like it
            if not Path(path).exists() and (is_hub_name(name) or (foreign and Path(name).exists())):
                path = name
            found.append(path)
    return found
