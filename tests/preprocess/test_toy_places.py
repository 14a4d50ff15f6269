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
from preprocess.toy_places import BANKED, STEPS
from preprocess.toyworld import FPS, make_toyworld

QUESTION = re.compile(
    r"(?:<video>\n)?(?:Where is|Give the box of) the (\w+ \w+)(?: at <t:([\d.]+)>)?[?.]"
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("places") / "world"
    make_toyworld(out, train_clips=5, test_clips=3, seed=4)
    return out


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("step", STEPS)
def test_places_are_those_of_the_truth(world: Path, split: str, step: str) -> None:
    clips = {c["video"]: c for c in json.loads((world / "world.json").read_text())["clips"]}
    lines = (world / "places" / f"{split}-{step}.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert len({record["id"] for record in records}) == len(records)
    asked: dict[str, set[str]] = {}
    for record in records:
        (cut,) = record.get("timeline", [{"video": record.get("video")}])
        clip, at = clips[cut["video"]], 0.0
        if step == "still":
            times = np.asarray(uniform_indices(clip["frames"], BANKED)) / FPS
            (at,) = times[(times >= cut["start"]) & (times < cut["end"])].tolist()
        assert (len(record["conversations"]) == 2) == (split == "test")
        values = [turn["value"] for turn in record["conversations"]]
        for question, answer in zip(values[::2], values[1::2], strict=True):
            match = QUESTION.fullmatch(question)
            assert match, question
            name, stamp = match.groups()
            assert (stamp is not None) == (step == "moment")
            thing: dict[str, Any] = next(o for o in clip["objects"] if o["name"] == name)
            first, last = thing["frames"]
            frame = (first + last) // 2 if step == "clip" else round(FPS * float(stamp or at))
            assert first <= frame <= last
            truth = thing["boxes" if question.split("\n")[-1].startswith("Give") else "centres"]
            found = [float(number) for number in re.findall(r":([\d.]+)>", answer)]
            assert found == truth[frame - first]
            asked.setdefault(record["id"].split("/still")[0], set()).add(name)
    if step != "still" and split == "train":
        for record in records:
            assert asked[record["id"]] == {o["name"] for o in clips[record["video"]]["objects"]}
