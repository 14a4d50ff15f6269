"""The commands. Parsing only: torch, decoders and zarr are imported inside."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shards.schema import DTYPES, POOL_MODES, Sampling, check_strides

if TYPE_CHECKING:
    from preprocess.unit import Summary


ALLOW_TRUNCATED = "Bank what comes of truncated or damaged videos; their flags say so."


class Strides(click.ParamType):
    """`4,8` -> (4, 8)."""

    name = "stride,stride"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            strides = tuple(int(word) for word in value.split(","))
            check_strides(strides)
        except ValueError:
            self.fail(
                f"strictly increasing positive integers such as 4,8 are needed, got {value!r}",
                param,
                ctx,
            )
        return strides


class Commands(click.Group):
    """A group whose usage errors are one line, as all our errors are."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with one_line_errors():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        with one_line_errors():
            return super().invoke(ctx)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Say what is wrong, a line each, and exit with 2."""
    try:
        yield
    except click.exceptions.NoArgsIsHelpError:
        raise
    except click.UsageError as error:
        problems = error.format_message()
    except (ValueError, OSError) as error:
        problems = str(error) or repr(error)
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
    preprocess encode VIDEOS --out BANK ...  run a frozen vision tower over videos, once
    preprocess retry BANK                    encode what failed again, and nothing else
    """


@main.command()
@click.argument("inputs", nargs=-1, required=True, type=click.Path())
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The bank's folder.")
@click.option(
    "--tower", required=True, help="Hub name or folder of a SigLIP, CLIP or DINOv2 tower."
)
@click.option(
    "--stride",
    "strides",
    type=Strides(),
    default="4,8",
    show_default=True,
    help="Patches per cell side, each banked for every frame: finest slow, coarsest fast.",
)
@click.option("--frames", type=click.IntRange(min=1), help="Frames of each clip, uniformly.")
@click.option("--fps", help="Frames per second of each clip, such as 1 or 0.5.  [default: 1]")
@click.option(
    "--max-frames",
    type=click.IntRange(min=1),
    help="With --fps: sample longer clips uniformly with this many.  [default: 64]",
)
@click.option(
    "--video-root",
    "video_roots",
    multiple=True,
    type=click.Path(),
    help="Folder that annotation files' videos lie under. Repeatable.",
)
@click.option("--layer", default=-2, show_default=True, help="Hidden layer of the tower.")
@click.option("--pool", type=click.Choice(POOL_MODES), default="average", show_default=True)
@click.option("--dtype", type=click.Choice(DTYPES), default="float16", show_default=True,
              help="Of the stored features.")  # fmt: skip
@click.option(
    "--tower-dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="Of the tower's arithmetic; auto is bfloat16 on CUDA, float32 elsewhere.",
)
@click.option("--batch-frames", type=click.IntRange(min=1), default=16, show_default=True,
              help="Frames that pass through the tower together.")  # fmt: skip
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1 ...")
@click.option("--decoder", type=click.Choice(["auto", "decord", "pyav"]), default="auto",
              show_default=True, help="auto lets a scan of each file's packets choose.")  # fmt: skip
@click.option("--allow-truncated", is_flag=True, help=ALLOW_TRUNCATED)
@click.option("--folder-fps", "picture_fps", default="2", show_default=True,
              help="Pictures per second of folders of frames.")  # fmt: skip
@click.option("--shard-size", type=click.IntRange(min=1), default=512, show_default=True,
              help="MB of a shard, at most.")  # fmt: skip
def encode(
    inputs: tuple[str, ...],
    out: Path,
    tower: str,
    strides: tuple[int, ...],
    frames: int | None,
    fps: str | None,
    max_frames: int | None,
    device: str,
    tower_dtype: str,
    shard_size: int,
    **rest: Any,
) -> None:
    """Bank the features of INPUTS.

    An input is a video, a folder, an annotation file (.json, .jsonl) or an archive (.tar, .tar.gz,
    .tgz). A folder gives its videos and .gif files at any depth, and each folder in which there is
    nothing but pictures is one clip (its rate: --folder-fps). The `video` of an annotation
    may be a video, a folder of pictures, an animation or a still picture. An archive gives its
    videos, read one at a time and not unpacked; name archives themselves, not their folder.

    Rerunning skips what is done. A clip that cannot be read is named in BANK/quarantine.jsonl;
    `preprocess retry BANK` tries it again. Exit code 0: all done; 1: some clips failed and are
    listed; 2: wrong usage.

    \b
    preprocess encode videos/ --stride 4,8 --out bank --tower google/siglip-so400m-patch14-384
    preprocess encode train.json --video-root videos/ --frames 16 --out bank --tower ./tower
    preprocess encode 0_30_s_academic_v0_1_videos_*.tar.gz --out bank --tower ./tower
    """
    from preprocess.plan import find_clips

    sampling = make_sampling(frames, fps, max_frames)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: is a file; name a folder")
    rest["picture_fps"] = make_sampling(None, rest["picture_fps"], None).fps
    clips = find_clips(inputs, rest["video_roots"], rest["picture_fps"])

    let_idle_threads_sleep()
    import torch
    from transformers.utils import logging

    from preprocess.encode import EncodeOptions, encode_clips

    logging.disable_progress_bar()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if tower_dtype == "auto":
        tower_dtype = "bfloat16" if device.startswith("cuda") else "float32"
    options = EncodeOptions(
        tower=tower,
        strides=strides,
        sampling=sampling,
        device=device,
        tower_dtype=tower_dtype,
        shard_bytes=shard_size * 1024**2,
        **rest,
    )
    report(out, encode_clips(clips, out, options))


