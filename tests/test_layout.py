"""The laws of the house, as data: who may import whom, what stays light, and how large things grow.

pytest tests/test_layout.py

Each rule reads the syntax trees of a tree of packages and returns what breaks it. The same rules
run over this checkout, where nothing may, and over small made-up trees, where something must.
"""

import ast
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("shards", "model", "preprocess", "train")

FLOORS: dict[str, list[str]] = {
    "shards": [
        "shards.errors shards.siblings",
        "shards.text shards.hub shards.kinds shards.progress shards.forked",
        "shards.signed shards.storage shards.annotations",
        "shards.format",
        "shards.write",
        "shards.read shards.care",
        "shards",
    ],
    "model": [
        "model.settings model.slow_fast model.lape.tokens model.family.limits model.family.qwen_vl",
        "model.config model.tower_kinds model.cpu model.fsdp.parts model.family.inner model.adapter",
        "model.grid model.mask model.projector model.llm",
        "model.batch model.lape.tables",
        "model.frame_causal model.lape.head",
        "model.family.windows model.family.mrope model.family.deepstack",
        "model.family.masks model.family.head",
        "model.vlm",
        "model.generate model.tower model.fsdp",
        "model.family",
        "model",
    ],
    "preprocess": [
        "preprocess.decode",
        "preprocess.sources",
        "preprocess.toy_models preprocess.real_models preprocess.world",
        "preprocess.toy_places",
        "preprocess.encode preprocess.show preprocess.toyworld preprocess.footage",
        "preprocess.derive preprocess.care",
        "preprocess.cli",
        "preprocess",
    ],
    "train": [
        "train.settings",
        "train.data",
        "train.start train.flops train.scores",
        "train.batches",
        "train.loop train.sweep",
        "train.pages",
        "train",
    ],
}
"""From the ground up. A module lives in the room with the longest name that leads its own, and may
import its own room and those of lower floors: neither a room beside its own nor one above. The last
room, the package itself, takes the files that no other does: commands, and the package's door."""

MAY_IMPORT: dict[str, str] = {
    "shards": "shards",
    "model": "model shards.errors",
    "preprocess": "preprocess shards model",
    "train": "train shards model",
    "train.ask": "train shards model preprocess.decode",
    "train.bank_vlm.source": "train shards model preprocess.decode",
    "train.lmms_adapter": "train shards model preprocess.decode",
    "train.shown": "train shards model preprocess.decode preprocess.show",
    "train.pages.foreseen": "train shards model preprocess.show",
    "train.pages.read.footage": "train shards model preprocess.decode preprocess.show",
}
"""What of ours a module may import; the longest name that leads the module's counts.

`shown` draws an answer about a raw video over its frames, as `preprocess show` draws them; reports
show frames, and features in its colours."""

ONLY_FOR: dict[str, str] = {
    "model.tower": "model.tower preprocess train.ask train.bank_vlm.processor train.bank_vlm.source"
}
"""Modules that others than these may not import: training needs no tower."""

LIGHT = (
    "shards",
    *("preprocess.cli", "preprocess.sources", "preprocess.decode"),
    *("train.settings", "train.data", "train.scores"),
    *("model.config", "model.settings", "model.slow_fast", "model.tower_kinds"),
    "model.lape.tokens",
    *("train.run", "train.evaluate", "train.batches.plan"),  # they refuse before torch is there
)
HEAVY = ("torch", "transformers", "accelerate", "decord", "av", "zarr")
"""LIGHT modules import none of these on the way, so that errors come at once."""

NO_VIDEO = ("model.tower", "preprocess", "decord", "av", "PIL", "cv2", "torchvision")
WITHOUT_VIDEO = ("train.run", "train.evaluate")
"""They never reach NO_VIDEO, not even from inside a function."""

DRAWERS = {"utils", "util", "common", "helpers", "misc", "choices"}
MOST_FILES, MOST_LINES, LONGEST = 12, 400, 60
"""Files in a folder beside `__init__`, lines of a file, lines of a function."""

Found = dict[str, str]
"""What breaks a rule, and details that may change from day to day."""


