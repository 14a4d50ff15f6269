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
    TOWERS,
    first_device,
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
    """Write the plan that encode would execute, and estimate its cost.

    INPUTS and options are those of encode. Inputs are opened, but only a few are decoded, to estimate the
    hours, and for int8 some to calibrate on. `preprocess work BANK`, on any number of machines, makes the
    planned units; `preprocess finish BANK` completes the bank. encode does all three. Exit code 2: wrong
    usage.

    \b
    preprocess plan videos/ --out bank --tower google/siglip-so400m-patch14-384
    """
    found, options, rest = prepared(inputs, out, **flags)

    from preprocess.encode.estimate import forecast
    from preprocess.encode.run import plan_clips

    made = plan_clips(found, out, options, **rest)
    print_skips(found, out)
    for one in made:
        for line in forecast(one.bank, one.changes, one.tower, one.options, hours=not no_estimate):
            click.echo(line)


@click.command()
@PLANNED
@TOWERS
@DECODERS
@ON
def encode(
    inputs: tuple[str, ...],
    out: Path,
    devices: tuple[str, ...] | None,
    procs: int | None,
    decoders: int | None,
    engine: str | None,
    address: str | None,
    device: str,
    **flags: Any,
) -> None:
    """Bank the features of INPUTS.

    An input is a video, a folder, an archive (.zip; .tar, plain or packed with gzip, bzip2 or xz),
    or annotations as training reads them: .json, .jsonl, .csv or .parquet, a folder of these,
    owner/name of the Hub. A folder gives its videos and animations at any depth, and each folder that
    contains nothing but pictures is one clip (its rate: --folder-fps). The `video` of an annotation
    may be a video, a folder of pictures, an animation or a still picture. An archive gives its videos,
    which are read one at a time and not unpacked; name archives themselves, not their folder. All other
    files are counted, and listed in BANK/skipped.jsonl.

    Rerunning skips what is done, encodes new videos, and replaces those that have changed. A --stride
    that BANK does not have is encoded beside its shards, which stay as they are, and is read together
    with them; the other flags must be those of BANK.
    A clip that cannot be read is named in BANK/quarantine.jsonl; `preprocess retry BANK` tries it
    again. Exit code 0: all done; 1: some clips failed and are listed; 2: wrong usage, or the
    machine failed: what is committed stays, run the same command again; 70: a bug in framebank, with its
    traceback: what is committed stays, and no clip is blamed.

    \b
    preprocess encode videos/ --stride 4,8 --out bank --tower google/siglip-so400m-patch14-384
    preprocess encode train.json --video-root videos/ --frames 16 --out bank --tower ./tower
    preprocess encode 0_30_s_academic_v0_1_videos_*.tar.gz --out bank --tower ./tower
    preprocess encode videos/ --stride 2 --out bank --tower google/siglip-so400m-patch14-384
    """
    refuse_address(engine, address)
    device, every = first_device(device, devices, engine)
    found, options, rest = prepared(inputs, out, device=device, devices=every, **flags)

    from preprocess.encode.estimate import gone
    from preprocess.encode.run import encode_clips, plan_clips

    if engine:
        from preprocess.encode.on_ray import encode_on_ray

        plan_clips(found, out, options, **rest)
        print_skips(found, out)
        encode_on_ray(out, None, (), procs, address, decoders)
        finish_all(out)
        return
    summary, changes = encode_clips(found, out, options, procs=procs, decoders=decoders, **rest)
    for line in gone(changes):
        click.echo(line.strip())
    print_skips(found, out)
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
    """Return the clips, the options to encode them, and the options to plan, from the command's flags."""
    from preprocess.sources.find import FindOptions, find_clips
    from shards.format.plan import TowerSettings, plan_as_read

    sampling = make_sampling(frames, fps, max_frames, frames_like)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; name a folder")
    # as one spelling, like --fps: 2, 2.0 and 4/2 are one rate
    rest["picture_fps"] = make_sampling(None, rest["picture_fps"], None).fps
    find = FindOptions(**{item.name: rest.pop(item.name) for item in fields(FindOptions)})
    found = find_clips(inputs, find)
    # read once, for the defaults here and for the run itself
    seen = plan_as_read(out)
    known = seen.plan
    tower = known.tower if known else TowerSettings()

    from preprocess.encode.features import EncodeOptions

    options = EncodeOptions(
        sampling=sampling,
        device=device,
        tower_dtype=tower_dtype,
        # the bank's own values where none are given: in other batches sums are rounded otherwise
        batch_frames=batch_frames or tower.batch_frames,
        tower_threads=tower_threads or tower.threads,
        processor=known.features.processor if known else None,
        shard_bytes=shard_size * 1024**2,
        find=find,
        **rest,
    )
    return found, options, {"prune": prune, "seen": seen}


