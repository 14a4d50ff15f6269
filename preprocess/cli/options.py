"""The options that several commands share, and their parsing. Imports nothing heavy."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

import click
from tqdm import tqdm

from shards.errors import UserError
from shards.format.features import (
    CODECS,
    DTYPES,
    FRAMES_LIKE,
    MERGED,
    MERGED_LAYER,
    POOL_MODES,
    Sampling,
    check_strides,
)
from shards.storage import refuse_url

Command = TypeVar("Command", bound=Callable[..., Any])

ALLOW_TRUNCATED = "Bank the readable part of truncated or damaged videos; their flags record it."


class Strides(click.ParamType):
    """`4,8` -> (4, 8)."""

    name = "stride,stride"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            strides = tuple(int(word) for word in value.split(","))
            check_strides(strides)
        except (ValueError, UserError):
            self.fail(
                f"strictly increasing positive integers such as 4,8 are needed, got {value!r}",
                param,
                ctx,
            )
        return strides


class Layer(click.ParamType):
    """`-2` -> -2; `merged` and `5,11,17,merged` stay text."""

    name = "integer|merged"

    def convert(self, value: Any, param: Any, ctx: Any) -> int | str:
        if isinstance(value, int) or MERGED_LAYER.fullmatch(value):
            return value
        try:
            return int(value)
        except ValueError:
            self.fail(f"an integer or {MERGED} is needed, got {value!r}", param, ctx)


class Device(click.ParamType):
    """`auto`, `cpu`, `cuda`, `cuda:1` or another of torch's devices by this form."""

    name = "text"

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        # before torch is imported; and what is on torch's device `meta` has no values
        if not re.fullmatch(r"(?!meta)[a-z]+(:[0-9]+)?", value):
            several = any(isinstance(option.type, Devices) for option in ctx.command.params)
            numbers = several and re.fullmatch(r"[0-9, ]+", value)
            more = "; --devices takes numbers of GPUs" if numbers else ""
            self.fail(f"auto, cpu, cuda or cuda:1 is needed, got {value!a}{more}", param, ctx)
        return str(value)


class Devices(click.ParamType):
    """`auto`, `cpu`, or numbers of GPUs -> devices of torch: `0,1` -> cuda:0, cuda:1."""

    name = "auto|0,1|cpu"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        if value in ("auto", "cpu"):
            return (value,)
        words = value.split(",")
        if not all(re.fullmatch(r"[0-9]+", word) for word in words) or len({*words}) < len(words):
            self.fail(
                f"auto, cpu, or numbers of GPUs such as 0,1 are needed, got {value!a}", param, ctx
            )
        return tuple(f"cuda:{int(word)}" for word in words)


