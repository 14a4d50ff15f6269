"""Who may import whom: the house of DESIGN.md, read off the syntax trees.

pytest tests/test_layout.py
"""

import ast
import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("shards", "model", "preprocess", "train")
ALLOWED = {
    "shards": {"shards"},
    "model": {"model"},
    "preprocess": {"preprocess", "shards", "model"},
    "train": {"train", "shards", "model"},
}
FOR_ASK = {"preprocess.decode.child", "preprocess.decode.request"}
NO_VIDEO = ("model.tower", "preprocess", "decord", "av", "PIL", "cv2", "torchvision")
LIGHT = ("preprocess.cli.main", "train.settings.config", "shards.format.features")
HEAVY = ("torch", "transformers", "accelerate", "decord", "av", "zarr")


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {
    name_of(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))
}


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def imports(module: str, tree: ast.AST) -> set[str]:
    """Return every module that a tree imports at any level; `from a import b` may mean both."""
    found: set[str] = set()
    is_package = SOURCES.get(module, Path()).name == "__init__.py"
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                kept = parts[: len(parts) - node.level + is_package]
                base = ".".join([*kept, *([base] if base else [])])
            found.add(base)
            found |= {
                f"{base}.{alias.name}" for alias in node.names if f"{base}.{alias.name}" in SOURCES
            }
        elif isinstance(node, ast.Call):
            # importlib.import_module("x"), __import__("x")
            called = ast.unparse(node.func).rsplit(".", 1)[-1]
            if called in ("import_module", "__import__") and isinstance(node.args[0], ast.Constant):
                found.add(str(node.args[0].value))
    return found


def top_level(tree: ast.Module) -> ast.Module:
    """Return the tree without what runs only when called or type-checked."""

    class Strip(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
            return None

        def visit_If(self, node: ast.If) -> ast.AST | None:
            return None if "TYPE_CHECKING" in ast.unparse(node.test) else self.generic_visit(node)

    return Strip().visit(tree)


TREES = {module: ast.parse(path.read_text("utf-8")) for module, path in SOURCES.items()}
IMPORTS = {module: imports(module, tree) for module, tree in TREES.items()}


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


@pytest.mark.parametrize("module", SOURCES)
def test_a_module_imports_only_the_packages_it_may(module: str) -> None:
    package = module.split(".")[0]
    ours = {name for name in IMPORTS[module] if name.split(".")[0] in PACKAGES}
    wrong = {name for name in ours if name.split(".")[0] not in ALLOWED[package]}
    wrong -= {"shards.errors"}
    if module == "train.ask":
        wrong -= FOR_ASK
    assert not wrong, f"{module} imports {sorted(wrong)}"


@pytest.mark.parametrize("module", [name for name in SOURCES if within(name, "shards")])
def test_shards_need_no_torch(module: str) -> None:
    torches = {"torch", "transformers", "accelerate", "safetensors", "peft"}
    assert not {name.split(".")[0] for name in IMPORTS[module]} & torches


@pytest.mark.parametrize("module", ["train.run", "train.evaluate"])
def test_training_and_scoring_need_no_video_and_no_tower(module: str) -> None:
    importer = reached(module, IMPORTS)
    assert len([name for name in importer if name in SOURCES]) > 5, "the walk found nothing"
    wrong = [name for name in importer if any(within(name, banned) for banned in NO_VIDEO)]
    assert not wrong, [trail(name, importer) for name in wrong]


@pytest.mark.parametrize("module", LIGHT)
def test_what_answers_before_torch_imports_nothing_heavy_on_the_way(module: str) -> None:
    graph = {name: imports(name, top_level(ast.parse(SOURCES[name].read_text()))) for name in TREES}
    importer = reached(module, graph)
    wrong = [name for name in importer if name in HEAVY]
    assert not wrong, [trail(name, importer) for name in wrong]


def test_every_import_of_ours_is_a_module_that_exists() -> None:
    for module, found in IMPORTS.items():
        for name in found:
            if name.split(".")[0] in PACKAGES:
                assert name in SOURCES, f"{module} imports {name}"


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
        names = {path.stem for path in (ROOT / package).iterdir()} - {"__init__", "__pycache__"}
        assert names
        assert not names & taken


def test_no_file_is_a_drawer_for_odds_and_ends() -> None:
    stems = {path.stem for path in SOURCES.values()}
    assert not stems & {"utils", "util", "common", "helpers", "misc"}


def test_the_walker_sees_imports_at_any_level() -> None:
    tree = ast.parse(
        "import a.b\n"
        "def f():\n"
        "    from c import d\n"
        "    class G:\n"
        "        import e as g\n"
        "if True:\n"
        "    from shards.format import features\n"
        "from .settings import config\n"
        "from .data.records import x\n"
        "h = __import__('i.j')\n"
    )
    assert imports("train.run", tree) == {
        "a.b",
        "c",
        "e",
        "shards.format",
        "shards.format.features",
        "train.settings",
        "train.settings.config",
        "train.data.records",
        "i.j",
    }
    assert imports("train.run", top_level(tree)) >= {"a.b", "shards.format.features"}
    assert not {"c", "e"} & imports("train.run", top_level(tree))
