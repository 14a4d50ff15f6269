"""A real Ray cluster of three nodes, one of which is killed, makes the bytes of one process.

pytest tests/preprocess/test_ray.py -m slow     needs `pip install 'framebank[ray]'`
"""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from preprocess.cli.main import main
from shards.care.verify import verify
from shards.format.commits import committed
from shards.format.plan import planned


def command(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words], prog_name="preprocess")


@pytest.fixture
def cluster() -> Iterator[Any]:
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    small = {"num_cpus": 1, "object_store_memory": 80 << 20}
    cluster = Cluster(
        initialize_head=True, head_node_args={**small, "num_cpus": 0, "include_dashboard": False}
    )
    try:
        yield cluster, [cluster.add_node(**small) for _ in range(3)]
    finally:
        cluster.shutdown()


@pytest.mark.slow
def test_a_killed_node_costs_nothing_but_time(
    toy: Path, tmp_path: Path, cluster: tuple[Any, list[Any]]
) -> None:
    head, nodes = cluster
    flags = ["--frames", 40, "--stride", "1,2", "--device", "cpu", "--tower", toy / "tower"]
    whole, bank = tmp_path / "whole", tmp_path / "bank"
    for out, verb in ((whole, "encode"), (bank, "plan")):
        words = [verb, toy / "videos", "--out", out, *flags, "--shard-size", 1]
        assert command(*words, *(["--no-estimate"] if verb == "plan" else [])).exit_code == 0
    units = range(len(planned(bank).units))
    assert len(units) > 2

    def kill() -> None:
        while not any(committed(bank, unit) for unit in units):
            time.sleep(0.05)
        head.remove_node(nodes[0], allow_graceful=False)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    result = command("work", bank, "--on", "ray", "--address", head.address, "--procs", 3)
    assert result.exit_code == 0, result.output
    killer.join(timeout=60)
    assert not killer.is_alive()
    assert command("finish", bank).exit_code == 0
    assert verify(bank, deep=True) == []
    for unit in units:
        name = f"shards/bank-{unit:06d}.tar"
        assert (bank / name).read_bytes() == (whole / name).read_bytes()
