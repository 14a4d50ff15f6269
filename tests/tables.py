"""The tables of the pages that are made from code: written by this command, compared by a test.

python -m tests.tables            # all but the slow one
python -m tests.tables families   # the verdict on every LLM family: minutes

A table stands between `<!-- table: NAME -->` and `<!-- end -->`.
"""

import sys
from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, fields
from typing import Any

from model.config import ModelSettings
from model.settings import expected
from model.tower_kinds import KINDS, TowerKind
from shards.format.quarantine import Reason
from tests.readmes import ROOT, text_of
from train.settings.config import (
    BatchSettings,
    DataSettings,
    LlmSettings,
    OptimizerSettings,
    RunSettings,
)
from train.settings.foreign import ELSEWHERE, RENAMED

GROUPS = (
    (DataSettings, "Data"),
    (ModelSettings, "Model"),
    (LlmSettings, "LLM and arithmetic"),
    (OptimizerSettings, "Optimizer"),
    (BatchSettings, "Batches"),
    (RunSettings, "Run"),
)


def reasons() -> str:
    rows = [(f"`{reason}`", reason.meaning, reason.fix) for reason in Reason]
    return table(("reason", "what it means", "what to do"), rows)


def settings() -> str:
    parts = []
    for group, title in GROUPS:
        rows = [
            (f"`{item.name}`", default_of(item), values_of(item), item.metadata["help"])
            for item in fields(group)
        ]
        parts.append(f"**{title}**\n\n" + table(("setting", "default", "values", "meaning"), rows))
    return "\n".join(parts)


def default_of(item: Field[Any]) -> str:
    """Return a setting's default as a YAML has it; nothing where it is empty."""
    if item.default is MISSING or item.default == "":
        return ""
    if isinstance(item.default, bool):
        return str(item.default).lower()
    value = item.default
    return f"{value:g}".replace("e-05", "e-5") if isinstance(value, float) else str(value)


def values_of(item: Field[Any]) -> str:
    return expected(item).removeprefix("one of ")


def towers() -> str:
    rows = [
        (
            code(" ".join(kind.model_types)),
            kind.model.partition(":")[2],
            shape_of(kind),
            frames_of(kind),
        )
        for kind in KINDS
    ]
    return table(("`model_type`", "class of transformers", "frame", "time"), rows)


def shape_of(kind: TowerKind) -> str:
    return "keeps its shape" if kind.merge or kind.any_shape else "one fixed size"


def frames_of(kind: TowerKind) -> str:
    paired = "two frames make one entry" if kind.frames_per_unit else "each frame alone"
    return f"{paired}, windows of frames see each other" if kind.window else paired


def renamed() -> str:
    rows = [(f"`{ours}`", code(names)) for ours, names in RENAMED.items()]
    return table(("here", "elsewhere"), rows)


def elsewhere() -> str:
    rows = [(code(names), why) for why, names in ELSEWHERE.items()]
    return table(("elsewhere", "what is said of it"), rows)


def code(names: str) -> str:
    return ", ".join(f"`{name}`" for name in names.split())


def families() -> str:
    import transformers

    from model.family.__main__ import families as all_families
    from model.family.__main__ import row, verdicts

    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    head = f"| family (transformers {transformers.__version__}) | verdict | back-ends, or why |"
    found = verdicts(all_families())
    rows = [row(family, verdict).replace("`", "'") for family, verdict in found]  # some are cut off
    return "\n".join([head, "|---|---|---|", *rows]) + "\n"


def table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """Return a table of Markdown, whose cells may hold bars."""
    first, *rest = ["| " + " | ".join(escaped(line)) + " |\n" for line in (header, *rows)]
    return "".join([first, "|" + "---|" * len(header) + "\n", *rest])


def escaped(cells: Iterable[str]) -> list[str]:
    return [cell.replace("|", "\\|") for cell in cells]


TABLES: dict[str, tuple[str, Callable[[], str]]] = {
    "reasons": ("preprocess/README.md", reasons),
    "settings": ("train/README.md", settings),
    "towers": ("model/README.md", towers),
    "renamed": ("train/MIGRATING.md", renamed),
    "elsewhere": ("train/MIGRATING.md", elsewhere),
    "families": ("model/README.md", families),
}
"""Name -> its page, and what makes it."""
SLOW = ("families",)


def written(name: str) -> str:
    """Return a table as it stands in its page."""
    return _around(name)[1]


def write(name: str) -> None:
    page, make = TABLES[name]
    before, _, behind = _around(name)
    (ROOT / page).write_text(f"{before}{make()}{behind}", "utf-8")


def _around(name: str) -> tuple[str, str, str]:
    """Return what stands before a table, the table, and what stands behind it."""
    text = text_of(TABLES[name][0])
    mark = f"<!-- table: {name} -->\n\n"
    before, found, rest = text.partition(mark)
    inside, end, behind = rest.partition("\n<!-- end -->")
    assert "" not in (found, end), f"no table {name} in {TABLES[name][0]}"
    return before + mark, inside, end + behind


if __name__ == "__main__":
    for name in sys.argv[1:] or [name for name in TABLES if name not in SLOW]:
        write(name)
