"""Predicted next frames beside what came and the frame before, as colours."""

from collections.abc import Sequence
from html import escape

from train.pages.read.footage import Footage, tiles
from train.pages.read.foreseen import ROLES, Foreseen, read_foreseen
from train.pages.read.runs import Run
from train.pages.settings import scrolled
from train.scores.results import foreseen_beside

WORDS = {
    "target": "what came",
    "predicted": "predicted",
    "copy": "the frame before",
}


def section(runs: Sequence[tuple[Run, Footage]]) -> str:
    """Return the clips whose next frames evaluation has kept, of each run; nothing without any."""
    parts = []
    for run, footage in runs:
        for test in run.tests:
            clips = read_foreseen(foreseen_beside(test.place))
            shown = "".join(strip(clip, footage) for clip in clips)
            if shown:
                parts.append(f"<h4>{escape(run.name)}, test set {escape(test.name)}</h4>{shown}")
    if not parts:
        return ""
    says = (
        "<p>From each frame the model predicts the features of the next one: what the frozen vision "
        "tower makes of it, not its pixels. Features have no colour of their own: their three strongest "
        "directions are shown as red, green and blue, the same in all rows of a clip. A good prediction "
        "looks like what came, where that differs from the frame before.</p>"
    )
    return says + "".join(parts)


def strip(clip: Foreseen, footage: Footage) -> str:
    """Return a clip's rows: frames of the video where it is there, then target, prediction and copy."""
    if not clip.frames:
        return ""
    # one palette for all rows: the same features have the same colour in what came and in the prediction
    palette = coloured(clip)
    look = footage.look(clip.clip)
    heads = "".join(f"<th scope=col>{frame.time:.2f} s</th>" for frame in clip.frames)
    rows = []
    # features as colours stand below anyway
    if look and look.of_video:
        cells = "".join(
            f'<td><img src="{look.pictures[look.near(f.time)]}" alt="frame at {f.time:.2f} s" '
            'width="56" height="56"></td>'
            for f in clip.frames
        )
        rows.append(f"<tr><th scope=row>video</th>{cells}</tr>")
    for role in ROLES:
        cells = "".join(
            f'<td><img class="cells" src="{palette[number, role]}" width="56" height="56" '
            f'alt="{WORDS[role]} at {frame.time:.2f} s"></td>'
            for number, frame in enumerate(clip.frames)
        )
        rows.append(f"<tr><th scope=row>{WORDS[role]}</th>{cells}</tr>")
    for role, errors in (
        ("predicted", [frame.error for frame in clip.frames]),
        ("copy", [frame.copy_error for frame in clip.frames]),
    ):
        cells = "".join(f"<td>{error:.2f}</td>" for error in errors)
        rows.append(f"<tr><th scope=row>error, {WORDS[role]}</th>{cells}</tr>")
    # by frames, not by the mean: one frame with a cut would decide it
    better = sum(frame.error < frame.copy_error for frame in clip.frames)
    table = (
        f'<table class="foreseen"><thead><tr><td></td>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )
    return (
        f"<p><code>{escape(clip.clip)}</code>: the prediction is closer than the frame before "
        f"in {better} of {len(clip.frames)} frames.</p>{scrolled(table, f'Next frames of {clip.clip}')}"
    )


def coloured(clip: Foreseen) -> dict[tuple[int, str], str]:
    """Return a picture of each frame in each role, all in one palette."""
    from preprocess.show.picture import colours

    places = [(number, role) for number in range(len(clip.frames)) for role in ROLES]
    # a place each, as the palette is made for arrays by number: these grids may differ
    arrays = {k: getattr(clip.frames[n], role)[None] for k, (n, role) in enumerate(places)}
    shades = colours(arrays)
    return {place: tiles(shades[k][0]) for k, place in enumerate(places)}