def _all(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Return a decorator that adds options to a command, in this order."""

    def add(command: Command) -> Command:
        # decorators apply from the last to the first
        for option in reversed(options):
            command = option(command)
        return command

    return add


DEVICE = click.option(
    "--device", type=Device(), default="auto", show_default=True, help="auto, cpu, cuda, cuda:1 ..."
)
TOWERS = _all(
    click.option(
        "--devices",
        type=Devices(),
        help="A process with a tower on each of these: auto (all GPUs), numbers of GPUs, or cpu.  "
        "[default: one tower]",
    ),
    click.option(
        "--procs",
        type=click.IntRange(min=1),
        help="Processes with a tower each, spread over the devices.  [default: one for each]",
    ),
)
DECODERS = click.option(
    "--decoders",
    type=click.IntRange(min=1),
    help="Processes that decode, for each tower.  [default: cores / towers]",
)
HOW = _all(
    click.option(
        "--batch-frames",
        type=click.IntRange(min=1),
        help="Frames per forward pass of the tower.  [default: the bank's, else 16]",
    ),
    click.option(
        "--tower-threads",
        type=click.IntRange(min=1),
        help="CPU threads of the tower, each with its part of a batch.  [default: the bank's, else 2]",
    ),
    DEVICE,
    click.option("--allow-truncated", is_flag=True, help=ALLOW_TRUNCATED),
)


ON = _all(
    click.option(
        "--on",
        "engine",
        type=click.Choice(["ray"]),
        help="Work on a Ray cluster, with one worker for each GPU or machine, or --procs of them.",
    ),
    click.option(
        "--address", help="Address of the Ray cluster.  [default: the one that Ray finds]"
    ),
)


class LocalPath(click.Path):
    """A local path; a URL is refused, because it would be created as a folder named `https:`."""

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        refuse_url(value, "this" if param is None else param.human_readable_name)
        return super().convert(value, param, ctx)


LOCAL = LocalPath(path_type=Path)
BANK = click.argument("bank", type=LOCAL)
VIDEO_ROOTS = click.option(
    "--video-root",
    "video_roots",
    multiple=True,
    type=click.Path(),
    help="Folder that contains the videos of annotation files. Repeatable.",
)
INPUTS = click.argument("inputs", nargs=-1, required=True, type=click.Path())
WHAT = _all(
    click.option(
        "--tower",
        required=True,
        help="Hub name or folder of a vision tower: SigLIP, CLIP, DINOv2, Qwen-VL's ...",
    ),
    click.option(
        "--stride",
        "strides",
        type=Strides(),
        default="4,8",
        show_default=True,
        help="Patches per cell side; each is banked for every frame: finest slow, coarsest fast.",
    ),
    click.option("--frames", type=click.IntRange(min=1), help="Frames of each clip, uniformly."),
    click.option("--fps", help="Frames per second of each clip, such as 1 or 0.5.  [default: 1]"),
    click.option(
        "--max-frames",
        type=click.IntRange(min=1),
        help="With --fps: sample longer clips uniformly with this many.  [default: 64]",
    ),
    click.option(
        "--frames-like",
        type=click.Choice(FRAMES_LIKE),
        help="Take the frames that this video processor of transformers takes at --fps or --frames, for "
        "its trainers; Qwen2.5-VL's is qwen2_vl.",
    ),
    VIDEO_ROOTS,
    click.option(
        "--allow-outside",
        is_flag=True,
        help="Annotation files may name videos by absolute paths, or by `..`.",
    ),
    click.option(
        "--missing",
        type=click.Choice(("refuse", "drop")),
        default="refuse",
        show_default=True,
        help="What to do with annotation rows whose videos are not found: stop, or leave them out.",
    ),
    click.option(
        "--on-bad-record",
        type=click.Choice(("refuse", "drop")),
        default="refuse",
        show_default=True,
        help="What to do with annotation rows that cannot be read: stop, or leave them out.",
    ),
    click.option("--follow-links", is_flag=True, help="Search linked folders, too."),
    click.option(
        "--archive-ids",
        is_flag=True,
        help="Ids of archived clips begin with their archive's name: shard.tar/key.mp4.",
    ),
    click.option(
        "--layer",
        type=Layer(),
        default="-2",
        show_default=True,
        help="Hidden layer of the tower; merged: the input of Qwen-VL's LLM (--stride 1), "
        "5,11,17,merged: Qwen3-VL's.",
    ),
    click.option(
        "--fit",
        type=click.Choice(("crop", "pad", "stretch")),
        help="How frames are fitted to the tower.  [default: the bank's, else its processor's way]",
    ),
    click.option(
        "--pool",
        type=click.Choice(POOL_MODES),
        default="average",
        show_default=True,
        help="How patches become a cell; bilinear: as LLaVA-NeXT does.",
    ),
    click.option(
        "--dtype",
        type=click.Choice(DTYPES),
        default="float16",
        show_default=True,
        help="Data type of the stored features.",
    ),
    click.option(
        "--codec",
        type=click.Choice(CODECS),
        default="none",
        show_default=True,
        help="none: plain; blosc: lossless compression; int8: one byte per value, with a small error.",
    ),
    click.option(
        "--tower-dtype",
        type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
        default="auto",
        show_default=True,
        help="Data type of the tower's arithmetic; auto: the bank's; for a new bank bfloat16 on CUDA and "
        "on CPUs that are clearly faster with it, else float32.",
    ),
    HOW,
    click.option(
        "--folder-fps",
        "picture_fps",
        default="2",
        show_default=True,
        help="Pictures per second of folders of frames.",
    ),
)
"""Options on which features to make of which clips, and how."""
PLANNED = _all(
    INPUTS,
    click.option("--out", required=True, type=LOCAL, help="The bank's folder."),
    WHAT,
    click.option(
        "--shard-size",
        type=click.IntRange(min=1),
        default=512,
        show_default=True,
        help="Largest size of a shard, in MB.",
    ),
    click.option(
        "--prune", is_flag=True, help="Drop clips from the bank whose videos no longer exist."
    ),
)


# -- values of the options


def make_sampling(
    frames: int | None, fps: str | None, max_frames: int | None, like: str | None = None
) -> Sampling:
    """Return the sampling that the options ask for; raises UserError for a contradiction."""
    if frames is not None and (fps is not None or max_frames is not None):
        raise UserError("--frames N excludes --fps and --max-frames; leave them out")
    if frames is not None:
        return Sampling(num_frames=frames, like=like)
    sampling = Sampling(fps=fps or "1", max_frames=max_frames or 64, like=like)
    # 0.50, 0.5 and 1/2 are one sampling, and must have one fingerprint
    return replace(sampling, fps=str(Fraction(sampling.fps or "1")))


def first_device(
    device: str, devices: tuple[str, ...] | None, engine: str | None = None
) -> tuple[str, tuple[str, ...]]:
    """Return the device of the first tower and those of all, of --device and --devices.

    Raises click.UsageError where they contradict each other, or the cluster decides (--on).
    """
    if devices is None:
        return device, ()
    if engine:
        raise click.UsageError(f"--devices: {engine} gives each worker its device; leave it out")
    if device != "auto":
        raise click.UsageError("--device and --devices: give one of them")
    return devices[0], devices


def refuse_address(engine: str | None, address: str | None) -> None:
    """Raise UserError for --address without --on ray."""
    if address and not engine:
        raise UserError("--address needs --on ray", got=address, fix="add --on ray")


def given(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that were given: those that are not None."""
    return {name: value for name, value in flags.items() if value is not None}


def bytes_bar(banks: Sequence[Path], what: str) -> "tqdm[Any]":
    """Return a progress bar over the bytes of all shards."""
    # by the bytes that are read: shards differ in size
    total = sum(path.stat().st_size for bank in banks for path in bank.glob("shards/*.tar"))
    return tqdm(total=total, unit="B", unit_scale=True, desc=what, leave=False, disable=None)
