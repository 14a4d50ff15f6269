"""What was read before is found by a run that would find the same: of that file, settings, bank and code.

pytest tests/train/data/test_known.py
"""

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shards.annotations.forms import FORMS
from shards.errors import UserError
from shards.read.banks import Banks
from train.batches.measure import measure
from train.data import reading
from train.data.dataset import Dataset, open_dataset
from train.data.known import facts
from train.data.known.facts import LazyRecords
from train.data.mixtures import MixturePart
from train.settings.config import DataSettings, TrainConfig

CLIPS = ("a.mp4", "b.mp4", "sub/c.mp4")


def row(id_: str, *texts: str, video: object = "a.mp4", **more: Any) -> dict[str, Any]:
    turns = [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(texts)]
    return {"id": id_, "video": video, "conversations": turns} | more


SOUND = [
    row("plain", "Who is it?", "she"),
    row("two", "<video>\nWhen?", "from <t:0.1> to <t:0.5>", "And where?", "<x:0.3><y:0.4>"),
    row("share", "<video>When?", "at <t:50%>", video="b.mp4"),
    row("joined", "One", "a", video=["a.mp4", "sub/c.mp4"]),
    {"id": 7, "video": "b.mp4", "question": "Which?", "options": ["x", "y"], "answer": "B"},
    row("system", "Who?", "he", system="Be brief.", fps=3),
    row("é 漢字", "<video>\nWas\u2028ist <t:0.25>?", "née \\<video>", video="sub/c.mp4"),
]
BAD = [
    row("backwards", "<video>?", "from <t:0.5> to <t:0.1>"),
    row("late", "<video>?", "from <t:0.5> to <t:7>"),
    row("mute", "<video>?", " "),
    row("unknown", "<video>?", "x", video="nowhere.mp4"),
    row("lost", "<video>?", "x", video="q.mp4"),
    row("after", "Who <video>?", "x", "and?", "y"),
]


@dataclass
class World:
    folder: Path
    bank: Path

    def file(self, rows: list[dict[str, Any]], name: str = "r.jsonl", more: str = "") -> str:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True, parents=True)
        text = "".join(json.dumps(row) + "\n" for row in rows) + more
        if ".jsonl" not in name:
            text = json.dumps(rows)
        if name.endswith(".gz"):
            path.write_bytes(gzip.compress(text.encode()))
        else:
            path.write_text(text)
        return str(path)

    def config(self, *paths: str, **changes: Any) -> TrainConfig:
        return TrainConfig(**({"bank": [str(self.bank)], "data_path": list(paths)} | changes))


