"""Files of the cache, `$XDG_CACHE_HOME/framebank*`: whole and as they were written, or not there."""

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from hashlib import blake2b
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

SEAL = 16
"""Bytes of the digest at the end of a file."""
ROOT = Path(__file__).resolve().parents[3]
"""The folder of the packages."""


def cache_root() -> Path:
    """Return the folder that the folders of caches are in."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def read_sealed(file: Path) -> bytes | None:
    """Return what was written, or None where it is missing or damaged."""
    try:
        data = file.read_bytes()
    except OSError:
        return None
    body, seal = data[:-SEAL], data[-SEAL:]
    return body if blake2b(body, digest_size=SEAL).digest() == seal else None


def write_sealed(file: Path, body: bytes, what: str) -> None:
    """Write a file so that it exists whole or not at all; print a line where it cannot be written.

    what: what is kept in it, for the line.
    """
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(body + blake2b(body, digest_size=SEAL).digest())
        os.replace(temporary, file)
    except OSError as error:
        # named by the process, so that each attempt on a full disk would leave one more
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        print(f"{what} are not cached: {file}: {error.strerror}", file=sys.stderr)  # noqa: T201


@lru_cache
def code_digest(*folders: str) -> str:
    """Return a digest of our own code in some folders: what is kept must be what it would find now."""
    digest = blake2b(digest_size=16)
    for file in sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py")):
        data = file.read_bytes()
        digest.update(f"{file.relative_to(ROOT).as_posix()} {len(data)} ".encode() + data)
    return digest.hexdigest()


def versions(packages: Sequence[str]) -> list[str]:
    """Return the versions of Python and of packages, empty for those that are not installed."""
    found = [sys.version]
    for package in packages:
        try:
            found.append(version(package))
        except PackageNotFoundError:
            found.append("")
    return found
