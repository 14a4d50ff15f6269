"""Bars are for people who wait: on a terminal, of one process, and not for short work.

pytest tests/shards/test_progress.py
"""

import os
import pty
import subprocess
import sys
import termios

import pytest

WORK = """
import sys, time, shards.progress
shards.progress.DELAY = float(sys.argv[1])
for _ in shards.progress.progress("reading a.jsonl", "rows", 3, range(3)):
    time.sleep(0.2)
with shards.progress.progress("counting", "rows", 8) as bar:
    for _ in range(2):
        time.sleep(0.2)
        bar.update(4)
"""


@pytest.mark.parametrize(
    ("delay", "rank", "terminal", "seen"),
    [(0, "", True, True), (0, "0", True, True), (0, "1", True, False), (60, "", True, False),
     (0, "", False, False)],
)  # fmt: skip
def test_a_bar_is_seen_by_those_who_wait_for_it(
    delay: float, rank: str, terminal: bool, seen: bool
) -> None:
    ours, theirs = pty.openpty() if terminal else os.pipe()
    if terminal:
        termios.tcsetwinsize(theirs, (24, 80))
    environ = {name: value for name, value in os.environ.items() if name != "RANK"}
    environ |= {"RANK": rank} if rank else {}
    subprocess.run([sys.executable, "-c", WORK, str(delay)], stderr=theirs, env=environ, check=True)
    os.write(theirs, b"end")
    shown = b""
    while not shown.endswith(b"end"):
        shown += os.read(ours, 4096)
    assert (b"reading a.jsonl" in shown, b"2/3" in shown) == (seen, seen)
    assert (b"counting" in shown, b"8/8" in shown) == (seen, seen)
