"""The commands that encode: plan, encode, retry."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from preprocess.cli.options import (
    DECODERS,
    HOW,
    LOCAL,
    ON,
    PLANNED,
    given,
    make_sampling,
    refuse_address,
)
from shards.errors import UserError
from shards.text import counted, in_bytes, printable

if TYPE_CHECKING:
    from preprocess.encode.features import EncodeOptions
    from preprocess.encode.pipeline.summary import Summary
    from preprocess.sources.find import Found
    from shards.format.manifest import Manifest
    from shards.format.quarantine import QuarantineEntry


@click.command()
@PLANNED
@click.option("--no-estimate", is_flag=True, help="Do not encode a few clips to estimate hours.")
def plan(inputs: tuple[str, ...], out: Path, no_estimate: bool, **flags: Any) -> None:
    """Write the plan that encode would execute, and say what it will cost.

    INPUTS and flags are those of encode. Inputs are opened, none is decoded but a few to estimate
    the hours, and of int8 some to calibrate on. `preprocess work BANK` on any number of machines makes
    what is planned, `preprocess finish BANK` ends it; encode is the three in one. Exit code 2: wrong
    usage.

    \b
    preprocess plan videos/ --out bank --tower google/siglip-so400m-patch14-384
    """
    found, options, rest = prepared(inputs, out, **flags)

    from preprocess.encode.estimate import forecast
    from preprocess.encode.run import plan_clips

    tower, changes, options = plan_clips(found, out, options, **rest)
    tell(found, out)
    for line in forecast(out, changes, tower, options, hours=not no_estimate):
        click.echo(line)


@click.command()
@PLANNED
@click.option("--procs", type=click.IntRange(min=1),
              help="Processes, each with tower and decoder, over all GPUs.  [default: 1]")  # fmt: skip
@DECODERS
@ON
def encode(
    inputs: tuple[str, ...],
    out: Path,
    procs: int | None,
    decoders: int | None,
    engine: str | None,
    address: str | None,
    **flags: Any,
) -> None:
    """Bank the features of INPUTS.

    An input is a video, a folder, an archive (.zip; .tar, plain or packed with gzip, bzip2 or xz),
    or annotations as training reads them: .json, .jsonl, .csv or .parquet, a folder of these,
    owner/name of the Hub. A folder gives its videos and animations at any depth, and each folder in
    which there is nothing but pictures is one clip (its rate: --folder-fps). The `video` of an
    annotation may be a video, a folder of pictures, an animation or a still picture. An archive
    gives its videos, read one at a time and not unpacked; name archives themselves, not their
    folder. What else there is is counted, and listed in BANK/skipped.jsonl.

    Rerunning skips what is done, encodes what is new, and encodes again videos that have changed.
    A clip that cannot be read is named in BANK/quarantine.jsonl; `preprocess retry BANK` tries it
    again. Exit code 0: all done; 1: some clips failed and are listed; 2: wrong usage, or the
    machine failed: what is committed stays, run the same command again; 70: a bug of ours, with its
    traceback: what is committed stays, and no clip is blamed.

    \b
    preprocess encode videos/ --stride 4,8 --out bank --tower google/siglip-so400m-patch14-384
    preprocess encode train.json --video-root videos/ --frames 16 --out bank --tower ./tower
    preprocess encode 0_30_s_academic_v0_1_videos_*.tar.gz --out bank --tower ./tower
    """
    refuse_address(engine, address)
    found, options, rest = prepared(inputs, out, **flags)

    from preprocess.encode.estimate import gone
    from preprocess.encode.run import encode_clips, plan_clips

    if engine:
        from preprocess.encode.on_ray import encode_on_ray
        from shards.format.quarantine import read_quarantine
        from shards.write.finish import finish_alone

        plan_clips(found, out, options, **rest)
        tell(found, out)
        encode_on_ray(out, None, (), procs, address)
        click.echo(held(out, finish_alone(out)))
        failed(out, read_quarantine(out))
        return
    summary, changes = encode_clips(
        found, out, options, procs=procs or 1, decoders=decoders, **rest
    )
    for line in gone(changes):
        click.echo(line.strip())
    tell(found, out)
    report(out, summary)


def prepared(
    inputs: tuple[str, ...],
    out: Path,
    *,
    frames: int | None,
    fps: str | None,
    max_frames: int | None,
    frames_like: str | None,
    device: str,
    tower_dtype: str,
    shard_size: int,
    batch_frames: int | None,
    tower_threads: int | None,
    prune: bool,
    **rest: Any,
) -> tuple["Found", "EncodeOptions", dict[str, Any]]:
    """Return the clips, how to encode them, and how to plan: what flags of plan and encode mean."""
    from preprocess.sources.find import FindOptions, find_clips
    from shards.format.plan import TowerSettings, read_plan

    sampling = make_sampling(frames, fps, max_frames, frames_like)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; name a folder")
    rest["picture_fps"] = make_sampling(None, rest["picture_fps"], None).fps
    find = FindOptions(**{item.name: rest.pop(item.name) for item in fields(FindOptions)})
    found = find_clips(inputs, find)
    known = read_plan(out)
    tower = known.tower if known else TowerSettings()

    from preprocess.encode.features import EncodeOptions

    options = EncodeOptions(
        sampling=sampling,
        device=device,
        tower_dtype=tower_dtype,
        batch_frames=batch_frames or tower.batch_frames,
        tower_threads=tower_threads or tower.threads,
        processor=known.features.processor if known else None,
        shard_bytes=shard_size * 1024**2,
        find=find,
        **rest,
    )
    return found, options, {"prune": prune}


def tell(found: "Found", out: Path) -> None:
    """Say what of the inputs is no clip."""
    from preprocess.sources.skips import report as skipped

    for line in [*found.notes, *skipped(found.skips, out)]:
        click.echo(printable(line))


@click.command()
@click.argument("bank", type=LOCAL)
@click.option("--tower", help="Where the bank's tower lies now.  [default: where it lay]")
@click.option("--video-root", "roots", multiple=True, type=click.Path(),
              help="Where videos may lie that have moved. Repeatable.")  # fmt: skip
@HOW
def retry(
    bank: Path,
    tower: str | None,
    roots: tuple[str, ...],
    device: str,
    **how: Any,
) -> None:
    """Encode again the clips in BANK/quarantine.jsonl, and nothing else.

    Mend or replace the videos where they lie, then run this. Tower, frames and strides are those
    of the bank. Clips that succeed are added in a new shard and leave the quarantine; the others
    stay, with one attempt more. Exit codes are those of encode.

    \b
    preprocess retry bank
    preprocess retry bank --allow-truncated
    """
    from preprocess.care.retry import retry as encode_again

    report(bank, encode_again(bank, tower, roots, device=device, **given(how)))


def report(bank: Path, summary: "Summary") -> None:
    """Say what a run did; exit with 1 if clips failed."""
    click.echo(
        f"{bank}: {counted(summary.clips, 'clip')}, {counted(summary.frames, 'frame')}, "
        f"{in_bytes(summary.nbytes)} in {summary.seconds:.1f} s; "
        f"{counted(summary.skipped, 'clip')} there already"
    )
    if summary.advice:
        click.echo(f"  {summary.advice}")
    failed(bank, summary.failures)


def held(bank: Path, manifest: "Manifest") -> str:
    """Return what a bank holds, in a line."""
    return (
        f"{bank}: {counted(manifest.clips, 'clip')}, {counted(manifest.frames, 'frame')}, "
        f"{in_bytes(manifest.nbytes)} in {counted(len(manifest.shards), 'shard')}"
    )


def failed(bank: Path, failures: "Sequence[QuarantineEntry]") -> None:
    """Say which clips failed, and exit with 1 if there are any."""
    if failures:
        clips = counted(len(failures), "clip")
        click.echo(f"{clips} failed, listed in {bank / 'quarantine.jsonl'}:")
        for entry in failures[:20]:
            click.echo(f"  {entry.id}: {entry.reason}: {entry.message}")
        raise SystemExit(1)
