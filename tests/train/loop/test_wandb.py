"""A run that is stopped and goes on is one run at W&B.

pytest tests/train/loop/test_wandb.py

`Service` stands for wandb.init where wandb is not installed: the settings that it is given are what
W&B documents for resuming. With wandb installed, the real one runs offline.
"""

import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from train.loop.log import wandb_run


class Service(types.ModuleType):
    """What a run uses of wandb, which keeps runs by id as the server does."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.inits: list[dict[str, Any]] = []
        self.runs: dict[str, list[int]] = {}

    def init(self, **given: Any) -> Any:
        self.inits.append(given)
        assert given["resume"] == "allow"
        steps = self.runs.setdefault(given["id"], [])

        class Run:
            starting_step = steps[-1] + 1 if steps else 0

            def log(self, numbers: dict[str, float], step: int) -> None:
                assert numbers
                assert step >= max(steps, default=0), "W&B drops what is older, with a warning"
                steps.append(step)

            def finish(self) -> None:
                pass

        return Run()


def test_a_resumed_run_stays_one_run(
    train_here: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = Service()
    service.__spec__ = types.SimpleNamespace(origin="wandb")  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "wandb", service)
    monkeypatch.setenv("WANDB_MODE", "offline")
    out = tmp_path / "out"
    shared = {"wandb": True, "save_steps": 2}
    train_here(out, **shared, max_steps=3)
    (out / "checkpoint-3" / "projector.safetensors").write_bytes(b"")  # step 3 is taken again
    train_here(out, **shared, max_steps=5)
    (id_,) = {given["id"] for given in service.inits}
    assert re.fullmatch("[0-9a-f]{8}", id_)
    assert (out / "wandb-id.txt").read_text() == f"{id_}\n"
    assert service.runs == {id_: [1, 2, 3, 4, 5]}
    assert service.inits[1]["config"]["max_steps"] == 5
    train_here(out, **shared, max_steps=3, resume="none")
    assert len(service.runs) == 2, "a run that starts anew is another"


def test_wandbs_own_variables_decide_where_a_run_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = Service()
    monkeypatch.setitem(sys.modules, "wandb", service)
    named = {"project": "WANDB_PROJECT", "name": "WANDB_NAME", "dir": "WANDB_DIR"}
    for variable in (*named.values(), "WANDB_RUN_ID"):
        monkeypatch.delenv(variable, raising=False)
    wandb_run(tmp_path, 0, {})
    (given,) = service.inits
    own = {"project": "framebank", "name": tmp_path.name, "dir": str(tmp_path)}
    assert given.items() >= own.items()
    for variable in named.values():
        monkeypatch.setenv(variable, f"my {variable}")
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    # the run that a folder has begun stays the same one
    for first_step, id_ in ((3, given["id"]), (0, "mine"), (3, "mine")):
        wandb_run(tmp_path, first_step, {})
        assert service.inits[-1]["id"] == id_
        for what, variable in named.items():
            assert service.inits[-1][what] == f"my {variable}"


def test_the_real_wandb_takes_it_offline(
    train_here: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    out = tmp_path / "out"
    train_here(out, wandb=True, save_steps=2, max_steps=2)
    train_here(out, wandb=True, save_steps=2, max_steps=4)
    id_ = (out / "wandb-id.txt").read_text().strip()
    names = [path.name for path in (out / "wandb").glob("offline-run-*")]
    assert len(names) == 2
    assert all(name.endswith(f"-{id_}") for name in names)
