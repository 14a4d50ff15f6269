"""Ctrl-C and SIGTERM: real processes clean up and end in seconds, whatever they do.

pytest tests/shards/test_stopping.py
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BEGIN = """
import signal, sys, threading, time
from shards.stopping import Stopped, end_by, stopped_by

class Swallows:
    def __del__(self):
        print("begun", flush=True)
        time.sleep(60)

def command():
"""
END = """
try:
    with stopped_by(signal.SIGINT, signal.SIGTERM):
        command()
except Stopped as stopped:
    print("stopped", flush=True)
    end_by(stopped.number)
"""
DOING = {
    "waits": """
    print("begun", flush=True)
    time.sleep(60)
""",
    "is in code that swallows exceptions": """
    for _ in range(3):
        try:
            print("begun", flush=True)
            time.sleep(60)
        except:
            pass
    time.sleep(60)
""",
    "is in a __del__, in which exceptions are lost": """
    Swallows()
    time.sleep(60)
""",
    "imports what does not bear an exception": """
    import fragile
    time.sleep(60)
""",
    "cleans up for longer than it is looked at": """
    try:
        print("begun", flush=True)
        time.sleep(60)
    finally:
        time.sleep(0.7)
        print("cleaned", flush=True)
""",
    "cleans up in a generator that is closed": """
    def steps():
        try:
            yield
        finally:
            time.sleep(0.7)
            print("cleaned", flush=True)
    one = steps()
    next(one)
    try:
        print("begun", flush=True)
        time.sleep(60)
    finally:
        one.close()
""",
    "has a thread that goes on": """
    threading.Thread(target=time.sleep, args=(60,)).start()
    print("begun", flush=True)
    time.sleep(60)
""",
    "joins a thread that goes on": """
    thread = threading.Thread(target=time.sleep, args=(60,))
    thread.start()
    print("begun", flush=True)
    thread.join()
""",
}
FRAGILE = """
import os, time
try:
    print("begun", flush=True)
    time.sleep(1)
except BaseException:
    os.abort()
"""


def start(tmp_path: Path, text: str, *before: str) -> "subprocess.Popen[str]":
    (tmp_path / "fragile.py").write_text(FRAGILE)
    (tmp_path / "script.py").write_text(text)
    return subprocess.Popen(
        [*before, sys.executable, "script.py"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )


def stopped(tmp_path: Path, text: str, number: signal.Signals) -> tuple[str, str]:
    """Stop a command once it has begun; return what it printed after that, and its errors."""
    process = start(tmp_path, text)
    try:
        assert process.stdout
        assert process.stdout.readline() == "begun\n"
        # a signal between Python's last look for one and the system's sleep is seen only after that
        time.sleep(0.2)
        process.send_signal(number)
        out, said = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 128 + number, said
    return out, said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("doing", DOING)
def test_a_command_is_stopped_in_seconds_whatever_it_does(
    tmp_path: Path, doing: str, number: signal.Signals
) -> None:
    out, said = stopped(tmp_path, BEGIN + DOING[doing] + END, number)
    assert [line for line in out.splitlines() if line != "begun"] == [
        *["cleaned"] * ("cleaned" in DOING[doing]),
        "stopped",
    ]
    assert "Traceback" not in said.replace("Exception ignored", "").partition("__del__")[0], said


JOINS = """
    def slow():
        time.sleep(0.6)
        print("ended", flush=True)
    thread = threading.Thread(target=slow)
    thread.start()
    print("begun", flush=True)
    thread.join()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_thread_whose_join_was_left_by_a_signal_ends_first(
    tmp_path: Path, number: signal.Signals
) -> None:
    # before Python 3.13 it counts as ended; within torch it would abort the process that ends
    out, _ = stopped(tmp_path, BEGIN + JOINS + END, number)
    assert out.split() == ["stopped", "ended"]


ENDLESS = {
    "an import": "    import endless",
    "code that swallows exceptions": """
    print("begun", flush=True)
    while True:
        try:
            time.sleep(60)
        except:
            pass
""",
}


@pytest.mark.slow
@pytest.mark.parametrize("doing", ENDLESS)
def test_what_never_ends_is_waited_for_a_few_seconds(tmp_path: Path, doing: str) -> None:
    (tmp_path / "endless.py").write_text(FRAGILE.replace("sleep(1)", "sleep(60)"))
    process = start(tmp_path, BEGIN + ENDLESS[doing] + END)
    try:
        assert process.stdout
        assert process.stdout.readline() == "begun\n"
        # a signal between Python's last look for one and the system's sleep is seen only after that
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 143
    finally:
        process.kill()
