"""The commands. Parsing only: torch, decoders and zarr are imported inside."""

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from preprocess.cli.care import gc, repair, status, verify
from preprocess.cli.export import export
from preprocess.cli.options import HOW, PLANNED, given, make_sampling
from shards.errors import UserError
from shards.text import counted, in_bytes

if TYPE_CHECKING:
    from preprocess.encode.features import EncodeOptions
    from preprocess.encode.unit import Summary
    from shards.format.plan import ClipSource


ORDER = (
    "toyworld",
    "plan",
    "encode",
    "retry",
    "status",
    "show",
    "verify",
    "repair",
    "diff",
    "export",
    "gc",
)


class Commands(click.Group):
    """A group whose usage errors are one line, as all our errors are."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(self.commands, key=ORDER.index)

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with one_line_errors():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        with one_line_errors():
            return super().invoke(ctx)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Say what is wrong, a line each, and exit with 2; a bug keeps its traceback and exits with 70."""
    try:
        yield
    except click.exceptions.NoArgsIsHelpError:
        raise
    except click.UsageError as error:
        problems = error.format_message()
    except (UserError, OSError) as error:
        problems = str(error) or repr(error)
    except (click.exceptions.Exit, click.Abort):
        raise
    except Exception:
        traceback.print_exc()
        raise SystemExit(70) from None
    else:
        return
    for line in problems.splitlines():
        click.echo(f"error: {line}", err=True)
    raise SystemExit(2)


