"""Settings as they are written - flags, environment, YAML - read as the values that they mean.

What is wrong is collected, each problem with where it stands; which settings there are is the caller's.
"""

import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from model.settings import SWITCH, expected, problem_of
from train.settings.foreign import (
    ENVIRONMENT,
    FOREIGN,
    NESTS,
    environment_problems,
    is_foreign,
    unknown,
)

POSITIONAL = ("stage_path", "data_mixture", "output_dir")
"""Settings of the words before the first flag, as in VILA's scripts."""
BOOLEANS = dict.fromkeys(("true", "yes", "on", "1"), True)
BOOLEANS |= dict.fromkeys(("false", "no", "off", "0"), False)

VARIABLE = re.compile(r"\$\{(\w+)\}")
NULL = "tag:yaml.org,2002:null"
NESTED = "a list or a mapping; write an item as on a command line (`- drop=0.3`)"
NOT_ZERO = re.compile("[^eE]*[1-9]")

Origin = str
"""Where a value was written: `x.yaml:14`, `--flag` or an environment variable."""


def merge(
    settings: type,
    argv: Sequence[str],
    environ: Mapping[str, str],
    problems: list[str],
    written: Sequence[tuple[str, Any, Origin]] = (),
) -> dict[str, tuple[Any, Origin]]:
    """Return setting -> (value, where it was written); problems are added to `problems`.

    settings: the dataclass that declares them. written: those of a sweep's run (name, raw, where), over
    all but the flags.
    """
    # -- from the weakest to the strongest: each later value replaces an earlier one
    flags = read_flags(settings, argv, problems)
    values: dict[str, tuple[Any, Origin]] = {}
    for path in [value for name, value, _ in flags if name == "config"]:
        for name, value, origin in read_yaml(path, problems):
            _set(settings, values, name, value, origin, problems)
    problems += environment_problems(environ)
    for variable, name in ENVIRONMENT.items():
        if environ.get(variable):  # a variable that is set to nothing is unset, as shells have it
            _set(settings, values, name, environ[variable], variable, problems)
    for name, value, origin in written:
        _set(settings, values, name, value, origin, problems)
    for name, value, origin in flags:
        if name != "config":
            _set(settings, values, name, value, origin, problems)
    return values


def obey(
    settings: type,
    values: dict[str, tuple[Any, Origin]],
    asked: Sequence[tuple[str, str, Origin]],
    problems: list[str],
) -> None:
    """Give settings that are not set the values that the launcher was asked for.

    asked: (setting, value, where it was written). One that is set to something else is a problem that
    names both places.
    """
    for name, raw, origin in asked:
        theirs: dict[str, tuple[Any, Origin]] = {}
        _set(settings, theirs, name, raw, origin, problems)
        if not theirs:
            continue
        ours = values.setdefault(name, theirs[name])
        if ours[0] != theirs[name][0]:
            problems.append(
                f"{ours[1]} {name} is {_shown(ours[0])}, and {origin} asks for "
                f"{_shown(theirs[name][0])}: take one of them out"
            )


def read_flags(
    settings: type, argv: Sequence[str], problems: list[str]
) -> list[tuple[str, Any, Origin]]:
    """Split `--key value` and `--key=value`; a list takes every word up to the next flag.

    Up to three words before the first flag are the stage path, the mixture and the output folder.
    """
    found: list[tuple[str, Any, Origin]] = []
    lists: set[str] = set()
    names = {item.name for item in fields(settings)}
    words = list(argv)
    for name in POSITIONAL:
        if words and not words[0].startswith("-"):
            found.append((name, words.pop(0), f"--{name}"))
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            problems.append(f"{word!r}: expected --setting value (see --help)")
            continue
        name, equals, value = word[2:].replace("-", "_").partition("=")
        # the value as written: only the name has its dashes replaced
        value = word.partition("=")[2]
        following = []
        while words and not words[0].startswith("--"):
            following.append(words.pop(0))
        # --x=a b: a list goes on after its =
        if equals:
            following.insert(0, value)
        if name != "config" and name not in names:
            found.append((name, following, f"--{name}"))
        elif not following and typing.get_type_hints(settings).get(name) in (bool, SWITCH):
            found.append((name, "true", f"--{name}"))
        elif not following:
            problems.append(f"--{name}: needs a value")
        elif not _is_list(settings, name):
            if len(following) > 1:
                problems.append(f"--{name}: takes one value, got {' '.join(following)}")
            else:
                found.append((name, following[0], f"--{name}"))
        elif name in lists:
            # of a single value the last one wins, as in any script; of a list that may be meant, or all
            problems.append(f"--{name}: given twice; give all its values behind one --{name}")
        else:
            lists.add(name)
            found.append((name, following, f"--{name}"))
    return found


