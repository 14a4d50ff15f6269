"""The plan of a clip -> questions with exact answers.

Questions are in random order, and so are the scenes that one question names: in temporal order, the
position would give the answer away.
"""

import string
from collections.abc import Callable, Sequence

import numpy as np

from preprocess.footage.cuts import SCENES, Clip, Cut
from preprocess.footage.sources import FPS, Source
from preprocess.world import Json, Turn, one_each, places, seconds, shuffled, span, together

TURNS_BEYOND_SPANS = 3
BOXES = 2

Named = tuple[Cut, str]
"""A scene and the phrase that the question uses for it."""


def train_records(
    rng: np.random.Generator, video: str, clip: Clip, sources: Sequence[Source], size: int
) -> list[Json]:
    """Return the clip's one record: the span of every scene and some other questions, shuffled."""
    name = namer(rng, sources)
    spans = [ask_span((scene, name(scene))) for scene in clip.scenes]
    others = ask_others(rng, clip, sources, size)
    turns = spans + shuffled(rng, others)[:TURNS_BEYOND_SPANS]
    return [together(video, shuffled(rng, turns))]


def test_records(
    rng: np.random.Generator, video: str, clip: Clip, sources: Sequence[Source], size: int
) -> list[Json]:
    """Return one record per question, with phrases that training also uses."""
    name = namer(rng, sources)
    spans = [ask_span((scene, name(scene))) for scene in clip.scenes]
    return one_each(video, shuffled(rng, spans + ask_others(rng, clip, sources, size)))


def new_phrase_records(
    rng: np.random.Generator, video: str, clip: Clip, sources: Sequence[Source]
) -> list[Json]:
    """Return one record per question about times, with the phrases that only tests use."""
    named = [(scene, kept) for scene in clip.scenes if (kept := sources[scene.source].kept)]
    turns = [ask_span(each) for each in named]
    if len(named) > 1:
        turns.append(ask_first(rng, named))
    records = one_each(video, shuffled(rng, turns))
    return [record | {"id": f"{record['id']}-new"} for record in records]


def scene_rows(video: str, clip: Clip, sources: Sequence[Source]) -> list[Json]:
    """Return a row per scene with its phrases and span, for splicing records."""
    rows = []
    for number, scene in enumerate(clip.scenes):
        start, end = scene.span
        row: Json = {"id": f"{video.removesuffix('.mp4')}-scene{number}", "video": video}
        rows.append(row | {"start": start, "end": end, "phrase": sources[scene.source].phrases})
    return rows


def namer(rng: np.random.Generator, sources: Sequence[Source]) -> Callable[[Cut], str]:
    """Return a function that draws one of a scene's training phrases."""
    return lambda scene: str(rng.choice(sources[scene.source].phrases))


def ask_others(
    rng: np.random.Generator, clip: Clip, sources: Sequence[Source], size: int
) -> list[Turn]:
    """Return one or two questions of each other kind."""
    name = namer(rng, sources)
    named = [(scene, name(scene)) for scene in clip.scenes]
    turns = [ask_first(rng, named), ask_order(rng, named)]
    turns += [ask_seen(rng, scene, sources) for scene in shuffled(rng, clip.scenes)[:BOXES]]
    turns += [ask_box(rng, clip, size) for _ in range(BOXES)]
    if len(sources) > SCENES[0] + 1:  # with fewer, every clip has three scenes
        turns.append(Turn("count", "How many scenes does the video have?", str(len(named))))
    return turns


def ask_span(named: Named) -> Turn:
    scene, phrase = named
    return Turn("span", f"When does the video show {phrase}?", span(*scene.span))


def ask_first(rng: np.random.Generator, named: Sequence[Named]) -> Turn:
    # shuffled before they are named: else the answer would be the first name
    (a, one), (b, other) = shuffled(rng, named)[:2]
    answer = one if a.first < b.first else other
    return Turn("first", f"Which comes first, {one} or {other}?", answer)


def ask_order(rng: np.random.Generator, named: Sequence[Named]) -> Turn:
    """Ask for the order of all scenes, as letters of a multiple choice."""
    lettered = list(zip(string.ascii_uppercase, shuffled(rng, named), strict=False))
    options = [f"{letter}. {phrase}" for letter, (_, phrase) in lettered]
    question = "\n".join(["In which order does the video show these?", *options])
    in_order = sorted(lettered, key=lambda item: item[1][0].first)
    return Turn("order", question, ", ".join(letter for letter, _ in in_order))


def ask_seen(rng: np.random.Generator, scene: Cut, sources: Sequence[Source]) -> Turn:
    """Ask in the middle half of a scene, so that the sampled frames near it show the same scene."""
    frame = scene.first + int(rng.integers(scene.count // 4, scene.count - scene.count // 4))
    question = f"What does the video show at {seconds(frame / FPS)}?"
    # the first phrase, always: an answer is scored by its words
    return Turn("seen", question, sources[scene.source].phrases[0])


def ask_box(rng: np.random.Generator, clip: Clip, size: int) -> Turn:
    shown = clip.inset.cut
    frame = shown.first + int(rng.integers(0, shown.count))
    question = f"Give the box of the small picture at {seconds(frame / FPS)}."
    return Turn("box", question, places(clip.inset.box(frame, size)))
