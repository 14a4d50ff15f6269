"""What the runs did, whether they learned, and where they fail, in sentences."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from shards.text import counted, duration, some
from train.data.records import TASKS
from train.pages.chart import colour_of
from train.pages.read.runs import Run, TestSet
from train.pages.scores import KINDS, LEARNED, NONE, NOT, PERHAPS, Reached, chip, reached
from train.pages.settings import scrolled
from train.scores.summary import OFF_SCALE

FEW = 3
"""Runs that the page begins with in words; of more it begins with a table."""
GAP = 1.3
"""A loss on test records above so many times that of training is worth a word."""
RISE = 1.02
SMALL = 0.02
"""A skill that is about none."""
PARSED = 0.9
"""Shares of answers that say what was asked, below which it is worth a word."""


@dataclass(frozen=True)
class Story:
    """What there is to say of one run."""

    did: str
    """HTML, as all of these."""
    learned: list[str]
    fails: list[str]


def story_of(run: Run) -> Story:
    learned, fails = [], []
    tests = [test for test in run.tests if test.report]
    if tests and run.began_as:
        learned.append(
            f"It began as the trained model <code>{escape(run.began_as)}</code>: what it answers may "
            "have been learned there."
        )
    for test in tests:
        where = f" on test set <code>{escape(test.name)}</code>" if len(tests) > 1 else ""
        learned += answers_line(run, test, where)
        fails += failing_answers(run, test, where)
    learned += frames_lines(run)
    if not tests and not run.goes_on:
        learned.append(
            "Its answers have not been scored: <code>python train/evaluate.py --model "
            f"{escape(str(run.folder))} --bank … --data_path …</code> does that."
        )
    fails += failing_training(run)
    return Story(did_line(run), learned, fails)


def did_line(run: Run) -> str:
    """Return what was run: model, data, steps, time."""
    metrics, config = run.metrics, run.config
    step = int(metrics.last.get("step", 0))
    steps = f"{step:,} of {run.total:,} steps" if step < run.total else f"{step:,} steps"
    lead = (
        "is training: "
        if run.goes_on
        else "stopped early, after "
        if step < run.total
        else "trained for "
    )
    data = run.said.get("records", "").partition(" to train on")[0]
    on = f" on {int(data):,} records" if data.isdigit() else ""
    llm = escape(str(config.get("stage_path", "") or "a new model"))
    lape = "with LAPE" if config.get("enable_lape") else "without LAPE"
    weight = config.get("loss_weight", 0)
    frames = (
        f"and the frame-causal loss (weight {weight:g})" if weight else "and no frame-causal loss"
    )
    held = " (so far)" if run.goes_on else ""
    banks = ", ".join(f"<code>{escape(bank)}</code>" for bank in config.get("bank", []))
    return (
        f"It {lead}<b>{steps}</b>{on} in {duration(metrics.seconds)}{held}, from <code>{llm}</code>, "
        f"{lape} {frames}. Banks: {banks}."
    )


def answers_line(run: Run, test: TestSet, where: str) -> list[str]:
    """Return which kinds of answers are better than what needs no video, the best known first."""
    # in this order on the page: what was learned before what was not
    by: dict[str, list[Reached]] = {LEARNED: [], PERHAPS: [], NOT: []}
    for one in reached(run, test):
        if one.verdict:
            by[one.verdict].append(one)
    words = {
        LEARNED: "It answers better than anything that does not look at the video",
        PERHAPS: "It is a little better than that, which may be chance",
        NOT: "It is <b>no better than without looking</b>",
    }
    return [
        f"{chip(verdict)} {words[verdict]}{where}:<ul>{''.join(map(versus, found))}</ul>"
        for verdict, found in by.items()
        if found
    ]


def versus(one: Reached) -> str:
    """Return a score beside the strongest thing that it has to beat."""
    # the strongest of them, which decides the verdict
    best = min if one.kind.errs else max
    name, bar = best(one.beats.items(), key=lambda item: item[1])
    less = " (smaller is better)" if one.kind.errs else ""
    return (
        f"<li>{asked_for(one)}: {escape(one.kind.says)}{less} <b>{one.shown(one.value)}</b>; "
        f"{escape(name)}: {one.shown(bar)}</li>"
    )


def asked_for(one: Reached) -> str:
    return f"<b>{escape(one.kind.asks)}</b> ({escape(one.name)})"


def frames_lines(run: Run) -> list[str]:
    """Return whether the next frame is predicted better than by guesses, in training and on tests."""
    lines = []
    trained = run.metrics.end("ar_skill")
    tested = [(t.name, t.losses) for t in run.tests if "ar_skill" in t.losses]
    for name, losses in tested:
        skill = losses["ar_skill"]
        copy = 1 - losses["autoregressive_loss"] / losses["ar_copy_baseline"]
        seen = ""
        if trained is not None:
            seen = (
                f" On the clips that it was trained on it is {side(trained)} than such a guess's."
            )
        lines.append(
            f"{chip(foresees(skill))} The <b>next frame</b> on test set <code>{escape(name)}</code>: "
            f"its error is {side(skill)} than that of the best simple guess ({strongest(losses)}), and "
            f"{side(copy)} than that of repeating the last frame.{seen}"
        )
    if not tested and trained is not None:
        lines.append(
            f"{chip(foresees(trained))} The <b>next frame</b>, in training: its error is "
            f"{side(trained)} than that of the best simple guess."
        )
    return lines


def foresees(skill: float) -> str:
    """Return whether next frames are predicted; so little may be chance, and has no interval."""
    # no interval is kept of frame losses, so that small differences are not judged
    return PERHAPS if abs(skill) < SMALL else LEARNED if skill > 0 else NOT


def side(skill: float) -> str:
    """Return a skill as words: `12 % smaller`, `0.4 % larger`."""
    digits = 0 if abs(skill) >= SMALL else 1
    return f"{100 * abs(skill):.{digits}f} % {'smaller' if skill > 0 else 'larger'}"


def strongest(losses: dict[str, float]) -> str:
    words = {
        "copy": "the last frame again",
        "affine": "a mix of the last frame and the average",
        "ridge": "a linear map of the last frame",
    }
    found = {
        w: losses[f"ar_{n}_baseline"] for n, w in words.items() if f"ar_{n}_baseline" in losses
    }
    return min(found, key=lambda name: found[name]) if found else "none measured"


# -- where it fails


def failing_answers(run: Run, test: TestSet, where: str) -> list[str]:
    lines = []
    for one in reached(run, test):
        if troubles := troubles_of(one):
            lines.append(f"{asked_for(one)}{where}: {'; '.join(troubles)}.")
    lines += memorised(run, test, where)
    left_out = test.report.get("limits", {}).get("frames_left_out")
    if left_out:
        lines.append(f"{left_out:,} frames of the test clips{where} were left out for length.")
    if dropped := test.report.get("dropped"):
        reasons = some([f"{count:,} {reason}" for reason, count in dropped.items()])
        lines.append(f"Test records that were dropped{where}: {escape(reasons)}.")
    return lines


def troubles_of(one: Reached) -> list[str]:
    """Return what is wrong with a kind of answer, in words."""
    found = []
    entry = one.entry
    if one.verdict == NOT:
        known = trained_on(one.run, one.name)
        found.append(
            "no record that it was trained on asks for it" if known is False else "not learned"
        )
    # 1: scores that have no such share (choices, texts) are read whatever they say
    if entry.get("parsed", 1) < PARSED:
        found.append(f"{100 - 100 * entry['parsed']:.0f} % of the answers are not of its form")
    if cut := one.test.report.get("cut", {}).get(one.name):
        found.append(f"{cut} of {entry['count']} answers had not ended when they were cut off")
    if off := one.test.report.get("off_scale", {}).get(one.name):
        found.append(f"{off} of {entry['count']} answers {OFF_SCALE}")
    return found


def trained_on(run: Run, kind: str) -> bool | None:
    """Return whether training had answers of a kind; None where its losses do not say."""
    known = {name for name in run.metrics.names if name.startswith("ce_")} - {"ce_loss"}
    return f"ce_{kind}" in known if known and kind in TASKS and kind != "text" else None


def memorised(run: Run, test: TestSet, where: str) -> list[str]:
    """Return the losses that are far higher on the test set than they were at the end of training."""
    kinds = sorted(n for n in test.losses if n.startswith("ce_") and n != "ce_loss")
    found = []
    for name in kinds:
        trained = run.metrics.end(name)
        if trained and test.losses[name] > GAP * trained:
            found.append(f"{escape(name[3:])} {test.losses[name]:.2f} (in training {trained:.2f})")
    trained = run.metrics.end("ar_skill")
    tested = test.losses.get("ar_skill")
    lines = []
    if found:
        lines.append(
            f"New records{where} are harder than those it was trained on; its loss per token: "
            f"{', '.join(found)}."
        )
    # a skill below 0 means that a guess without any model is better
    if trained is not None and tested is not None and trained > 0 > tested:
        lines.append(
            f"Next frames{where}: better than the guesses on the clips that it was trained on alone. It "
            "has learned those clips, not how frames follow each other."
        )
    return lines


def failing_training(run: Run) -> list[str]:
    """Return what went wrong, or may have, in the steps themselves."""
    lines = []
    metrics = run.metrics
    if metrics.not_finite:
        lines.append("Some steps have losses that are no numbers (NaN or infinity): it broke down.")
    _, losses = metrics.column("loss")
    if (
        # a tenth of fewer steps would be one step
        len(losses) >= 20
        and losses[-len(losses) // 10 :].mean() >= losses[: len(losses) // 10].mean()
    ):
        lines.append("The loss is no lower at the end than at the start: it learned nothing.")
    held = [row for row in metrics.held_out if "loss" in row]
    if held:
        best = min(held, key=lambda row: row["loss"])
        if held[-1]["loss"] > RISE * best["loss"]:
            lines.append(
                f"On held-out records it was best after step {best['step']:,} (loss {best['loss']:.3f}) "
                f"and grew worse (to {held[-1]['loss']:.3f}): more steps on these do not help."
            )
    waits, shares = metrics.column("data_wait")
    if len(waits) > 10 and (wait := float(shares[len(shares) // 10 :].mean())) > 0.15:
        lines.append(f"It waited for data {wait:.0%} of the time.".replace("%", " %"))
    lines += [f"The run warned: {escape(line)}" for line in run.warnings]
    return lines


def sentences(runs: Sequence[Run]) -> str:
    """Return the beginning of the page: of a few runs all there is to say, of many a table first."""
    articles = [article(number, run) for number, run in enumerate(runs)]
    if len(runs) <= FEW:
        return "".join(articles)
    more = "".join(articles)
    return f"{overview(runs)}<details><summary>Each run in words</summary>{more}</details>"


def article(number: int, run: Run) -> str:
    story = story_of(run)
    learned, fails = (
        "".join(f"<li>{line}</li>" for line in own) for own in (story.learned, story.fails)
    )
    nothing = "<li>Nothing stands out; look at the worst answers below.</li>"
    style = f'style="--colour:var(--{colour_of(number)})"'
    return (
        f'<article class="run" {style}><h3>{escape(run.name)}</h3><p>{story.did}</p>'
        + (f"<h4>Did it learn?</h4><ul>{learned}</ul>" if learned else "")
        + (f"<h4>Where does it fail?</h4><ul>{fails or nothing}</ul>" if run.tests or fails else "")
        + "</article>"
    )


def overview(runs: Sequence[Run]) -> str:
    """Return a row for each run and test set: its steps, what it reached and whether that is learned."""
    own = [(run, test) for run in runs for test in run.tests if test.report]
    names = [name for name in KINDS if any(name in test.tasks for _, test in own)]
    heads = [
        "run",
        "test set",
        "steps",
        "took",
        *(f"{n}: {KINDS[n].asks}" for n in names),
        "next frame",
    ]
    rows = []
    for run in runs:
        # a run without scores has a row, too
        tests: list[TestSet | None] = [test for one, test in own if one is run]
        for test in tests or [None]:
            found = {one.name: one for one in reached(run, test)} if test else {}
            cells = [test.name if test else NONE, f"{run.metrics.last.get('step', 0):,}"]
            cells = [*map(escape, cells), duration(run.metrics.seconds)]
            for name in names:
                one = found.get(name)
                cells.append(f"{one.shown(one.value)} {chip(one.verdict)}" if one else NONE)
            skill = test.losses.get("ar_skill") if test else run.metrics.end("ar_skill")
            cells.append(NONE if skill is None else f"{100 * skill:+.1f} % {chip(foresees(skill))}")
            body = "".join(f"<td>{cell}</td>" for cell in cells)
            rows.append(f"<tr><th scope=row>{escape(run.name)}</th>{body}</tr>")
    head = "".join(f"<th scope=col>{escape(h)}</th>" for h in heads)
    body = "".join(rows)
    table = f"<table class='scores'><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return (
        "<p>What each run reached, and whether it has learned that: <b>yes</b> is better than anything "
        "that does not look at the video, <b>no</b> is not. Next frame: how much smaller the error is "
        f"than that of the best simple guess.</p>{scrolled(table, 'Overview')}"
    )


def heading(runs: Sequence[Run]) -> str:
    return (
        runs[0].name
        if len(runs) == 1
        else f"{counted(len(runs), 'run')}: {some([r.name for r in runs])}"
    )
