"""Tensors in parts: each process writes its own, and any number of processes reads what it needs.

Files are those of `torch.distributed.checkpoint` in its safetensors form, `shard-00002-model-00001-of-
00003.safetensors` for the second process: the header says where in its tensor a part is. Unlike that
library's own form it holds no pickle, so that reading a copied folder runs no code.
"""

import inspect
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shards.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

PARTS = "shard-*.safetensors"
"""The files of all processes in a folder."""
FILE_BYTES = 2**30
"""Size of a process' file: writing holds so much in memory twice, not all of the process' parts."""
COPY = "copy or download all of the folder again"


def is_cut(folder: Path) -> bool:
    """Return whether a folder holds tensors in parts."""
    return next(folder.glob(PARTS), None) is not None


def files_of(folder: Path, rank: int) -> list[Path]:
    """Return the files that a process has written, sorted."""
    return sorted(folder.glob(f"shard-{rank + 1:05d}-*.safetensors"))


def refuse_old_torch() -> None:
    """Raise UserError where this torch does not write parts: before a run, not at its first save."""
    import torch
    from torch.distributed import checkpoint

    writer = getattr(checkpoint, "HuggingFaceStorageWriter", None)
    if writer is None or "save_distributed" not in inspect.signature(writer).parameters:
        raise UserError(
            f"torch {torch.__version__} does not write sharded checkpoints",
            where="FSDP",
            expected="torch 2.11 or newer",
            fix="pip install -U torch, or launch without FSDP",
        )


def write_parts(folder: Path, tensors: Mapping[str, "Tensor"]) -> None:
    """Write each process' own parts of tensors, synced to disk; every process calls this.

    A tensor that is not cut is written by one of them. Raises OSError, on every process, where the disk
    failed one of them.
    """
    import torch.distributed as dist
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.api import CheckpointException

    processes = dist.get_world_size() if dist.is_initialized() else 1
    writer = checkpoint.HuggingFaceStorageWriter(
        str(folder),
        fqn_to_index_mapping=_file_numbers(tensors, processes),
        save_distributed=True,
    )
    try:
        checkpoint.save({k: _with_a_row(v) for k, v in tensors.items()}, storage_writer=writer)
    except CheckpointException as error:  # the same on every process
        rank, (cause, _) = min(error.failures.items())
        if not isinstance(cause, OSError):
            raise
        raise OSError(f"process {rank}: {cause}") from error


def _file_numbers(tensors: Mapping[str, "Tensor"], processes: int) -> dict[str, int]:
    """Return the number from 1 of each tensor's file, the same on every process."""
    numbers, number, held = {}, 1, 0
    for name, value in tensors.items():
        # a process writes one part of each tensor, so that its files grow by that alone
        own = value.numel() * value.element_size() // processes
        if held and held + own > FILE_BYTES:
            number, held = number + 1, 0
        numbers[name], held = number, held + own
    return numbers


def _with_a_row(value: "Tensor") -> "Tensor":
    """Return a view without scalars, of which safetensors reads no slice."""
    return value if value.ndim else value.view(1)


def shapes_in(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor, `(1,)` for a scalar; UserError where parts are missing."""
    return {name: tuple(facts.size) for name, facts in _facts(folder).items()}


def read_parts(folder: Path) -> dict[str, "Tensor"]:
    """Return all tensors, put together on the CPU; UserError where parts are missing or unreadable."""
    import torch

    found = {
        name: torch.empty(facts.size, dtype=facts.properties.dtype)
        for name, facts in _facts(folder).items()
    }
    read_into(folder, found)
    return found


def read_into(folder: Path, tensors: Mapping[str, "Tensor"]) -> None:
    """Copy saved values into tensors of the same shapes; of one that is cut, a process reads its part.

    Each process may call it alone. Raises UserError where files are missing or unreadable.
    """
    from torch.distributed import checkpoint

    # first: where a part is missing, nothing of what is there is copied
    _facts(folder)
    wanted = {name: _with_a_row(value.detach()) for name, value in tensors.items()}
    with _readable(folder), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it warns that this process reads alone
        reader = checkpoint.HuggingFaceStorageReader(str(folder))
        checkpoint.load(wanted, storage_reader=reader, no_dist=True)


def _facts(folder: Path) -> dict[str, Any]:
    """Return what the headers say of each tensor; UserError where parts do not make up a whole.

    A missing part would leave a hole in its tensor, in which nothing is read.
    """
    from torch.distributed import checkpoint

    with _readable(folder):
        reader = checkpoint.HuggingFaceStorageReader(str(folder))
        found: dict[str, Any] = reader.read_metadata().state_dict_metadata
    holes = [
        name
        for name, facts in found.items()
        if sum(math.prod(chunk.sizes) for chunk in facts.chunks) != math.prod(facts.size)
    ]
    if holes:
        raise UserError(f"parts of {holes[0]} are missing", where=folder, fix=COPY)
    return found


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """Turn an unreadable file into a UserError."""
    from safetensors import SafetensorError
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except (OSError, SafetensorError) as error:
        cause: BaseException = error
    except CheckpointException as error:
        cause = min(error.failures.items())[1][0]
        if not isinstance(cause, OSError | SafetensorError):
            raise
    else:
        return
    raise UserError(f"its weights do not read ({cause})", where=folder, fix=COPY) from None
