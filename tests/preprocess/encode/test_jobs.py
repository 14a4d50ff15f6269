"""Clips that are decoded before the tower is there are those that it would have asked for, or dropped.

pytest tests/preprocess/encode/test_jobs.py
"""

import json
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import (
    AutoImageProcessor,
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    Qwen2VLImageProcessorPil,
    SiglipImageProcessorPil,
    ViTImageProcessorPil,
)

from model.tower.pixels import FITS, Pixels
from model.tower.tower import Tower
from preprocess.decode.archive import Unpacker
from preprocess.decode.source import Outcome
from preprocess.encode.features import EncodeOptions
from preprocess.encode.jobs import FORETOLD, PARTS_AHEAD, first_jobs, jobs_of, likely_pixels
from preprocess.encode.pipeline.decoders import Begun, Decoders, Job
from preprocess.encode.run import encode
from preprocess.sources.find import find_clips
from shards.errors import UserError
from shards.format.features import Sampling
from shards.format.plan import ClipSource
from tests.params import few

TOGETHER = 16
PROCESSORS = [
    SiglipImageProcessorPil(),
    SiglipImageProcessorPil(size={"height": 384, "width": 384}, image_mean=[0.1, 0.2, 0.3]),
    CLIPImageProcessorPil(),
    CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}),
    BitImageProcessorPil(size={"shortest_edge": 256}, do_normalize=False),
    ViTImageProcessorPil(do_rescale=False, resample=3),
    Qwen2VLImageProcessorPil(),
]
TOLD_NOTHING = {
    "nothing": "",
    "no JSON": "{",
    "a list": "[]",
    "an old size": '{"size": 224, "resample": 3}',
    "no steps": "{}",
    "no resizing": '{"do_resize": false, "size": {"height": 4, "width": 4}}',
}
DIFFERENT: dict[str, Callable[[list[Job]], list[Job]]] = {
    "the same": lambda jobs: jobs,
    "fewer": lambda jobs: jobs[:2],
    "the other way round": lambda jobs: jobs[::-1],
    "another first": lambda jobs: [jobs[1], *jobs[1:]],
    "another last": lambda jobs: [*jobs[:-1], jobs[0]],
    "other frames": lambda jobs: [
        (clip, replace(request, sampling=Sampling(num_frames=3))) for clip, request in jobs
    ],
    "another size": lambda jobs: [(clip, replace(request, pixels=None)) for clip, request in jobs],
    "none": lambda jobs: [],
}


@pytest.fixture(scope="module")
def clips(toy: Path) -> list[ClipSource]:
    return find_clips([str(toy / "videos")]).clips


@pytest.mark.parametrize("fit", [None, *FITS])
@pytest.mark.parametrize("place", range(len(PROCESSORS)))
def test_a_processor_is_foretold_by_its_file(place: int, fit: str | None, tmp_path: Path) -> None:
    PROCESSORS[place].save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    expected: Pixels | None = Pixels.from_processor(loaded)
    assert expected
    try:
        expected = expected.fitted(fit) if fit else expected
    except UserError:
        expected = None
    options = EncodeOptions(str(tmp_path), (4,), Sampling(num_frames=8), fit=fit)
    assert likely_pixels(options) == expected


@pytest.mark.parametrize("what", TOLD_NOTHING)
def test_where_a_file_does_not_say_it_nothing_is_begun(
    what: str, clips: list[ClipSource], tmp_path: Path
) -> None:
    (tmp_path / "preprocessor_config.json").write_text(TOLD_NOTHING[what])
    options = EncodeOptions(str(tmp_path), (4,), Sampling(num_frames=8))
    assert first_jobs(clips, options) == []
    for name in (str(tmp_path / "missing"), "owner/never-downloaded"):
        assert first_jobs(clips, replace(options, tower=name)) == []


