"""The wheel: what is in it, and that it works where another project has a `model` and a `train`.

pytest tests/test_wheel.py

It is installed alone into an environment of its own, which borrows all other packages from this one.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("shards", "model", "preprocess", "train")
ACCELERATE = """
python -m accelerate.commands.accelerate_cli launch --num_processes 1 --num_machines 1
    --mixed_precision no --dynamo_backend no -m train.run --help
"""
COMMANDS = {
    "preprocess": ["preprocess", "--help"],
    "python -m preprocess": ["python", "-m", "preprocess", "--help"],
    "accelerate launch": ACCELERATE.split(),
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel made from a checkout in which work has left files."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):  # no .gitignore: exclusion is explicit
        shutil.copy(ROOT / name, folder / name)
    (folder / "shards" / "bank-000000.tar").write_bytes(bytes(1024))
    (folder / "tests").mkdir()
    (folder / "tests" / "test_a.py").touch()
    build = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "."]
    done = subprocess.run(
        [*build, "-q", "-w", "out"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (made,) = (folder / "out").glob("*.whl")
    return made


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a fresh environment with the wheel in it."""
    folder = tmp_path_factory.mktemp("fresh") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps"]
    subprocess.run([*install, "--no-index", str(wheel)], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    # a .pth of the folder that this one borrows is not obeyed: an editable install does not leak
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of another project, which has a `model` and a `train` of its own."""
    folder = tmp_path_factory.mktemp("elsewhere")
    for name in ("model", "train"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("raise RuntimeError('another project')\n")
    return folder


def ran(
    python: Path, words: list[str], folder: Path, **env: str
) -> "subprocess.CompletedProcess[str]":
    hidden = ("PYTHONPATH", "PYTHONSAFEPATH")
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    command = [str(python.with_name(words[0])), *words[1:]]
    return subprocess.run(
        command, cwd=folder, env=kept | env, capture_output=True, text=True, check=False
    )


def test_the_wheel_holds_the_four_packages_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    files = {name for name in names if ".dist-info/" not in name}
    tracked = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.suffix in (".py", ".yaml", ".md", ".typed", ".css", ".html")
    }
    assert files == tracked
    assert {name.split("/")[0] for name in files} == set(PACKAGES)
    assert "train/presets/toy.yaml" in files
    assert {f"{package}/py.typed" for package in PACKAGES} <= files
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_modules_are_those_of_the_wheel(python: Path, elsewhere: Path) -> None:
    script = "import sys, shards, model, preprocess, train, numpy;"
    script += "print(*(m.__file__ for m in (shards, model, preprocess, train)), sep='\\n')"
    done = ran(python, ["python", "-c", script], elsewhere, PYTHONSAFEPATH="1")
    files = [Path(line) for line in done.stdout.splitlines()]
    assert len(files) == 4, done.stderr
    assert all(file.is_relative_to(python.parents[1]) for file in files)


def test_the_door_of_the_bank_opens(python: Path, elsewhere: Path) -> None:
    script = "from shards import Bank, Banks; print(Bank.__module__)"
    done = ran(python, ["python", "-c", script], elsewhere, PYTHONSAFEPATH="1")
    assert done.stdout == "shards.read.bank\n", done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_run_beside_another_model_and_train(
    python: Path, elsewhere: Path, name: str
) -> None:
    done = ran(python, COMMANDS[name], elsewhere, PYTHONSAFEPATH="1")
    assert done.returncode == 0, done.stderr
    assert "another project" not in done.stderr
    assert ("--stage_path" if name == "accelerate launch" else "encode") in done.stdout


@pytest.mark.parametrize(
    "name", ["python -m preprocess", pytest.param("accelerate launch", marks=pytest.mark.slow)]
)
def test_without_a_safe_path_the_error_names_the_way_out(
    python: Path, elsewhere: Path, tmp_path: Path, name: str
) -> None:
    """A `train` of theirs leaves us no line to say it on: Python itself finds no `train.run`."""
    shutil.copytree(elsewhere / "model", tmp_path / "model")
    done = ran(python, COMMANDS[name], tmp_path)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    (line,) = lines
    assert str(tmp_path / "model" / "__init__.py") in line
    assert "PYTHONSAFEPATH=1" in line
    assert done.returncode == (2 if name == "python -m preprocess" else 1)


def test_a_folder_that_is_no_package_harms_nothing(python: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights.safetensors").touch()
    assert ran(python, COMMANDS["python -m preprocess"], tmp_path).returncode == 0