@pytest.fixture
def world(make_bank: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(facts, "WORTH_KEEPING", 1)
    arrays = {4: np.zeros((8, 2, 2, 5), np.float16), 8: np.zeros((8, 1, 1, 5), np.float16)}
    clips = dict.fromkeys(CLIPS, arrays)
    return World(tmp_path, make_bank(tmp_path / "bank", clips, quarantined=("q.mp4",)))


def is_known(dataset: Dataset) -> bool:
    return all(isinstance(file.records, LazyRecords) for file in dataset.files)


def seen(dataset: Dataset) -> list[object]:
    """Return all that a run sees of its records."""
    return [
        [[*file.records] for file in dataset.files],
        [[record.places for record in file.records] for file in dataset.files],
        [[media.clips for media in facts.media_of(file.records)] for file in dataset.files],
        [facts.texts_digest(file.path, file.records) for file in dataset.files],
        [(file.digest, file.has_dialogues, file.count) for file in dataset.files],
        *(dataset.drops, dataset.dropped, dataset.notes, dataset.warnings, dataset.turns),
    ]


def places(dataset: Dataset) -> list[object]:
    """Return the same without the banks, which are objects of their own for each dataset."""
    every = seen(dataset)
    rows = [[[place.row for place in record.places] for record in file.records]  # type: ignore[union-attr]
            for file in dataset.files]  # fmt: skip
    return [every[0], rows, *every[2:]]


LENIENT = {"on_bad_record": "drop", "missing": "drop", "bad_record_limit": "100%"}
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "lines": ("r.jsonl", {}),
    "list": ("r.json", {}),
    "packed": ("r.jsonl.gz", {}),
    "independent": ("r.jsonl", {"turns": "independent"}),
    "clipped": ("r.jsonl", {"times_past_end": "clip"}),
    "folder": ("all/one.jsonl", {}),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_is_known_is_what_reading_finds(world: World, way: str) -> None:
    name, changes = WAYS[way]
    path = world.file(
        [*SOUND, *BAD, *SOUND[::-1]], name, more='\ufeff{"id": 1, "vid' * ("l" in name[-1])
    )
    if way == "folder":
        world.file(SOUND[:2], "all/two.jsonl")
        path = str(Path(path).parent)
    config = world.config(path, **LENIENT, **changes)
    first = open_dataset(config)
    second = open_dataset(config)
    assert not is_known(first)
    assert is_known(second)
    assert places(second) == places(first)
    assert first.drops
    records = second.files[0].records
    assert records[-1] == records[len(records) - 1] == first.records[-1]
    assert records[1:3] == first.records[1:3]
    with pytest.raises(IndexError):
        records[len(records)]


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Lets so many processes read every file, two rows at a time."""

    def divide(cores: int) -> None:
        monkeypatch.setattr(reading, "WORTH_DIVIDING", 1)
        monkeypatch.setattr(reading, "PART", 2)
        monkeypatch.setattr(reading, "cores", lambda: cores)

    return divide


def kept_facts(world: World) -> dict[str, bytes]:
    """Return what is kept, and forget it."""
    folder = world.folder / "cache" / "framebank-records"
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    for file in folder.iterdir():
        file.unlink()
    return files


@pytest.mark.parametrize("way", WAYS)
def test_what_several_processes_read_is_what_one_reads(
    world: World, in_parts: Callable[[int], None], way: str
) -> None:
    name, changes = WAYS[way]
    path = world.file([*BAD[:4], *SOUND, *BAD, *SOUND[::-1]], name)
    config = world.config(path, **LENIENT, **changes)
    one = open_dataset(config)
    kept = kept_facts(world)
    in_parts(reading.FEWEST)
    several = open_dataset(config)
    assert (is_known(one), is_known(several)) == (False, True)
    assert places(several) == places(one)
    faults = [
        drop for drop in one.drops if drop.reason not in ("clip in no bank", "clip in quarantine")
    ]
    assert faults == sorted(faults, key=lambda drop: (drop.file, int(drop.row.strip("[]"))))
    assert kept_facts(world) == kept


@pytest.mark.parametrize(
    "rows", [[*SOUND, *BAD], [*SOUND, row("t", "<video>?", "x", video="z.mp4")]]
)
def test_what_one_refuses_several_refuse_in_the_same_words(
    world: World, in_parts: Callable[[int], None], rows: list[dict[str, Any]]
) -> None:
    config = world.config(world.file(rows, more="{"))
    words = []
    for _ in range(2):
        with pytest.raises(UserError) as stop:
            open_dataset(config)
        words.append(str(stop.value))
        in_parts(reading.FEWEST)
    assert words[0] == words[1]


def test_one_process_reads_what_several_cannot(
    world: World, in_parts: Callable[[int], None]
) -> None:
    in_parts(reading.FEWEST)
    timeline = [{"video": "a.mp4", "start": 0, "end": 0.5}, {"video": "b.mp4"}]
    one = row("spliced", "<video>When?", "at <t:0.2>") | {"timeline": timeline}
    del one["video"]
    assert open_dataset(world.config(world.file([*SOUND, one]))).count == len(SOUND) + 1
    few = open_dataset(world.config(world.file(SOUND[:2], "few.jsonl")))
    assert (few.count, is_known(few)) == (2, False)


def test_a_choice_of_rows_is_known_by_itself(world: World) -> None:
    path = world.file(SOUND * 3)
    every = {}
    for share in ("all", "first:5", "end:5", "random:5", "50%"):
        mixture = world.folder / "m.yaml"
        entry = {"json_path": path, "sampling_strategy": share}
        mixture.write_text(json.dumps({"datasets": [entry]}))
        config = world.config(data_config=str(mixture))
        first, second = open_dataset(config), open_dataset(config)
        assert not is_known(first), share
        assert is_known(second), share
        assert places(second) == places(first)
        every[share] = [record.where for record in second.records]
    assert len({tuple(own) for own in every.values()}) == len(every)


def test_records_with_a_timeline_are_read_each_time(world: World) -> None:
    timeline = [{"video": "a.mp4", "start": 0, "end": 0.5}, {"video": "b.mp4"}]
    one = row("spliced", "<video>When?", "at <t:0.2>")
    del one["video"]
    config = world.config(world.file([*SOUND, one | {"timeline": timeline}]))
    first, second = open_dataset(config), open_dataset(config)
    assert not is_known(second)
    assert places_of_all(first) == places_of_all(second)


def test_a_timeline_without_a_frame_is_read_again_where_there_may_be_one(
    world: World, make_bank: Callable[..., Path]
) -> None:
    """Which frames are banked is no part of the key: it is of no use for any other record."""
    timeline = [{"video": "a.mp4", "start": 0.03, "end": 0.1}]
    one = row("between", "<video>What?", "nothing") | {"timeline": timeline}
    del one["video"]
    config = world.config(world.file([*SOUND, one]), **LENIENT)
    for _ in range(2):
        assert [drop.id for drop in open_dataset(config).drops] == ["between"]
    finer = replace(config, bank=[str(finely(world, make_bank))])
    assert open_dataset(finer).drops == ()


def finely(world: World, make_bank: Callable[..., Path]) -> Path:
    """Write the bank of the same clips with twice the frames."""
    arrays = {4: np.zeros((16, 2, 2, 5), np.float16), 8: np.zeros((16, 1, 1, 5), np.float16)}
    meta = {"end": 1.0, "timestamps": [k / 16 for k in range(16)]}
    return make_bank(
        world.folder / "fine", dict.fromkeys(CLIPS, arrays), quarantined=("q.mp4",), meta=meta
    )


def places_of_all(dataset: Dataset) -> list[object]:
    return [(record, len(record.places)) for record in dataset.records]


def test_what_was_refused_is_refused_again(world: World) -> None:
    config = world.config(world.file([*SOUND, *BAD]))
    words = []
    for _ in range(2):
        with pytest.raises(UserError) as stop:
            open_dataset(config)
        words.append(stop.value.problems)
    assert words[0] == words[1]


# -- all that decides what is read decides where it is looked up


def other_bank(world: World, make_bank: Callable[..., Path], **changes: Any) -> TrainConfig:
    arrays = {4: np.zeros((8, 2, 2, 5), np.float16), 8: np.zeros((8, 1, 1, 5), np.float16)}
    clips = changes.pop("clips", CLIPS)
    bank = make_bank(world.folder / "other", dict.fromkeys(clips, arrays), **changes)
    return replace(world.config(str(world.folder / "r.jsonl"), **LENIENT), bank=[str(bank)])


@pytest.mark.parametrize(
    "changes",
    [
        {"quarantined": ("q.mp4", "nowhere.mp4")},
        {"quarantined": ()},
        {"clips": (*CLIPS, "nowhere.mp4")},
        {"clips": CLIPS[:2]},
        {"clips": CLIPS[::-1]},
        {"meta": {"start": 0.0, "end": 0.3}},
    ],
    ids=str,
)
def test_another_bank_is_another_key(
    world: World, make_bank: Callable[..., Path], changes: dict[str, Any]
) -> None:
    config = world.config(world.file([*SOUND, *BAD]), **LENIENT)
    open_dataset(config)
    assert is_known(open_dataset(config))
    other = other_bank(world, make_bank, **changes)
    assert not is_known(open_dataset(other))
    known = open_dataset(other)
    assert is_known(known)
    assert known.banks.banks[0].where == other.bank[0]


VALUES: dict[str, Any] = {
    **{"unsupervised": "drop", "times_past_end": "clip", "ignore_fields": ["fps"]},
    **{
        "missing": "error",
        "on_bad_record": "refuse",
        "bad_record_limit": "99%",
        "allow_outside": True,
    },
}


@pytest.mark.parametrize(
    "name", [item.name for item in fields(DataSettings) if item.name not in reading.ELSEWHERE]
)
def test_each_setting_of_reading_is_in_the_key(world: World, name: str) -> None:
    config = world.config(world.file(SOUND), **LENIENT)
    open_dataset(config)
    changed = replace(config, **{name: VALUES[name]})
    assert getattr(changed, name) != getattr(config, name)
    assert is_known(open_dataset(config))
    assert not is_known(open_dataset(changed))


def test_settings_out_of_the_key_decide_nothing_that_the_key_lacks(world: World) -> None:
    path = world.file(SOUND)
    banks = Banks.open([world.bank])
    part = MixturePart([path], [], 1)

    def key(**changes: Any) -> str | None:
        own: dict[str, Any] = {"settings": DataSettings(), "part": part, "independent": False}
        return reading.Manner(banks=banks, **(own | changes)).key(path, "digest")

    first = key()
    assert first == key(settings=DataSettings(bank=["x"], turns="independent", eval_path=["y"]))
    folders = replace(part.folders, media_dir="sub")
    others = [
        *(key(independent=True), key(part=replace(part, folders=folders))),
        key(part=replace(part, folders=replace(part.folders, strip_prefix=("sub",)))),
    ]
    assert len({first, *others}) == 4


@pytest.mark.parametrize("change", ["text", "moved", "name", "code", "version", "form"])
def test_another_file_or_code_is_another_key(
    world: World, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    path = world.file(SOUND)
    config = world.config(path)
    open_dataset(config)
    assert is_known(open_dataset(config))
    if change == "text":  # of equal length
        Path(path).write_text(Path(path).read_text().replace("she", "her"))
    elif change in ("moved", "name"):
        names = {"moved": "sub/r.jsonl", "name": "s.jsonl"}
        config = replace(config, data_path=[world.file(SOUND, names[change])])
    elif change == "code":
        monkeypatch.setattr(reading, "code_digest", lambda *_: "other")
    elif change == "version":
        monkeypatch.setattr(reading, "versions", lambda *_: ["4.0"])
    else:
        monkeypatch.setitem(FORMS, "poem", lambda own, media: [])  # a user's own
    dataset = open_dataset(config)
    assert not is_known(dataset)
    if change == "text":
        assert dataset.records[0].turns[1].text == "her"
    assert is_known(open_dataset(config)) == (change != "form")


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_damaged_facts_are_found_anew(world: World, damage: str) -> None:
    config = world.config(world.file(SOUND))
    first = open_dataset(config)
    (file,) = (world.folder / "cache" / "framebank-records").iterdir()
    whole = file.read_bytes()
    damaged = {"cut": whole[:-8], "empty": b"", "flip": bytes([whole[0] ^ 1]) + whole[1:]}
    file.write_bytes(damaged[damage])
    second = open_dataset(config)
    assert not is_known(second)
    assert places(first) == places(second)
    assert file.read_bytes() == whole
    assert is_known(open_dataset(config))


def test_a_file_that_changes_while_it_is_read_is_not_kept(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = world.config(world.file(SOUND))
    rows_of = reading.rows_of

    def changed(path: str, *args: Any) -> object:
        with open(path, "a") as file:
            file.write(json.dumps(SOUND[0]) + "\n")
        return rows_of(path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(reading, "rows_of", changed)
        assert open_dataset(config).count == len(SOUND) + 1
    assert not (world.folder / "cache" / "framebank-records").exists()
    world.file(SOUND)
    assert not is_known(open_dataset(config))
    assert is_known(open_dataset(config))


def test_lengths_of_known_records_are_those_of_read_ones(
    toy_config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(facts, "WORTH_KEEPING", 1)

    def found(config: TrainConfig) -> list[Any]:
        dataset = open_dataset(config)
        lengths = measure(config, dataset, config.stage_path, "digest")
        stamps = lengths.stamps(np.full(len(lengths.text), 3)).tolist()
        return [is_known(dataset), lengths.text.tolist(), lengths.clips.digest, stamps]

    for changes in ({}, {"turns": "independent"}):
        config = replace(toy_config, **changes, frame_time="seconds")  # type: ignore[arg-type]
        first, second = found(config), found(config)
        assert (first[0], second[0]) == (False, True)
        assert first[1:] == second[1:]
