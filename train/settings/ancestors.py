"""The processes above this one: the launcher that started it, and the shells around it.

Read from /proc, so on Linux; elsewhere there are none.
"""

import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

LAUNCHERS = (
    *("accelerate-launch", "accelerate.commands.launch"),
    *("torchrun", "torch.distributed.run", "torch.distributed.launch"),
)
ACCELERATE = ("accelerate", "accelerate.commands.accelerate_cli")
"""Programs that launch by the word `launch`."""
TAKES_A_WORD = ("-X", "-W", "--check-hash-based-pycs")
"""Options of Python that the next word belongs to."""
SHELLS = ("sh", "bash", "dash", "zsh", "ksh", "ash")


@dataclass(frozen=True)
class Process:
    """The facts of a process at the time of reading."""

    pid: int
    parent: int
    group: int
    """Its process group: the shell's job to which it belongs."""
    started: int
    """In clock ticks since the machine's start: distinguishes processes that had the same pid in turn."""
    words: tuple[str, ...]
    """Its command line."""

    @classmethod
    def read(cls, pid: int) -> "Process | None":
        """Return the process of that number; None where it has ended, or cannot be read."""
        try:
            # after the name, which may hold blanks and parentheses itself
            fields = Path(f"/proc/{pid}/stat").read_bytes().rsplit(b")", 1)[1].split()
            line = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            return None
        if fields[0] in (b"Z", b"X"):  # ended, and not yet waited for
            return None
        words = tuple(os.fsdecode(line).split("\0")[:-1])
        return cls(pid, int(fields[1]), int(fields[2]), int(fields[19]), words)

    def is_alive(self) -> bool:
        """Return whether this very process is still running."""
        now = Process.read(self.pid)
        # a pid is given to another process in time: only number and start together are the same one
        return now is not None and now.started == self.started

    def is_shell(self) -> bool:
        """Return whether it is a shell."""
        return bool(self.words) and _name(self.words[0]).lstrip("-") in SHELLS

    def launches(self) -> tuple[str, ...] | None:
        """Return the words after `accelerate launch`, `torchrun` or such; None if it is no launcher."""
        program, *following = self._program() or ("",)
        if program in ACCELERATE:
            return tuple(following[1:]) if following[:1] == ["launch"] else None
        return tuple(following) if program in LAUNCHERS else None

    def is_sweep(self) -> bool:
        """Return whether it starts runs, one after the other: `train/run.py --sweep`."""
        program, *following = self._program() or ("",)
        named = any(word.partition("=")[0] == "--sweep" for word in following)
        return named and program in ("run.py", "train.run")

    def is_accelerate(self) -> bool:
        """Return whether its program is Accelerate's."""
        return (self._program() or ("",))[0].startswith("accelerate")

    def _program(self) -> tuple[str, ...]:
        """Return the program's name and its words, without the Python that runs it."""
        words = self.words
        if words and _name(words[0]).startswith("python"):
            start = 1
            while (
                words[start : start + 1] and words[start].startswith("-") and words[start] != "-m"
            ):
                start += 1 + (words[start] in TAKES_A_WORD)
            # -m NAME: the module is the program
            words = words[start + (words[start : start + 1] == ("-m",)) :]
        return (_name(words[0]), *words[1:]) if words else ()

    def __str__(self) -> str:
        program, *following = self._program() or ("?",)
        return f"{' '.join([program, *following[:1]])} (process {self.pid})"


def ancestors() -> Iterator[Process]:
    """Yield the processes above this one, the nearest first."""
    pid = os.getppid()
    while pid > 1 and (process := Process.read(pid)) is not None:
        yield process
        pid = process.parent


def holders() -> list[Process]:
    """Return the processes above this one whose end must end this one: its launcher and the shells
    around it, or its sweep.

    None of them forwards signals: `accelerate launch` of one process ends on SIGTERM and leaves its
    trainer running, and so does a shell. A shell counts only if it waits for this job: not an
    interactive one (another process group), nor one that put the run into the background (SIGINT is
    then ignored) or under nohup (SIGHUP is).
    """
    in_background = any(
        signal.getsignal(number) == signal.SIG_IGN for number in (signal.SIGINT, signal.SIGHUP)
    )
    found: list[Process] = []
    group = os.getpgrp()
    for process in ancestors():
        if process.launches() is not None:
            group = process.group  # torchrun's workers are sessions of their own
        # the sweep alone: what is above it ends the sweep, which ends its runs
        elif process.is_sweep():
            return [*found, process]
        elif not process.is_shell() or in_background or process.group != group:
            break
        found.append(process)
    return found


def accelerate_words(argv: Sequence[str]) -> tuple[str, ...] | None:
    """Return the flags that the nearest `accelerate launch` was given; argv: this script's own words.

    None where there is none, or where its script started this one by other words.
    """
    for process in ancestors():
        words = process.launches()
        if words is not None and process.is_accelerate():
            own = tuple(argv)
            # another script stands between: the launcher's words end with that one's, not with ours
            if own and words[-len(own) :] != own:
                return None
            return words[: len(words) - len(own) - 1]  # before the script's name
    return None


def _name(word: str) -> str:
    return word.rpartition("/")[2]