def read_yaml(path: str, problems: list[str]) -> list[tuple[str, Any, Origin]]:
    """Return a YAML file's settings with the line that each stands on."""
    try:
        # compose, not load: nodes keep their lines, and scalars their spelling (1e-5, 0.07, on)
        root = yaml.compose(Path(path).read_text("utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        problems.append(f"--config {path}: {error.strerror}")
        return []
    except UnicodeDecodeError as error:
        problems.append(f"--config {path}: not UTF-8 ({error}); save it as UTF-8")
        return []
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        problems.append(f"{path}:{line} not valid YAML: {getattr(error, 'problem', error)}")
        return []
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        problems.append(f"{path}:1 expected `setting: value` lines")
        return []
    return _lines(path, root, {}, problems)


def _lines(
    path: str, root: yaml.MappingNode, seen: dict[str, int], problems: list[str]
) -> list[tuple[str, Any, Origin]]:
    """Return the settings of a mapping, and of those that other trainers' keys nest in it."""
    found: list[tuple[str, Any, Origin]] = []
    for key, node in root.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            problems.append(
                f"{path}:{line} expected the name of a setting, got a list or a mapping"
            )
            continue
        # PyYAML's loaders keep the last one without a word
        if key.value in seen:
            problems.append(f"{path}:{line} {key.value}: already set in line {seen[key.value]}")
            continue
        seen[key.value] = line
        # as a text it would be a folder of that name
        nulls = [one for one in (node, *_items(node)) if one.tag == NULL and one.value]
        if nulls and not is_foreign(key.value):
            problems.append(f"{path}:{line} {key.value} is {nulls[0].value}; leave it out")
            continue
        nested = [one for one in _items(node) if not isinstance(one, yaml.ScalarNode)]
        if nested and not is_foreign(key.value):
            problems.append(f"{path}:{line} {key.value}: expected texts in its list, got {NESTED}")
            continue
        if isinstance(node, yaml.ScalarNode):
            value: Any = node.value
        elif isinstance(node, yaml.SequenceNode):
            value = [item.value for item in node.value]
        elif key.value in NESTS:
            problems.append(f"{path}:{line} {key.value}: {FOREIGN[key.value]}")
            found += _lines(path, node, seen, problems)
            continue
        elif is_foreign(key.value):
            value = ""
        else:
            problems.append(f"{path}:{line} {key.value}: expected a value or a list, got a mapping")
            continue
        found.append((key.value, value, f"{path}:{line}"))
    return found


def _items(node: yaml.Node) -> list[yaml.Node]:
    return node.value if isinstance(node, yaml.SequenceNode) else []


def _set(
    settings: type,
    values: dict[str, tuple[Any, Origin]],
    name: str,
    raw: Any,
    origin: Origin,
    problems: list[str],
) -> None:
    known = {item.name: item for item in fields(settings)}
    subject = origin if origin in ENVIRONMENT or origin.startswith("--") else f"{origin} {name}"
    if name not in known:
        problems.append(f"{subject}: {unknown(name, known)}")
        return
    item = known[name]
    try:
        value = _convert(raw, item.type)
    except ValueError:
        shown = raw if isinstance(raw, list) else repr(raw)
        problems.append(f"{subject} must be {expected(item)}, got {shown}")
        return
    problem = problem_of(item, value)
    if problem:
        problems.append(f"{subject} {problem}, got {raw!r}")
    else:
        values[name] = (value, origin)


def _convert(raw: Any, kind: Any) -> Any:
    """Return a written value as a setting's type; `1e-5` is a number whatever YAML thinks."""
    if isinstance(kind, types.GenericAlias):
        words = raw if isinstance(raw, list) else [raw]
        # "a, b" is as common as "a,b", and no name has a blank at its end
        items = (word.strip() for text in words for word in str(text).split(","))
        return [item for item in items if item]
    if isinstance(raw, list):
        raise ValueError(raw)
    if kind == SWITCH:
        return BOOLEANS.get(raw.lower(), raw.lower())
    if kind is bool:
        if raw.lower() not in BOOLEANS:
            raise ValueError(raw)
        return BOOLEANS[raw.lower()]
    value = kind(raw)
    if kind is float and value == 0 and NOT_ZERO.match(raw):  # 1e-400 is not to become 0
        raise ValueError(raw)
    return value


def with_variables(text: str, environ: Mapping[str, str]) -> tuple[str, list[str]]:
    """Return a text with `${NAME}` replaced by the environment's NAME, and a line for each not set."""
    lacking = [
        f"${{{name}}}: no such variable in the environment; set it"
        for name in VARIABLE.findall(text)
        # an empty one, too: ${WORLD}/bank would become /bank
        if not environ.get(name)
    ]
    return VARIABLE.sub(lambda found: environ.get(found[1], ""), text), lacking


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _is_list(settings: type, name: str) -> bool:
    return isinstance(typing.get_type_hints(settings).get(name), types.GenericAlias)
