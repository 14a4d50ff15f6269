"""Read a dataclass from json: every field present, none unknown, each of its type; else a UserError.

parse(Sampling, {"num_frames": 8}, "sampling.json")

Lists become tuples where the field is a tuple; keys of a `dict[int, ...]` are text in json. A field whose
default is None may be left out; every other field must be present, because the current default need not
be what an older writer used.
"""

import dataclasses
from collections.abc import Callable, Mapping, Set
from enum import Enum
from functools import cache
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from shards.errors import UserError

Record = TypeVar("Record")
Reader = Callable[[object, str], Any]
"""(value in the json, its dotted name) -> value of the field; raises UserError."""


def parse(kind: type[Record], data: object, where: str) -> Record:
    """Return `data` as the dataclass `kind`; raises UserError naming the first field that is wrong."""
    try:
        found: Record = _reader(kind)(data, "")  # type: ignore[arg-type]  # a class can be hashed
    except UserError as error:
        # the inner readers know the field, this one the file: together a line that can be acted on
        raise UserError(error.what, error.got, error.expected, where, error.fix) from None
    return found


@cache
def _reader(kind: Any) -> Reader:
    """Return the reader of a type; cached, because a bank has millions of values."""
    if dataclasses.is_dataclass(kind):
        return _record(kind)
    origin, args = get_origin(kind), get_args(kind)
    if origin is UnionType and args == (int, str):
        return lambda value, where: _of(value, args, "an integer or a text", where)
    if origin is UnionType:
        # `X | None`: null means that the field is not set
        inner = _reader(next(one for one in args if one is not NoneType))
        return lambda value, where: None if value is None else inner(value, where)
    if origin in (list, tuple, frozenset):
        return _items(origin, args)
    if origin in (dict, Mapping):
        return _mapping(*args)
    if kind is float:
        return lambda value, where: float(_of(value, (int, float), "a number", where))
    if kind is Any:
        return lambda value, where: value
    return _plain(kind)


def _plain(kind: type) -> Reader:
    if issubclass(kind, Enum):
        return lambda value, where: _member(kind, value, where)
    word = {int: "an integer", str: "a text", bool: "true or false"}[kind]
    return lambda value, where: _of(value, (kind,), word, where)


def _of(value: object, kinds: tuple[type, ...], word: str, where: str) -> Any:
    """Return the value if it is of one of these types; `type`, because True is an int by isinstance."""
    if type(value) in kinds:
        return value
    shown = repr(value)
    shown = shown if len(shown) < 40 else f"{shown[:36]} ..."
    raise UserError(f"{where.lstrip('.') or 'it'} must be {word}", got=shown)


def _member(kind: type[Enum], value: object, where: str) -> Enum:
    try:
        return kind(value)
    except ValueError:
        words = ", ".join(str(member.value) for member in kind)
        raise UserError(f"{where.lstrip('.')} must be one of {words}", got=repr(value)) from None


def _items(origin: type, args: tuple[Any, ...]) -> Reader:
    # tuple[int, int] has a length, tuple[int, ...] has none
    fixed = origin is tuple and args[-1] is not Ellipsis
    readers = [_reader(one) for one in args if one is not Ellipsis]

    def read(value: object, where: str) -> Any:
        items = _of(value, (list,), "a list", where)
        if fixed and len(items) != len(readers):
            raise UserError(f"{where.lstrip('.')} must be a list of {len(readers)}", got=len(items))
        each = readers if fixed else readers * len(items)
        return origin(one(item, where) for one, item in zip(each, items, strict=True))

    return read


def _mapping(key_kind: type, value_kind: Any) -> Reader:
    inner = _reader(value_kind)

    def read(value: object, where: str) -> Any:
        items = _of(value, (dict,), "an object", where).items()
        # json has texts as keys; strides are numbers here
        if key_kind is int:
            if not all(name.isdecimal() for name, _ in items):
                raise UserError(f"{where.lstrip('.')} must have numbers for keys")
            return {int(name): inner(item, f"{where}.{name}") for name, item in items}
        return {name: inner(item, f"{where}.{name}") for name, item in items}

    return read


def _record(kind: Any) -> Reader:
    hints = get_type_hints(kind)
    readers = {field.name: _reader(hints[field.name]) for field in dataclasses.fields(kind)}
    # a default of None is a field that may be absent; any other default was a choice at its time
    needed = {field.name for field in dataclasses.fields(kind) if field.default is not None}

    def read(value: object, where: str) -> Any:
        data = _of(value, (dict,), "an object", where)
        if not data.keys() <= readers.keys():
            names = _named(where, data.keys() - readers.keys())
            raise UserError(f"unknown {names}", fix="made by a newer framebank: update it")
        if not needed <= data.keys():
            raise UserError(f"lacks {_named(where, needed - data.keys())}")
        return kind(**{name: readers[name](item, f"{where}.{name}") for name, item in data.items()})

    return read


def _named(where: str, names: Set[str]) -> str:
    return ", ".join(f"{where}.{name}".lstrip(".") for name in sorted(names))