def print_skips(found: "Found", out: Path | None) -> None:
    """Print which inputs are not clips. out: the bank that lists them all, if any."""
    from preprocess.sources.skips import report as skipped

    for line in [*found.notes, *skipped(found.skips, out)]:
        click.echo(printable(line))


@click.command()
@click.argument("bank", type=LOCAL)
@click.option("--tower", help="The bank's tower: its folder or Hub name.  [default: as recorded]")
@click.option("--video-root", "roots", multiple=True, type=click.Path(),
              help="Folder that contains videos which have moved. Repeatable.")  # fmt: skip
@HOW
def retry(
    bank: Path,
    tower: str | None,
    roots: tuple[str, ...],
    device: str,
    **how: Any,
) -> None:
    """Encode the clips in BANK/quarantine.jsonl once more, and nothing else.

    Repair or replace the videos in place, then run this. Tower, frames and strides are those of the
    bank. Clips that succeed are added in a new shard and removed from the quarantine; the others stay,
    with one more attempt. Exit codes are those of encode.

    \b
    preprocess retry bank
    preprocess retry bank --allow-truncated
    """
    from preprocess.care.retry import retry as retry_failed
    from shards.format.beside import banks_of

    summary = retry_failed(bank, tower, roots, device=device, **given(how))
    for side in banks_of(bank)[1:]:
        summary = summary.beside(retry_failed(side, tower, roots, device=device, **given(how)))
    compare_sides(bank, "preprocess retry")
    report(bank, summary)


def finish_all(bank: Path) -> None:
    """Finish a bank and the banks beside it, and print what they hold; exit with 1 if clips failed."""
    from shards.format.beside import banks_of
    from shards.format.quarantine import read_entries
    from shards.write.finish import finish_alone

    entries: dict[str, QuarantineEntry] = {}
    for one in banks_of(bank):
        click.echo(held(one, finish_alone(one)))
        # the bank's own entry wins over that of a side: it was tried first
        entries = read_entries(one) | entries
    compare_sides(bank, "preprocess finish")
    failed(bank, [*entries.values()])


def compare_sides(bank: Path, command: str) -> None:
    """Record which strides beside a bank can be read with it, and print why others cannot."""
    from shards.write.beside import pair

    for why in pair(bank, command):
        click.echo(f"note: {printable(why)}", err=True)


def report(bank: Path, summary: "Summary") -> None:
    """Print the summary of a run; exit with 1 if clips failed."""
    click.echo(
        f"{bank}: {counted(summary.clips, 'clip')}, {counted(summary.frames, 'frame')}, "
        f"{in_bytes(summary.nbytes)} in {summary.seconds:.1f} s; "
        f"{counted(summary.skipped, 'clip')} there already"
    )
    if summary.advice:
        click.echo(f"  {summary.advice}")
    failed(bank, summary.failures)


def held(bank: Path, manifest: "Manifest") -> str:
    """Return the contents of a bank in one line."""
    return (
        f"{bank}: {counted(manifest.clips, 'clip')}, {counted(manifest.frames, 'frame')}, "
        f"{in_bytes(manifest.nbytes)} in {counted(len(manifest.shards), 'shard')}"
    )


def failed(bank: Path, failures: "Sequence[QuarantineEntry]") -> None:
    """Print which clips failed, and exit with 1 if there are any."""
    # the first 20: the file has them all
    if failures:
        clips = counted(len(failures), "clip")
        click.echo(f"{clips} failed, listed in {bank / 'quarantine.jsonl'}:")
        for entry in failures[:20]:
            click.echo(f"  {entry.id}: {entry.reason}: {entry.message}")
        raise SystemExit(1)