@main.command()
@click.argument("bank", type=click.Path(path_type=Path))
@click.option("--tower", help="Where the bank's tower lies now.  [default: where it lay]")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1 ...")
@click.option("--batch-frames", type=click.IntRange(min=1), default=16, show_default=True,
              help="Frames that pass through the tower together, as when encoding.")  # fmt: skip
@click.option("--decoder", type=click.Choice(["auto", "decord", "pyav"]), default="auto",
              show_default=True, help="auto lets a scan of each file's packets choose.")  # fmt: skip
@click.option("--allow-truncated", is_flag=True, help=ALLOW_TRUNCATED)
def retry(bank: Path, device: str, **how: Any) -> None:
    """Encode again the clips in BANK/quarantine.jsonl, and nothing else.

    Mend or replace the videos where they lie, then run this. Tower, frames and strides are those
    of the bank. Clips that succeed are added in a new shard and leave the quarantine; the others
    stay, with one attempt more. Exit codes are those of encode.

    \b
    preprocess retry bank
    preprocess retry bank --allow-truncated
    """
    from preprocess.plan import read_plan

    if read_plan(bank) is None:
        raise ValueError(
            f"{bank}: no bank to retry (plan.json is missing); run `preprocess encode`"
        )

    let_idle_threads_sleep()
    import torch
    from transformers.utils import logging

    from preprocess.retry import retry as encode_again

    logging.disable_progress_bar()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    report(bank, encode_again(bank, device=device, **how))


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
        f"{bank}: {summary.clips} clips, {summary.frames} frames, {size(summary.nbytes)} "
        f"in {summary.seconds:.1f} s; {summary.skipped} clips were there already"
    )
    if summary.failures:
        click.echo(f"{len(summary.failures)} clips failed, listed in {bank / 'quarantine.jsonl'}:")
        for entry in summary.failures[:20]:
            click.echo(f"  {entry['id']}: {entry['reason']}: {entry['message']}")
        raise SystemExit(1)


def let_idle_threads_sleep() -> None:
    """Tell OpenMP, before torch is imported, not to spin while it waits.

    Spinning threads take the cores that the decoder needs: on two cores with one more busy process
    encoding took eight times as long.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def make_sampling(frames: int | None, fps: str | None, max_frames: int | None) -> Sampling:
    """Return the sampling that the flags mean."""
    if frames is not None and (fps is not None or max_frames is not None):
        raise ValueError("--frames N stands alone; leave out --fps and --max-frames")
    if frames is not None:
        return Sampling(num_frames=frames)
    sampling = Sampling(fps=fps or "1", max_frames=max_frames or 64)
    return Sampling(fps=str(Fraction(sampling.fps or "1")), max_frames=sampling.max_frames)


def size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


@main.command()
@click.argument("bank", type=click.Path(path_type=Path))
@click.argument("key", required=False)
@click.option("--out", type=click.Path(path_type=Path), help="The picture.  [default: KEY.png]")
def show(bank: Path, key: str | None, out: Path | None) -> None:
    """Tell what is in BANK; with KEY (a clip's id or its sample's key), draw that clip.

    The picture shows the clip's frames above their features as colours.
    """
    if out and not key:
        raise ValueError(f"--out {out}: a picture is of one clip; name its KEY")
    if out and not out.parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {out.parent}")

    from preprocess.show import picture, table

    if not key:
        click.echo(table(bank))
        return
    name, image = picture(bank, key)
    out = out or Path(f"{name}.png")
    image.save(out)
    click.echo(out)
