"""The processes around a run, with real shells: which of them take it with them when they end."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from train.settings.ancestors import Process, accelerate_words, ancestors

ROOT = Path(__file__).resolve().parents[2]
HOLDERS = """
import sys
from train.settings.ancestors import accelerate_words, holders
print([one.words[0].rpartition("/")[2] for one in holders()], accelerate_words(sys.argv[1:]))
"""
# a launcher as `accelerate launch` looks from outside: Python, a script of that name, its words
LAUNCHER = """
import subprocess, sys
script = sys.argv.index("script.py")
subprocess.run([sys.executable, *sys.argv[script:]], check=True)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "script.py").write_text(HOLDERS)
    (tmp_path / "accelerate").write_text(LAUNCHER)
    (tmp_path / "torchrun").write_text(LAUNCHER)
    (tmp_path / "run.py").write_text(LAUNCHER)
    return tmp_path


PYTHON = shlex.quote(sys.executable)
NAME = Path(sys.executable).name


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (f"{PYTHON} script.py", "[] None"),
        (f"sh -c '{PYTHON} script.py; true'", "['sh'] None"),
        (f"bash -c '{PYTHON} script.py; true'", "['bash'] None"),
        (f"""sh -c 'sh -c "{PYTHON} script.py; true"; true'""", "['sh', 'sh'] None"),
        # what is put into the background, or under nohup, is to outlive its shell
        (f"sh -c '{PYTHON} script.py & wait'", "[] None"),
        (f"nohup sh -c '{PYTHON} script.py; true'", "[] None"),
        (f"{PYTHON} accelerate launch script.py --x 1", f"['{NAME}'] ()"),
        (
            f"sh -c '{PYTHON} accelerate launch --multi_gpu --a 2 script.py --x; true'",
            f"['{NAME}', 'sh'] ('--multi_gpu', '--a', '2')",
        ),
        (f"nohup sh -c '{PYTHON} accelerate launch script.py; true'", f"['{NAME}'] ()"),
        (f"sh -c '{PYTHON} -u torchrun --a 2 script.py; true'", f"['{NAME}', 'sh'] None"),
        (f"{PYTHON} accelerate config script.py", "[] None"),
        # Python's own options, some of which take the next word
        *(
            (f"{PYTHON} {options} accelerate launch --a 2 script.py", f"['{NAME}'] ('--a', '2')")
            for options in (
                "-u",
                "-X dev",
                "-Xdev",
                "-W ignore -u",
                "--check-hash-based-pycs never",
            )
        ),
        # a sweep holds its runs, whatever stands above it
        (f"sh -c '{PYTHON} run.py --sweep s.yaml script.py; true'", f"['{NAME}'] None"),
        (f"{PYTHON} run.py --config x.yaml script.py", "[] None"),
    ],
)
def test_launchers_hold_a_run_and_shells_that_wait_for_it(
    script: Path, command: str, expected: str
) -> None:
    assert said(shlex.split(command), script) == expected


def said(command: list[str], folder: Path) -> str:
    """Return what a command prints as a job of its own, in the foreground."""

    def in_foreground() -> None:
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)

    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
        start_new_session=True,
        preexec_fn=in_foreground,
    )
    return done.stdout.rstrip("\n")


def test_a_shell_of_another_job_is_not_waited_upon(script: Path) -> None:
    """An interactive shell makes a process group of each command, and may be left."""
    command = f"import os; os.setpgid(0, 0); os.execl({sys.executable!r}, 'python', 'script.py')"
    line = f"{PYTHON} -c {shlex.quote(command)}; true"
    assert said(["sh", "-c", line], script) == "[] None"


def test_a_process_lives_until_it_has_ended_waited_for_or_not() -> None:
    child = subprocess.Popen(["sleep", "60"])
    seen = Process.read(child.pid)
    assert seen is not None
    assert seen.is_alive()
    assert seen.parent == os.getpid()
    child.send_signal(signal.SIGKILL)
    while Process.read(child.pid):  # it is left a zombie
        time.sleep(0.01)
    assert not seen.is_alive()
    child.wait()
    assert not seen.is_alive()
    other = Process(os.getpid(), 1, 1, 0, ())
    assert not other.is_alive(), "a number that was given again"


def test_the_words_of_no_launcher_are_not_known() -> None:
    assert [one.pid for one in ancestors()][:1] == [os.getppid()]
    assert accelerate_words(["--x"]) is None
