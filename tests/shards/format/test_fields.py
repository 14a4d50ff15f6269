"""plan.json, bank.json and .done: every field comes back, and any other is refused by name.

pytest tests/shards/format/test_fields.py
"""

import json
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from shards.errors import UserError
from shards.format.commits import CommitRecord, read_commit, shard_path
from shards.format.manifest import Manifest, read_manifest
from shards.format.plan import Plan, read_plan
from shards.signed import Json

Step = str | int
FREE = ("processor", "provenance", "catalogue", "superseded", "quality", "strides", "encoded")
"""Whose keys are names of columns, shards and the like; or, of a plan and a tower, not ours."""


def read(kind: str, data: Json) -> Plan | Manifest | CommitRecord:
    if kind == "plan.json":
        return Plan.from_json(data, "bank")
    if kind == "bank.json":
        return Manifest.from_json(data, "bank")
    return CommitRecord.from_json(data, "bank/shards/bank-000000.done")


@pytest.fixture(scope="module")
def files(toy_bank: Path) -> dict[str, Json]:
    """What the three files of a bank hold, as json."""
    plan = read_plan(toy_bank)
    assert plan
    records = {
        "plan.json": plan.to_json(),
        "bank.json": read_manifest(toy_bank).to_json(),
        "bank-000000.done": read_commit(shard_path(toy_bank, 0)).to_json(),
    }
    return {name: json.loads(json.dumps(record)) for name, record in records.items()}


def fields(data: Any, path: tuple[Step, ...] = ()) -> Iterator[tuple[Step, ...]]:
    """Yield the path of every field, of the first item of each list."""
    if isinstance(data, dict):
        for name, value in data.items():
            yield (*path, name)
            if name not in FREE:
                yield from fields(value, (*path, name))
    elif isinstance(data, list) and data:
        yield from fields(data[0], (*path, 0))


def at(data: Any, path: tuple[Step, ...]) -> Any:
    for step in path:
        data = data[step]
    return data


KINDS = ["plan.json", "bank.json", "bank-000000.done"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_is_what_was_written(files: dict[str, Json], kind: str) -> None:
    assert json.loads(json.dumps(read(kind, files[kind]).to_json())) == files[kind]


def refused(kind: str, data: Json) -> str | None:
    """Return the one line in which a file is refused, None if it is not."""
    try:
        read(kind, data)
    except UserError as error:
        return str(error)
    return None


def names(said: str, path: tuple[Step, ...]) -> bool:
    """Whether a refusal is one line about this field; or about what fields must be together."""
    told = str(path[-1]) in said or (path[-1] == "format_version" and "format" in said)
    return "\n" not in said and (told or ("sampling" in path and "sampling takes" in said))


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_that_is_missing_is_named(files: dict[str, Json], kind: str) -> None:
    count = 0
    for path in fields(files[kind]):
        data = deepcopy(files[kind])
        del at(data, path[:-1])[path[-1]]
        said = refused(kind, data)
        if (
            said is None
        ):  # what is null may be left out, what a plan does not know of a clip, a stride
            # and of its tower, in plans that were made before it was written down
            known = path[0] in ("units", "quality", "decoder") or path[-1] in ("device", "files")
            may = at(files[kind], path) is None or known
            assert may or str(path[-1]).isdecimal(), path
            continue
        assert names(said, path), (path, said)
        count += 1
    assert count >= 15


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrong", [None, True, "text", 1.5, -3, [], {}, [[None]], {"a": {}}])
def test_every_field_of_another_type_is_named_and_never_a_bug(
    files: dict[str, Json], kind: str, wrong: object
) -> None:
    for path in fields(files[kind]):
        data, right = deepcopy(files[kind]), at(files[kind], path)
        at(data, path[:-1])[path[-1]] = wrong
        said = refused(kind, data)
        plain = {int, str}
        if type(right) in plain and type(wrong) is not type(right) and wrong is not None:
            assert said, (path, wrong)
            assert names(said, path), (path, said)


@pytest.mark.parametrize("kind", KINDS)
def test_every_unknown_field_is_named(files: dict[str, Json], kind: str) -> None:
    for path in [(), *fields(files[kind])]:
        data = deepcopy(files[kind])
        parent = at(data, path)
        if not isinstance(parent, dict) or (path[-1:] and path[-1] in (*FREE, "calibration")):
            continue
        parent["newfangled"] = 1
        said = refused(kind, data)
        assert said, path
        assert "newfangled" in said or "numbers for keys" in said, (path, said)
