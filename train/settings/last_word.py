"""Print lines once a launcher has ended, below the traceback that it ends with.

    python last_word.py PID LINE ...

`accelerate launch` and `torchrun` print a traceback of their own for every command that exits with
something else than 0, and neither can be asked not to (`accelerate launch --quiet` can, for one
process). What a person has to read is then far above the end. So a process of its own waits for the
launcher's end. Run as a file, without the site's packages: it starts in a few milliseconds.
"""

import os
import sys
import time
from collections.abc import Sequence

LONGEST_SECONDS = 60.0
"""A launcher gives its other processes 30 s to end before it kills them."""


def is_running(pid: int) -> bool:
    """Tell whether a process still runs code of its own.

    Linux gives a command line as long as it has memory. That goes first, so that the lines come
    before whoever waits for the process hears of its end.
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
    deadline = time.monotonic() + LONGEST_SECONDS
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.002)
    sys.stderr.write("".join(f"{line}\n" for line in lines))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
