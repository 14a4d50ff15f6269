"""Questions of place agree with the truth about their world, and stills are frames that are banked.

pytest tests/preprocess/test_toy_places.py
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.slow_fast import uniform_indices
from preprocess.toy_places import BANKED, SLIDES, STEPS
from preprocess.toyworld import FPS, make_toyworld

QUESTION = re.compile(
    r"(?:<video>\n)?(?:Where is|Give the box of) the (\w+ \w+)(?: at <t:([\d.]+)>)?[?.]"
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("places") / "world"
    make_toyworld(out, train_clips=5, test_clips=3, seed=4)
    return out


def banked_time(clip: dict[str, Any], cut: dict[str, Any]) -> float:
    """Return the time of the one banked frame in a cut."""
    times = np.asarray(uniform_indices(clip["frames"], BANKED)) / FPS
    (time,) = times[(times >= cut["start"]) & (times < cut["end"])].tolist()
    return float(time)


def share_with_time(step: str, split: str) -> float:
    """Return which share of a file's questions names a time."""
    if (step, split) == (
        "moment",
        "train",
    ):  # each object is asked for at two times, and without one
        return 2 / 3
    return float(step in (*SLIDES, "moment"))


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("step", STEPS)
def test_places_are_those_of_the_truth(world: Path, split: str, step: str) -> None:
    clips = {c["video"]: c for c in json.loads((world / "world.json").read_text())["clips"]}
    lines = (world / "places" / f"{split}-{step}.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert len({record["id"] for record in records}) == len(records)
    asked: dict[str, set[str]] = {}
    stamped: list[bool] = []
    for record in records:
        cuts = record.get("timeline", [{"video": record.get("video")}])
        clip, at = clips[cuts[0]["video"]], 0.0
        if step == "still":
            at = banked_time(clip, *cuts)
        assert (len(record["conversations"]) == 2) == (split == "test")
        values = [turn["value"] for turn in record["conversations"]]
        for question, answer in zip(values[::2], values[1::2], strict=True):
            match = QUESTION.fullmatch(question)
            assert match, question
            name, stamp = match.groups()
            stamped.append(stamp is not None)
            if step in SLIDES:
                # the slide that is shown at the time, and its frame's time in its clip
                ends = np.cumsum([cut["end"] - cut["start"] for cut in cuts])
                cut = cuts[int(np.searchsorted(ends, float(stamp), side="right"))]
                clip = clips[cut["video"]]
                stamp = str(banked_time(clip, cut))
            thing: dict[str, Any] = next(o for o in clip["objects"] if o["name"] == name)
            first, last = thing["frames"]
            middle = step in ("clip", "moment") and not stamp
            frame = (first + last) // 2 if middle else round(FPS * float(stamp or at))
            assert first <= frame <= last
            truth = thing["boxes" if question.split("\n")[-1].startswith("Give") else "centres"]
            found = [float(number) for number in re.findall(r":([\d.]+)>", answer)]
            assert found == truth[frame - first]
            asked.setdefault(record["id"].split("/still")[0], set()).add(name)
        if step in SLIDES and split == "train":
            assert len(values) == 2 * len(cuts)
    assert np.mean(stamped) == pytest.approx(share_with_time(step, split))
    if step in ("clip", "moment") and split == "train":
        for record in records:
            assert asked[record["id"]] == {o["name"] for o in clips[record["video"]]["objects"]}
