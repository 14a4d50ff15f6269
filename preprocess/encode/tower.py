"""The tower of a run: its dtype and device, and whether they are those of the bank.

    options = as_banked(options, known)       # an existing bank keeps its dtype
    loading = Loading(options)                # in a thread, with import torch, while clips are probed
    tower = loading.tower()

Importing this module does not import torch.
"""

import ctypes
import gc
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from preprocess.encode.features import EncodeOptions, load_tower
from shards.errors import UserError
from shards.format.plan import Plan
from shards.hub import cached_file
from shards.signed import digest

if TYPE_CHECKING:
    from model.tower.precision import Choice
    from model.tower.tower import Tower

TOWER_FILES = (".json", ".safetensors", ".bin")
"""Suffixes of the files that a tower is loaded from."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of mallopt(3)."""
KEPT_BYTES = 1 << 30
"""Freed memory that a heap keeps, at most."""
LARGEST_KEPT = 32 << 20
"""Bytes of an array above which its memory is always handed back; the most that glibc takes."""
MEASURED = "auto"
"""The `tower_dtype` that is chosen by measuring."""


def start_torch(device: str) -> str:
    """Import torch, without progress bars and with passive idle threads; return the device of `auto`.

    By default OpenMP threads spin while idle and take the cores that decoders need: on two cores with one
    more busy process encoding took eight times as long.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _keep_freed_memory()
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def _keep_freed_memory() -> None:
    """Have glibc keep what a batch's arrays held for the next batch, instead of handing it back.

    DINOv2-S on a CPU took 2 million page faults for 850 frames, and 5 seconds of the kernel's time.
    """
    if adjust := getattr(ctypes.CDLL(None), "mallopt", None):  # other C libraries have none
        adjust(M_TRIM_THRESHOLD, KEPT_BYTES)
        adjust(M_MMAP_THRESHOLD, LARGEST_KEPT)


class Loading:
    """A tower that is being loaded in another thread."""

    def __init__(self, options: EncodeOptions, *, here: bool = True) -> None:
        """here: whether it will encode here; a plan may use the CPU in place of another machine's GPU."""
        self._options, self._here = options, here
        self._tower: Tower | None = None
        self._error: BaseException | None = None
        # not a daemon: an interpreter that exits in the middle of an import may crash
        self._thread = threading.Thread(target=self._load)
        self._thread.start()

    def _load(self) -> None:
        try:
            with _collected_later():
                device = start_torch(self._options.device)
                self._options = on_device(self._options, device)
                loaded = self._options
                if not self._here and is_elsewhere(device):
                    loaded = replace(loaded, device="cpu")
                self._tower = load_tower(loaded)
        # kept for the thread that asks for the tower: raised here it would only be printed
        except BaseException as error:
            self._error = error

    def tower(self) -> "tuple[Tower, EncodeOptions]":
        """Return the tower, and the options with the device that it is on; raises what loading raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._tower is not None
        return self._tower, self._options


@contextmanager
def _collected_later() -> Iterator[None]:
    """Have no garbage looked for meanwhile.

    Torch and transformers are 2,700 modules and a million objects that stay; to look through them again
    and again while they come takes 12 to 20 % of the seconds of their import.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def devices_of(options: EncodeOptions) -> tuple[str, ...]:
    """Return the devices of the processes that encode, of options with the device of a loaded tower."""
    if options.devices not in ((), ("auto",)):
        return options.devices
    if options.device != "cuda":
        return (options.device,)
    import torch

    return tuple(f"cuda:{number}" for number in range(torch.cuda.device_count()))


def is_elsewhere(device: str) -> bool:
    """Return whether CUDA is requested on a machine without it."""
    import torch

    return device.startswith("cuda") and not torch.cuda.is_available()


def as_banked(options: EncodeOptions, known: Plan | None) -> EncodeOptions:
    """Return the options with an existing bank's `tower_dtype`, unless one is given."""
    if known is None or known.tower.device is None or options.tower_dtype != MEASURED:
        return options
    return replace(options, tower_dtype=known.features.tower_dtype)


def on_device(options: EncodeOptions, device: str) -> EncodeOptions:
    """Return the options with the device; its dtype is only measured on a CPU, elsewhere it is fixed."""
    kind = device.partition(":")[0]
    if options.tower_dtype != MEASURED or kind == "cpu":
        return replace(options, device=device)
    dtype = "bfloat16" if kind == "cuda" else "float32"
    reason = f"what auto takes on {kind}, without measuring"
    return replace(options, device=device, tower_dtype=dtype, dtype_reason=reason)


def measured(tower: "Tower", options: EncodeOptions, known: Plan | None) -> "Choice | None":
    """Return the chosen dtype if it was left open, and convert the tower to it; else None."""
    if options.tower_dtype != MEASURED:
        return None
    from model.tower.precision import Choice, fastest, retype

    # a bank that does not record a choice is from before there was one, and always used float32
    old = Choice("float32", "as it was")
    choice = old if known else fastest(tower, options.tower_threads)
    retype(tower, choice.dtype)
    return choice


def refuse_other_device(bank: Path, plan: Plan, options: EncodeOptions) -> None:
    """Raise UserError if a bank's features are computed on another kind of device than this one."""
    from model.tower.precision import arithmetic

    here = arithmetic(options.device, options.tower_dtype)
    if plan.tower.device in (None, here):
        return
    raise UserError(
        "its features are computed by another kind of device, which rounds in another way",
        got=here,
        expected=plan.tower.device,
        where=bank,
        fix="work on such a machine, or make another bank here",
    )


def tower_files(name: str) -> str | None:
    """Return a hash of the names, sizes and mtimes of a tower's files; None if they are not local."""
    folder = tower_folder(name)
    if folder is None:
        return None
    facts = sorted(_facts(folder))
    return digest(repr(facts).encode()) if facts else None


def tower_folder(name: str) -> Path | None:
    """Return the folder of a tower's files: its own, or the Hub's cache, without a request; or None."""
    if Path(name).is_dir():
        return Path(name)
    config = cached_file(name, "config.json")
    return Path(config).parent if config else None


def _facts(folder: Path) -> Iterator[tuple[str, int, int]]:
    for path in folder.iterdir():
        if path.suffix in TOWER_FILES:
            stat = path.stat()
            yield path.name, stat.st_size, stat.st_mtime_ns
