"""The printed job script on a real Slurm of two nodes on this machine, with a task that is requeued.

FRAMEBANK_SLURM=/tmp/slurm pytest tests/preprocess/test_slurm.py -m slow

FRAMEBANK_SLURM: a folder that Debian's slurmctld, slurmd, slurm-client, slurm-wlm-basic-plugins,
slurm-wlm-plugins, libmunge2 and libhwloc15 were unpacked to (`dpkg -x`); nothing needs to be installed.
For root only: Slurm runs without munge here.
"""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from preprocess.cli.main import main
from shards.care.verify import verify

ROOT = Path(__file__).resolve().parents[2]
SLURM = Path(os.environ.get("FRAMEBANK_SLURM", "/nowhere"))
PLUGINS = "usr/lib/x86_64-linux-gnu/slurm-wlm"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (SLURM / PLUGINS).is_dir(), reason="FRAMEBANK_SLURM names no Slurm"),
]
CONF = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
CryptoType=crypto/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
PluginDir={plugins}
SlurmctldPort={ports[0]}
SlurmctldPidFile={folder}/slurmctld.pid
StateSaveLocation={folder}/state
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool-%n
MailProg=/bin/true
ReturnToService=2
SchedulerParameters=sched_interval=1,requeue_delay=1
NodeName=n1 NodeAddr=127.0.0.1 NodeHostname=localhost Port={ports[1]} CPUs=8
NodeName=n2 NodeAddr=127.0.0.1 NodeHostname=localhost Port={ports[2]} CPUs=8
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Cluster:
    """A controller and two nodes, and the environment in which Slurm's commands find them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        libraries = os.pathsep.join([str((SLURM / PLUGINS).parent), str(SLURM / PLUGINS)])
        self.env = os.environ | {
            "LD_LIBRARY_PATH": libraries,
            "PATH": f"{SLURM / 'usr/bin'}{os.pathsep}{os.environ['PATH']}",
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PYTHONPATH": str(ROOT),
        }
        conf = CONF.format(plugins=SLURM / PLUGINS, folder=folder, ports=free_ports(3))
        (folder / "slurm.conf").write_text(conf)
        (folder / "state").mkdir()
        self.daemons = [self._start("slurmctld-wlm", "-D", "-i")]
        for node in ("n1", "n2"):
            (folder / f"spool-{node}").mkdir()
            step = SLURM / "usr/sbin/slurmstepd-wlm"
            self.daemons.append(self._start("slurmd-wlm", "-D", "-N", node, "-d", step))

    def _start(self, name: str, *words: object) -> "subprocess.Popen[bytes]":
        command = [str(SLURM / "usr/sbin" / name), *map(str, words)]
        with open(self.folder / f"{name}.log", "ab") as log:
            return subprocess.Popen(command, env=self.env, stdout=log, stderr=log)

    def says(self, *words: str) -> str:
        return subprocess.run(
            words, env=self.env, cwd=self.folder, capture_output=True, text=True
        ).stdout

    def close(self) -> None:
        self.says("scancel", "--user=root")
        for daemon in self.daemons:
            daemon.send_signal(signal.SIGTERM)
        for daemon in self.daemons:
            daemon.wait(30)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def until(true: Callable[[], object], seconds: float = 900) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.2)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    folder = tmp_path / "cluster"
    folder.mkdir()
    cluster = Cluster(folder)
    try:
        until(lambda: cluster.says("sinfo", "-h", "-N", "-o", "%t").count("idle") == 2, 300)
        yield cluster
    finally:
        cluster.close()


def command(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words], prog_name="preprocess")


def files(bank: Path) -> dict[str, bytes]:
    return {
        path.relative_to(bank).as_posix(): path.read_bytes()
        for path in bank.rglob("*")
        if path.is_file()
    }


def test_an_array_with_a_task_that_is_requeued_makes_the_bytes_of_one_process(
    toy: Path, cluster: Cluster, tmp_path: Path
) -> None:
    shape = ["--stride", "1,2", "--frames", 40, "--shard-size", 1, "--device", "cpu"]
    shape += ["--tower-threads", 1]
    flags = [toy / "videos", *shape, "--tower", toy / "tower", "--out"]
    assert command("encode", *flags, tmp_path / "whole").exit_code == 0
    assert command("plan", *flags, tmp_path / "bank", "--no-estimate").exit_code == 0
    script = tmp_path / "job.sh"
    script.write_text(command("work", tmp_path / "bank", "--template", "slurm").stdout)
    cluster.says("bash", str(script))
    queue = "squeue", "-h", "-r", "-o", "%i %t"
    assert cluster.says(*queue).count("\n") == 5, "four tasks, and the end after them"
    until(lambda: list((tmp_path / "bank").glob("shards/*.part")))
    running = [line.split()[0] for line in cluster.says(*queue).splitlines() if " R" in line]
    cluster.says("scontrol", "requeue", running[0])
    until(lambda: not cluster.says(*queue))
    logs = "".join(path.read_text() for path in cluster.folder.glob("*.log"))
    assert (tmp_path / "bank" / "bank.json").exists(), logs
    assert f"{tmp_path / 'bank'}: 9 clips, " in logs
    assert files(tmp_path / "bank") == files(tmp_path / "whole")
    assert verify(tmp_path / "bank", deep=True) == []