@click.group(
    cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(package_name="framebank")
def main() -> None:
    """Encode videos once into a bank of features; train on it many times.

    \b
    preprocess toyworld demo/toy             draw a small world of videos to try everything on
    preprocess plan VIDEOS --out BANK ...    say what encoding will cost, and encode nothing
    preprocess encode VIDEOS --out BANK ...  run a frozen vision tower over videos, once
    preprocess retry BANK                    encode what failed again, and nothing else
    preprocess verify BANK                   find what is damaged; `repair` encodes only that
    """


@main.command()
@PLANNED
@click.option("--no-estimate", is_flag=True, help="Do not encode a few clips to estimate hours.")
def plan(inputs: tuple[str, ...], out: Path, no_estimate: bool, **flags: Any) -> None:
    """Write the plan that encode would execute, and say what it will cost.

    INPUTS and flags are those of encode. Inputs are opened, none is decoded but a few to estimate
    the hours. Exit code 2: wrong usage.

    \b
    preprocess plan videos/ --out bank --tower google/siglip-so400m-patch14-384
    """
    clips, options, rest = prepared(inputs, out, **flags)

    from preprocess.encode.estimate import forecast
    from preprocess.encode.run import plan_clips

    tower, changes = plan_clips(clips, out, options, **rest)
    for line in forecast(out, changes, tower, options, hours=not no_estimate):
        click.echo(line)


@main.command()
@PLANNED
@click.option("--procs", type=click.IntRange(min=1), default=1, show_default=True,
              help="Processes, each with its tower and decoder, over all GPUs.")  # fmt: skip
def encode(inputs: tuple[str, ...], out: Path, procs: int, **flags: Any) -> None:
    """Bank the features of INPUTS.

    An input is a video, a folder, an annotation file (.json, .jsonl) or an archive (.tar, .tar.gz,
    .tgz). A folder gives its videos and .gif files at any depth, and each folder in which there is
    nothing but pictures is one clip (its rate: --folder-fps). The `video` of an annotation
    may be a video, a folder of pictures, an animation or a still picture. An archive gives its
    videos, read one at a time and not unpacked; name archives themselves, not their folder.

    Rerunning skips what is done, encodes what is new, and encodes again videos that have changed.
    A clip that cannot be read is named in BANK/quarantine.jsonl; `preprocess retry BANK` tries it
    again. Exit code 0: all done; 1: some clips failed and are listed; 2: wrong usage, or the
    machine failed: what is committed stays, run the same command again.

    \b
    preprocess encode videos/ --stride 4,8 --out bank --tower google/siglip-so400m-patch14-384
    preprocess encode train.json --video-root videos/ --frames 16 --out bank --tower ./tower
    preprocess encode 0_30_s_academic_v0_1_videos_*.tar.gz --out bank --tower ./tower
    """
    clips, options, rest = prepared(inputs, out, **flags)

    from preprocess.encode.estimate import gone
    from preprocess.encode.run import encode_clips

    summary, changes = encode_clips(clips, out, options, procs=procs, **rest)
    for line in gone(changes):
        click.echo(line.strip())
    report(out, summary)


def prepared(
    inputs: tuple[str, ...],
    out: Path,
    *,
    frames: int | None,
    fps: str | None,
    max_frames: int | None,
    device: str,
    tower_dtype: str,
    shard_size: int,
    batch_frames: int | None,
    tower_threads: int | None,
    verify_inputs: str,
    prune: bool,
    **rest: Any,
) -> tuple[list["ClipSource"], "EncodeOptions", dict[str, Any]]:
    """Return the clips, how to encode them, and how to plan: what flags of plan and encode mean."""
    from preprocess.sources.find import find_clips
    from shards.format.plan import TowerSettings, read_plan

    sampling = make_sampling(frames, fps, max_frames)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; name a folder")
    rest["picture_fps"] = make_sampling(None, rest["picture_fps"], None).fps
    clips = find_clips(
        inputs,
        rest["video_roots"],
        rest["picture_fps"],
        allow_outside=rest["allow_outside"],
    )
    known = read_plan(out)
    tower = known.tower if known else TowerSettings()

    device = start_torch(device)
    from preprocess.encode.features import EncodeOptions

    if tower_dtype == "auto":
        tower_dtype = "bfloat16" if device.startswith("cuda") else "float32"
    options = EncodeOptions(
        sampling=sampling,
        device=device,
        tower_dtype=tower_dtype,
        batch_frames=batch_frames or tower.batch_frames,
        tower_threads=tower_threads or tower.threads,
        shard_bytes=shard_size * 1024**2,
        **rest,
    )
    return clips, options, {"full": verify_inputs == "full", "prune": prune}


def start_torch(device: str) -> str:
    """Import torch, quietly and with idle threads asleep; return the device that is meant.

    Spinning threads take the cores that the decoder needs: on two cores with one more busy process
    encoding took eight times as long.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


@main.command()
@click.argument("bank", type=click.Path(path_type=Path))
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
    from shards.format.plan import read_plan

    if read_plan(bank) is None:
        raise UserError(f"{bank}: no bank to retry (plan.json is missing); run `preprocess encode`")
    device = start_torch(device)
    from preprocess.encode.retry import retry as encode_again

    report(bank, encode_again(bank, tower, roots, device=device, **given(how)))


@main.command()
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
def diff(a: Path, b: Path) -> None:
    """Say in which features A and B differ, field by field.

    Each is a bank, a folder with a plan, or a json file of either. Exit code 0: the same features,
    and one may be extended as the other was made; 1: they differ.
    """
    from shards.care.compare import diff as differing

    lines = differing(a, b)
    for line in lines:
        click.echo(line)
    if lines:
        raise SystemExit(1)
    click.echo("same features")


@main.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--train-clips", type=click.IntRange(min=1), default=384, show_default=True)
@click.option("--test-clips", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--seed", default=0, show_default=True)
def toyworld(out: Path, train_clips: int, test_clips: int, seed: int) -> None:
    """Draw a toy world into OUT: videos, records with exact answers, a tiny tower and LLM."""
    from preprocess.toyworld import make_toyworld

    make_toyworld(out, train_clips=train_clips, test_clips=test_clips, seed=seed)
    click.echo(f"{out}: {train_clips} training and {test_clips} test clips, tower/, llm/")


def report(bank: Path, summary: "Summary") -> None:
    """Say what a run did; exit with 1 if clips failed."""
    click.echo(
        f"{bank}: {counted(summary.clips, 'clip')}, {counted(summary.frames, 'frame')}, "
        f"{in_bytes(summary.nbytes)} in {summary.seconds:.1f} s; "
        f"{counted(summary.skipped, 'clip')} there already"
    )
    if summary.failures:
        failed = counted(len(summary.failures), "clip")
        click.echo(f"{failed} failed, listed in {bank / 'quarantine.jsonl'}:")
        for entry in summary.failures[:20]:
            click.echo(f"  {entry['id']}: {entry['reason']}: {entry['message']}")
        raise SystemExit(1)


@main.command()
@click.argument("bank", type=click.Path(path_type=Path))
@click.argument("key", required=False)
@click.option("--out", type=click.Path(path_type=Path), help="The picture.  [default: KEY.png]")
def show(bank: Path, key: str | None, out: Path | None) -> None:
    """Tell what is in BANK; with KEY (a clip's id or its sample's key), draw that clip.

    The picture shows the clip's frames above their features as colours.
    """
    if out and not key:
        raise UserError(f"--out {out}: a picture is of one clip; name its KEY")
    if out and not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}")

    from preprocess.show.picture import picture
    from preprocess.show.table import table

    if not key:
        click.echo(table(bank))
        return
    name, image = picture(bank, key)
    out = out or Path(f"{name}.png")
    try:
        image.save(out)
    except ValueError as error:  # an ending that PIL knows no format of
        raise UserError(f"--out {out}: {error}") from None
    click.echo(out)


for command in (status, verify, repair, export, gc):
    main.add_command(command)