def leads(package: str, name: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def longest(names: Iterable[str], module: str) -> str:
    """Return the longest of the names that lead the module's, or nothing."""
    return max((name for name in names if leads(name, module)), key=len, default="")


@dataclass(frozen=True)
class House:
    """The packages below `root`."""

    root: Path

    @cached_property
    def sources(self) -> dict[str, Path]:
        """The file of each module."""
        return {
            self.name_of(path): path
            for package in PACKAGES
            for path in sorted((self.root / package).rglob("*.py"))
        }

    def name_of(self, path: Path) -> str:
        parts = path.relative_to(self.root).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @cached_property
    def trees(self) -> dict[str, ast.Module]:
        return {module: ast.parse(path.read_text("utf-8")) for module, path in self.sources.items()}

    @cached_property
    def imports(self) -> dict[str, set[str]]:
        """The modules that each module imports anywhere."""
        return {module: self.imported(module, tree) for module, tree in self.trees.items()}

    @cached_property
    def imports_at_once(self) -> dict[str, set[str]]:
        """Those that it imports when it is imported."""
        return {m: self.imported(m, top_level(tree)) for m, tree in self.trees.items()}

    @cached_property
    def ours(self) -> list[tuple[str, str]]:
        """Every import of one of our modules: (importer, imported)."""
        return [
            (module, name)
            for module, names in self.imports.items()
            for name in sorted(names)
            if name in self.sources
        ]

    def imported(self, module: str, tree: ast.AST) -> set[str]:
        """Return what a tree imports at any level; `from a import b` means a.b where that is a module."""
        found: set[str] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                base = self._base(module, node)
                below = {f"{base}.{alias.name}" for alias in node.names} & self.sources.keys()
                found |= below
                if len(below) < len(node.names):
                    found.add(base)
            elif isinstance(node, ast.Call) and node.args:
                # importlib.import_module("x"), __import__("x")
                called = ast.unparse(node.func).rsplit(".", 1)[-1]
                name = node.args[0]
                if called in ("import_module", "__import__") and isinstance(name, ast.Constant):
                    found.add(str(name.value))
        return found

    def _base(self, module: str, node: ast.ImportFrom) -> str:
        base = node.module or ""
        if node.level:
            is_package = self.sources.get(module, Path()).name == "__init__.py"
            parts = module.split(".")
            kept = parts[: len(parts) - node.level + is_package]
            base = ".".join([*kept, *([base] if base else [])])
        return base


def top_level(tree: ast.Module) -> ast.Module:
    """Return a tree without what runs only when called or type-checked."""

    class Strip(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
            return None

        def visit_If(self, node: ast.If) -> ast.AST | None:
            return None if "TYPE_CHECKING" in ast.unparse(node.test) else self.generic_visit(node)

    return Strip().visit(ast.parse(ast.unparse(tree)))


def reached(start: str, graph: dict[str, set[str]]) -> dict[str, str]:
    """Return each module reached from `start`, packages above included, with who imports it."""
    importer: dict[str, str] = {}
    waiting = [(start, "")]
    while waiting:
        name, by = waiting.pop()
        parts = name.split(".")
        for known in (".".join(parts[: k + 1]) for k in range(len(parts))):
            if known not in importer:
                importer[known] = by
                waiting += [(imported, known) for imported in graph.get(known, ())]
    return importer


def trail(name: str, importer: dict[str, str]) -> str:
    return name if not importer.get(name) else f"{trail(importer[name], importer)} -> {name}"


def circles(graph: dict[str, set[str]]) -> Found:
    """Return the sets of nodes that reach each other, by their names."""
    ways = {node: reached_plainly(node, graph) for node in graph}
    groups = {
        frozenset({node, *(o for o in far if node in ways.get(o, ()))})
        for node, far in ways.items()
        if node in far
    }
    return {" <-> ".join(sorted(group)): "" for group in groups}


def reached_plainly(start: str, graph: dict[str, set[str]]) -> set[str]:
    """Return the nodes after one edge or more."""
    found: set[str] = set()
    waiting = list(graph.get(start, ()))
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += graph.get(node, ())
    return found


# -- the rules


def climbs(house: House) -> Found:
    """Imports of a room above or beside."""
    wrong: Found = {}
    for module, name in house.ours:
        floors = FLOORS[module.split(".")[0]]
        level = {room: height for height, floor in enumerate(floors) for room in floor.split()}
        here, there = longest(level, module), longest(level, name)
        if there and here != there and level[here] <= level[there]:
            wrong[f"{module} -> {name}"] = f"{here} is not above {there}"
    return wrong


def trespasses(house: House) -> Found:
    """Imports of ours by somebody who may not."""
    wrong: Found = {}
    for module, name in house.ours:
        allowed = MAY_IMPORT[longest(MAY_IMPORT, module)].split()
        guarded = longest(ONLY_FOR, name)
        if not longest(allowed, name) or (
            guarded and not longest(ONLY_FOR[guarded].split(), module)
        ):
            wrong[f"{module} -> {name}"] = f"it may import {', '.join(allowed)}"
    return wrong


def module_circles(house: House) -> Found:
    return circles(
        {module: names & house.sources.keys() for module, names in house.imports.items()}
    )


def folder_circles(house: House) -> Found:
    """Circles between folders; a file that is a room of its own stands for itself."""
    rooms = [room for floors in FLOORS.values() for floor in floors for room in floor.split()]

    def place(module: str) -> str:
        is_package = house.sources[module].name == "__init__.py"
        folder = module if is_package else module.rpartition(".")[0]
        return max(folder, longest(rooms, module), key=len)

    graph: dict[str, set[str]] = {place(module): set() for module in house.sources}
    for module, name in house.ours:
        if place(module) != place(name):
            graph[place(module)].add(place(name))
    return circles(graph)


def missing_modules(house: House) -> Found:
    """Imports of modules of ours that are not there."""
    return {
        f"{module} -> {name}": ""
        for module, names in house.imports.items()
        for name in names
        if name.split(".")[0] in PACKAGES and name not in house.sources
    }


def heavy_on_the_way(house: House) -> Found:
    """Light modules that import something heavy, themselves or through others, before any call."""
    wrong: Found = {}
    for module in house.sources:
        if longest(LIGHT, module):
            importer = reached(module, house.imports_at_once)
            for name in importer:
                if name in HEAVY:
                    wrong[f"{module} -> {name}"] = trail(name, importer)
    return wrong


def torch_in_shards(house: House) -> Found:
    """Imports of a deep-learning library by the bank's package, at any level."""
    banned = {"torch", "transformers", "accelerate", "safetensors", "peft"}
    return {
        f"{module} -> {name}": ""
        for module, names in house.imports.items()
        for name in names
        if leads("shards", module) and name.split(".")[0] in banned
    }


def video_in_training(house: House) -> Found:
    """Videos and towers that training or scoring reaches."""
    wrong: Found = {}
    for module in WITHOUT_VIDEO:
        importer = reached(module, house.imports)
        for name in importer:
            if longest(NO_VIDEO, name):
                wrong[f"{module} -> {name}"] = trail(name, importer)
    return wrong


def crowded_folders(house: House) -> Found:
    files = Counter(p.parent for p in house.sources.values() if p.name != "__init__.py")
    return {
        folder.relative_to(house.root).as_posix(): f"{count} files"
        for folder, count in files.items()
        if count > MOST_FILES
    }


def long_files(house: House) -> Found:
    lines = {module: len(path.read_text().splitlines()) for module, path in house.sources.items()}
    return {module: f"{count} lines" for module, count in lines.items() if count > MOST_LINES}


def long_functions(house: House) -> Found:
    """Functions that are too long and do not say why: `# long: <reason>` above or on top."""
    wrong: Found = {}
    for module, tree in house.trees.items():
        lines = house.sources[module].read_text().splitlines()
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno
                length = node.end_lineno - node.lineno + 1
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 2
                has_words = ast.get_docstring(node) is not None and len(node.body) > 1
                last = node.body[1 if has_words else 0].lineno
                reasons = [line for line in lines[max(first, 0) : last] if "# long: " in line]
                if length > LONGEST and not reasons:
                    wrong[f"{module}.{node.name}"] = f"{length} lines"
    return wrong


def drawers(house: House) -> Found:
    """Files for odds and ends."""
    names = {module: DRAWERS & set(module.split(".")) for module in house.sources}
    return {module: "" for module, found in names.items() if found}


Rule = Callable[[House], Found]
RULES: tuple[Rule, ...] = (
    climbs,
    trespasses,
    module_circles,
    folder_circles,
    missing_modules,
    heavy_on_the_way,
    torch_in_shards,
    video_in_training,
    crowded_folders,
    long_files,
    long_functions,
    drawers,
)

HERE = House(ROOT)


def named(rule: Rule) -> str:
    return rule.__name__


@pytest.mark.parametrize("rule", RULES, ids=named)
def test_nothing_here_breaks_a_rule(rule: Rule) -> None:
    assert not rule(HERE)


def test_every_name_in_the_rules_is_a_module_or_a_folder_here() -> None:
    rooms = [room for floors in FLOORS.values() for floor in floors for room in floor.split()]
    assert len(rooms) == len(set(rooms))
    named = [*rooms, *MAY_IMPORT, *ONLY_FOR, *LIGHT, *WITHOUT_VIDEO]
    named += [
        name for names in [*MAY_IMPORT.values(), *ONLY_FOR.values()] for name in names.split()
    ]
    assert not [name for name in named if name not in HERE.sources]
    assert len(reached("train.run", HERE.imports)) > 30, "the walk found nothing"


# -- each rule finds what breaks it


def built(root: Path, files: dict[str, str]) -> House:
    """Write the packages and these files below `root`."""
    for package in PACKAGES:
        (root / package).mkdir()
        (root / package / "__init__.py").touch()
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        for folder in path.relative_to(root).parents[:-1]:
            (root / folder / "__init__.py").touch()
    return House(root)


BODY = "\n".join(f"    x{k} = {k}" for k in range(60))
SHORT_BODY = "\n".join(f"    x{k} = {k}" for k in range(59))

BROKEN: list[tuple[Rule, dict[str, str], set[str]]] = [
    (
        climbs,
        {"shards/errors.py": "import shards.text", "shards/text.py": ""},
        {"shards.errors -> shards.text"},
    ),
    (climbs, {"shards/text.py": "import shards.errors", "shards/errors.py": ""}, set()),
    (
        climbs,
        {
            "shards/read/a.py": "def f():\n    from shards.care.b import c",
            "shards/care/b.py": "",
            "shards/care/c.py": "import shards.care.b",
        },
        {"shards.read.a -> shards.care.b"},
    ),
    (
        climbs,
        {"train/data/a.py": "from train import run", "train/run.py": "import train.data.a"},
        {"train.data.a -> train.run"},
    ),
    (
        trespasses,
        {
            "model/a.py": "from shards.errors import E; from shards.format import plan",
            "shards/errors.py": "",
            "shards/format/plan.py": "",
        },
        {"model.a -> shards.format.plan"},
    ),
    (
        trespasses,
        {
            "train/ask.py": "import preprocess.decode.a, preprocess.encode.b, model.tower.c",
            "train/run.py": "import model.tower.c, preprocess.decode.a",
            "preprocess/decode/a.py": "import train.ask, model.tower.c",
            "preprocess/encode/b.py": "",
            "model/tower/c.py": "",
            "model/vlm.py": "import model.tower.c",
        },
        {
            "train.ask -> preprocess.encode.b",
            "train.run -> model.tower.c",
            "train.run -> preprocess.decode.a",
            "preprocess.decode.a -> train.ask",
            "model.vlm -> model.tower.c",
        },
    ),
    (
        module_circles,
        {
            "model/a.py": "import model.b",
            "model/b.py": "def f():\n    from .c import d",
            "model/c.py": "from model import a",
            "model/d.py": "import model.a",
        },
        {"model.a <-> model.b <-> model.c"},
    ),
    (
        folder_circles,
        {
            "train/loop/a.py": "import train.batches.b",
            "train/batches/b.py": "",
            "train/batches/c.py": "import train.loop.d",
            "train/loop/d.py": "",
        },
        {"train.batches <-> train.loop"},
    ),
    (
        folder_circles,
        {
            "shards/__init__.py": "from shards.read import a",
            "shards/read/a.py": "import shards.signed",
            "shards/signed.py": "",
        },
        set(),
    ),
    (missing_modules, {"model/a.py": "import model.gone"}, {"model.a -> model.gone"}),
    (
        heavy_on_the_way,
        {
            "preprocess/cli/a.py": "from model import grid",
            "model/grid.py": "import torch.nn",
            "train/data/b.py": "def f():\n    import torch",
            "train/loop/c.py": "import torch",
            "shards/text.py": "if TYPE_CHECKING:\n    import zarr",
            "shards/signed.py": "try:\n    import zarr\nexcept ImportError:\n    pass",
        },
        {"preprocess.cli.a -> torch", "shards.signed -> zarr"},
    ),
    (
        torch_in_shards,
        {"shards/a.py": "def f():\n    import torch.nn", "model/a.py": "import torch"},
        {"shards.a -> torch.nn"},
    ),
    (
        video_in_training,
        {
            "train/run.py": "def f():\n    import train.data.a",
            "train/data/a.py": "def f():\n    __import__('av.filter')",
            "train/ask.py": "import decord",
        },
        {"train.run -> av", "train.run -> av.filter"},
    ),
    (
        crowded_folders,
        {f"train/{k}/{n}.py": "" for k in ("loop", "data") for n in range(12 + (k == "loop"))},
        {"train/loop"},
    ),
    (long_files, {"model/a.py": "\n" * 401, "model/b.py": "\n" * 400}, {"model.a"}),
    (
        long_functions,
        {
            "model/a.py": f"class A:\n  def f(self):\n{BODY}\n",
            "model/b.py": f"def f():\n{SHORT_BODY}\n",
            "model/c.py": f"# long: a table\n@property\ndef f():\n{BODY}\n",
            "model/d.py": f'def f():\n    """Words."""\n    # long: a table\n{BODY}\n',
            "model/e.py": f'def f():\n    """Words."""\n{BODY}\n    # long: too late\n',
        },
        {"model.a.f", "model.e.f"},
    ),
    (
        drawers,
        {"model/utils.py": "", "train/helpers/a.py": "", "model/useful.py": ""},
        {"model.utils", "train.helpers", "train.helpers.a"},
    ),
]


@pytest.mark.parametrize(
    ("rule", "files", "wrong"), BROKEN, ids=[f"{named(r)}{k}" for k, (r, *_) in enumerate(BROKEN)]
)
def test_a_rule_finds_what_breaks_it_and_nothing_else(
    tmp_path: Path, rule: Rule, files: dict[str, str], wrong: set[str]
) -> None:
    assert rule(built(tmp_path, files)).keys() == wrong


def test_no_rule_is_without_a_tree_that_breaks_it() -> None:
    assert {rule for rule, _, wrong in BROKEN if wrong} == set(RULES)


def test_the_walker_sees_imports_at_any_level(tmp_path: Path) -> None:
    files = {
        "train/run.py": "import a.b\n"
        "def f():\n"
        "    from c import d\n"
        "    class G:\n"
        "        import e as g\n"
        "if True:\n"
        "    from shards.format import features, VERSION\n"
        "from .settings import config\n"
        "from .data.records import x\n"
        "h = __import__('i.j')\n",
        "shards/format/features.py": "",
        "train/settings/config.py": "",
    }
    house = built(tmp_path, files)
    anywhere = {"a.b", "c", "e", "shards.format", "shards.format.features", "i.j"}
    assert house.imports["train.run"] == anywhere | {"train.settings.config", "train.data.records"}
    assert house.imports_at_once["train.run"] == house.imports["train.run"] - {"c", "e"}


# -- names and tools outside the packages


def test_the_linter_excuses_folders_from_the_ban_on_heavy_imports_and_no_light_one() -> None:
    ruff = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["lint"]
    assert set(ruff["flake8-tidy-imports"]["banned-module-level-imports"]) == set(HEAVY)
    excused = [glob for glob, codes in ruff["per-file-ignores"].items() if "TID253" in codes]
    assert len(excused) <= 2
    command = [sys.executable, "-m", "ruff", "check", "--select", "TID253", "-"]
    for name in LIGHT:
        if longest(("model", "train.batches"), name):  # globs excuse the whole folders
            continue
        done = subprocess.run(
            [*command, "--stdin-filename", str(HERE.sources[name])],
            input="import torch\n",
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        assert "TID253" in done.stdout, name


def test_the_packages_are_those_of_this_checkout(tmp_path: Path) -> None:
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        assert spec
        assert spec.origin == str(ROOT / package / "__init__.py")
    script = (
        f"import {', '.join(PACKAGES)}; print(*({', '.join(p + '.__file__' for p in PACKAGES)},))"
    )
    elsewhere = subprocess.run(
        [sys.executable, "-P", "-c", script], cwd=tmp_path, capture_output=True, text=True
    )
    assert elsewhere.stdout.split() == [str(ROOT / p / "__init__.py") for p in PACKAGES]


def test_no_script_folder_hides_a_module_of_python_or_of_a_dependency() -> None:
    """`python train/run.py` puts train/ first on the path: train/random.py would be `random`."""
    taken = set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions())
    taken -= set(PACKAGES)
    for package in ("train", "preprocess"):
        found = (ROOT / package).iterdir()
        names = {path.stem for path in found if path.suffix in ("", ".py")}  # not py.typed
        names -= {"__init__", "__main__", "__pycache__"}
        assert names
        assert not names & taken


PROMISES = {*range(1, 15), 16, 17, 18, 19, 20, 21}
"""The promises that are met and proven, by number."""


def test_each_promise_has_one_file_that_says_it() -> None:
    said: dict[int, str] = {}
    for path in (ROOT / "tests" / "promises").glob("*.py"):
        named = re.fullmatch(r"test_p(\d\d)_\w+", path.stem)
        assert named, f"{path.name}: which promise?"
        tree = ast.parse(path.read_text())
        text = ast.get_docstring(tree) or ""
        number = int(named[1])
        assert number not in said, f"{path.name} and {said[number]}"
        assert re.match(rf"P{number}: \w.{{20,}}", text), (
            f"{path.name}: begin with `P{number}: ...`"
        )
        tests = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
        assert any(node.name.startswith("test_") for node in tests), path.name
        said[number] = path.name
    assert said.keys() == PROMISES
