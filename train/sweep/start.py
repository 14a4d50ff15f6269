"""Commands of a sweep, started as the sweep itself was: by the same Python, under the same launcher.

Each is a process of its own: a run that crashes takes nothing else with it, and is bit for bit the
run that its command line gives.
"""

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from shards.errors import UserError
from train.settings.ancestors import Process, ancestors

HERE = Path(__file__).parents[1]
WATCH_SECONDS = 1.0
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True)
class Launcher:
    """How commands are started."""

    words: tuple[str, ...]
    """Before the script."""
    environ: Mapping[str, str]

    @classmethod
    def here(cls, words: Sequence[str] | None) -> "Launcher":
        """Return the way that this process was started in; UserError where it cannot be gone again.

        words: the flags of `accelerate launch`, None where it started nothing.
        """
        # -- the environment and the words of the launcher, without what it has added for this process
        environ = dict(os.environ)
        launch: tuple[str, ...] = ()
        if words is not None:
            above = next(p for p in ancestors() if p.launches() is not None)
            # the launcher has given this process a rank and a port, which its runs must not inherit
            environ = environ_of(above) or environ
            # the sweep may have been started as a module; runs are started as files
            plain = [word for word in words if word not in ("-m", "--module")]
            # by module: the command `accelerate` may be another environment's
            launch = ("-m", "accelerate.commands.launch", *plain)
        # torchrun has started the sweep itself several times, and its flags are not known here
        elif int(environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError(
                "a sweep starts each run by itself, and this launcher has started several of it",
                where="--sweep",
                fix="use accelerate launch, or python train/run.py --sweep",
            )
        if int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1:
            raise UserError(
                "a sweep runs on one machine, and this is one of several",
                where="--sweep",
                fix="give each machine a sweep of its own",
            )
        # runs find this very code, from whatever folder the sweep was started
        root = str(HERE.parent)
        paths = [root, *filter(None, [environ.get("PYTHONPATH")])]
        return cls((sys.executable, *launch), environ | {"PYTHONPATH": os.pathsep.join(paths)})

    def command(self, script: str, words: Sequence[str]) -> list[str]:
        return [*self.words, str(HERE / script), *words]


def environ_of(process: Process) -> dict[str, str]:
    """Return the environment that a process was started with; nothing where it cannot be read."""
    try:
        held = Path(f"/proc/{process.pid}/environ").read_bytes()
    except OSError:
        return {}
    pairs = (os.fsdecode(item).partition("=") for item in held.split(b"\0") if b"=" in item)
    return {name: value for name, _, value in pairs}


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    last_error: str
    """The last line that it gave as its error, or wrote at all."""
    seconds: float
    cpu_seconds: float


class Children:
    """Starts one command after the other, and ends the running one when this process is to end.

    A command is the leader of a session of its own, so that a signal reaches all its processes once: it
    comes from here.
    """

    def __init__(self, launcher: Launcher, holding: Sequence[Process] = ()) -> None:
        """holding: the processes whose end ends this one, too."""
        self.launcher, self._holding = launcher, holding
        self.stopped: signal.Signals | None = None
        self._running: subprocess.Popen[bytes] | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Children":
        for number in STOPS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # under nohup
            self._before[number] = signal.signal(number, self._stop)
        # a daemon: it never keeps the sweep from ending
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def run(self, script: str, words: Sequence[str]) -> Ended:
        """Run a command to its end; what it prints is printed."""
        began, used = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        command = self.launcher.command(script, words)
        # stderr is piped to keep its last line for the table of failures; stdout
        # goes where the sweep's goes
        self._running = subprocess.Popen(
            command, stderr=subprocess.PIPE, env=self.launcher.environ, start_new_session=True
        )
        if self.stopped:  # between the last look and the start
            self._end()
        # until all processes of the run have closed it: reading to the end keeps
        # any of them from blocking
        last = forward(self._running)
        code = self._running.wait()
        self._running = None
        # of children that were waited for, their own children included: launcher, ranks and loaders
        now = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
        return Ended(code, last, time.monotonic() - began, cpu)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopped = signal.Signals(number)
        self._end()

    def _watch(self) -> None:
        while all(process.is_alive() for process in self._holding):
            time.sleep(WATCH_SECONDS)
        self.stopped = signal.SIGTERM
        self._end()

    def _end(self) -> None:
        # the group: the launcher alone would leave its processes behind
        if self._running is not None and self._running.poll() is None:
            os.killpg(self._running.pid, signal.SIGTERM)


def forward(process: "subprocess.Popen[bytes]") -> str:
    """Hand on what a process writes as errors until all of its processes have closed them.

    Returns its last line that says what is wrong, or else its last line.
    """
    assert process.stderr is not None
    error = last = ""
    for raw in process.stderr:
        # at once and as written: what is not UTF-8 passes, too
        sys.stderr.buffer.write(raw)
        sys.stderr.flush()
        line = raw.decode(errors="replace").strip()
        if line.startswith("error: "):
            error = line.removeprefix("error: ")
        last = line or last
    return error or last
