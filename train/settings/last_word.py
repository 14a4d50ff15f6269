"""Prints lines after a launcher has ended, below the traceback that it prints at its end.

    python last_word.py PID LINE ...

`accelerate launch` and `torchrun` print a traceback of their own for each command whose exit code is not
0, which cannot be switched off (`accelerate launch --quiet` does so for one process). The message for the
user would be far above the end. So a separate process waits for the launcher's end. It is run as a file,
without site-packages, to start in a few milliseconds.
"""

import os
import socket
import sys
import time
from collections.abc import Sequence

LONGEST_SECONDS = 60.0
"""A launcher gives its other processes 30 s to end before it kills them."""


def is_running(pid: int) -> bool:
    """Return whether a process still runs its own code.

    On Linux a process has a command line as long as it has memory, which is freed first: so the lines
    are printed before the parent of the launcher learns of its end.
    """
    if sys.platform == "linux":
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                return bool(file.read(1))
        except OSError:
            return False
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


def main(pid: int, lines: Sequence[str]) -> None:
    """Wait for a process to end, then print the lines to stderr, unless another one already waits."""
    claim = socket.socket(socket.AF_UNIX)
    if sys.platform == "linux":
        try:
            # a name without a file, free again when this process ends: on a slow machine several ranks
            # get here with the same problem before the launcher ends them
            claim.bind(f"\0framebank-last-word-{pid}")
        except OSError:
            return
    deadline = time.monotonic() + LONGEST_SECONDS
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.002)
    # in one write, so that no other process's line comes between
    sys.stderr.write("".join(f"{line}\n" for line in lines))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