def told(events: Sequence[tuple[ClipSource, Any]]) -> list[tuple[str, object]]:
    """What events say, without the seconds that reading took."""
    return [
        (
            clip.key,
            event.tobytes()
            if isinstance(event, np.ndarray)
            else repr(replace(event, seconds=0.0) if isinstance(event, Outcome) else event),
        )
        for clip, event in events
    ]


@pytest.mark.parametrize(("count", "together"), few([(2, TOGETHER), (1, 5)], 2))
@pytest.mark.parametrize("what", DIFFERENT)
def test_events_are_those_of_the_jobs_whatever_was_begun(
    what: str,
    count: int,
    together: int,
    tower: Tower,
    toy_options: EncodeOptions,
    clips: list[ClipSource],
    tmp_path: Path,
) -> None:
    jobs = jobs_of(clips, toy_options, tower.pixels)
    with Decoders(count, Unpacker(tmp_path)) as decoders:
        expected = told(list(decoders.events(jobs, TOGETHER)))
        decoders.begin(DIFFERENT[what](jobs), together)
        assert told(list(decoders.events(jobs, TOGETHER))) == expected
        # the unit is shorter than what was begun, and the next one follows
        decoders.begin(DIFFERENT[what](jobs), together)
        first, others = jobs[:3], jobs[3:]
        found = told(list(decoders.events(first, TOGETHER)))
        assert found + told(list(decoders.events(others, TOGETHER))) == expected


def test_a_new_bank_takes_what_was_begun(
    toy: Path, toy_options: EncodeOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[bool] = []
    serves = Begun.serves

    def seen(self: Begun, jobs: Sequence[Job], together: int) -> bool:
        served.append(serves(self, jobs, together))
        return served[-1]

    monkeypatch.setattr(Begun, "serves", seen)
    assert encode([str(toy / "videos")], tmp_path / "bank", toy_options).clips == 9
    assert served == [True]
    # what is foretold wrongly costs its decoding, and nothing else
    folder = tmp_path / "tower"
    folder.mkdir()
    for file in (toy / "tower").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    file = folder / "preprocessor_config.json"
    written = json.loads(file.read_text())
    likely = written | {"size": {"height": 8, "width": 8}}
    monkeypatch.setattr("preprocess.encode.jobs.PROCESSOR_FILE", "likely.json")
    (folder / "likely.json").write_text(json.dumps(likely))
    other = tmp_path / "other"
    assert encode([str(toy / "videos")], other, replace(toy_options, tower=str(folder))).clips == 9
    assert served == [True, False]
    tars = [next((bank / "shards").glob("*.tar")) for bank in (tmp_path / "bank", other)]
    assert tars[0].read_bytes() == tars[1].read_bytes()


def test_it_is_decoded_before_anybody_asks(
    tower: Tower, toy_options: EncodeOptions, clips: list[ClipSource], tmp_path: Path
) -> None:
    jobs = jobs_of(clips, toy_options, tower.pixels)
    with Decoders(2, Unpacker(tmp_path)) as decoders:
        decoders.begin(jobs, TOGETHER)
        deadline = time.monotonic() + 60
        while not all(reader.child.pid for reader in decoders.readers):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    # closed without having been asked: nobody is left
    assert not any(reader.child.pid for reader in decoders.readers)
    with Decoders(1, Unpacker(tmp_path)) as decoders:
        decoders.begin(jobs, TOGETHER)
        with closing(decoders.events(jobs, TOGETHER)) as events:
            next(events)
    assert not any(reader.child.pid for reader in decoders.readers)


def test_members_of_archives_are_not_begun_and_no_more_than_enough(
    toy_options: EncodeOptions, clips: list[ClipSource]
) -> None:
    plain, member = clips[0], replace(clips[1], offset=512, nbytes=10)
    assert [job[0] for job in first_jobs([plain, member, plain], toy_options)] == [plain]
    many = first_jobs([plain] * (2 * FORETOLD), toy_options)
    assert len(many) == FORETOLD
    assert len(many[0][1].next_parts) == PARTS_AHEAD
