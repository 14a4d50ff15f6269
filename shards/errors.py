"""`UserError`: the one error that a user can fix; every other exception is a bug and keeps its traceback.

A command prints it, a line for each problem, and exits with 2. An `OSError` is treated alike, since it
comes from the machine. `assert` and all other exceptions are bugs: a traceback, and exit 70 of
`preprocess`.
"""

# Why a type of its own: as a ValueError, a bug in the tower would quarantine every clip, and a bug in a
# command would look like wrong usage.

import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""Errors of a disk that is written to, and takes no more."""


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's text, for use in a message; its type if it has no text."""
    # messages of other libraries run over many lines; the first is the one that says what is wrong
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class UserError(Exception):
    """What is wrong with an input, a setting, a bank or a model, and what to do about it.

    Prints as `where: what, expected ..., got ...; fix`. It can be pickled, so that workers can raise it.
    """

    def __init__(
        self,
        what: str,
        got: object = None,
        expected: str | None = None,
        where: object = None,
        fix: str | None = None,
    ) -> None:
        # all fields as arguments: pickle rebuilds an exception by calling its class with `args`
        super().__init__(what, got, expected, where, fix)
        self.what, self.got, self.expected, self.where, self.fix = what, got, expected, where, fix

    def __str__(self) -> str:
        text = self.what if self.where is None else f"{self.where}: {self.what}"
        if self.expected is not None:
            text += f", expected {self.expected}"
        if self.got is not None:
            text += f", got {self.got}"
        return text if self.fix is None else f"{text}; {self.fix}"

    @property
    def problems(self) -> list[str]:
        """Return a line for each thing that is wrong."""
        return str(self).splitlines()

    @classmethod
    def of(cls, problems: Iterable[object]) -> "UserError":
        """Return one error of several problems, a line each."""
        return cls("\n".join(map(str, problems)))


def is_of_disk(error: Exception) -> bool:
    """Return whether an exception that is no OSError tells of one: safetensors writes in Rust, and has a
    type of its own."""
    # by name: whoever asks need not have imported safetensors
    return type(error).__name__ == "SafetensorError" and "I/O error" in str(error)


@contextmanager
def naming(path: object) -> Iterator[None]:
    """Add a file's name to an OSError that has none, as those of writing: a descriptor has no name.

    An error of safetensors that `is_of_disk` becomes an OSError.
    """
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
    except Exception as error:
        if is_of_disk(error):
            raise OSError(f"{path}: {error}") from None
        raise


@contextmanager
def disk_errors(place: object) -> Iterator[None]:
    """Turn an OSError into one that says where it happened and how to continue.

    place: a folder on the disk that is written to, where the error itself does not name a file.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:  # it was raised here, with the full text
            raise
        # a copy that fails for want of room names its source first, and the full disk is the other one's
        full = error.filename2 if error.errno in DISK_FULL else None
        where = full or error.filename or place
        raise OSError(
            f"{where}: {error.strerror or error}; what is committed is intact, "
            "free space or repair the disk, and run the same command again"
        ) from None
