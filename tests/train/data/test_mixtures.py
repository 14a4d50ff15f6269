"""Mixtures: names, repeats and shares of three ecosystems' YAML, and what is wrong with one."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from shards.annotations.selection import ALL, Selection
from shards.errors import UserError
from train.data.dataset import file_digest, open_dataset
from train.data.mixtures import MixturePart, read_mixture
from train.settings.config import TrainConfig
from train.settings.folders import Folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a", "b", "c"):
        rows = [
            {
                "id": f"{name}{k}",
                "conversations": [
                    {"from": "human", "value": "?"},
                    {"from": "gpt", "value": "!"},
                ],
            }
            for k in range(20)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def mixed(folder: Path, mixture: str, content: Any) -> tuple[list[MixturePart], list[str]]:
    path = folder / "mix.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    problems: list[str] = []
    return read_mixture(str(path), mixture, problems), problems


def names(parts: list[MixturePart]) -> list[tuple[str, int]]:
    return [(Path(path).stem, part.repeats) for part in parts for path in part.records]


OURS = {
    "a": {"records": "a.jsonl", "banks": "bank"},
    "b": {"records": ["b.jsonl", "c.jsonl"]},
    "both": ["a", "b*2"],
    "twice": "both+c2",
    "c2": {"records": "c.jsonl", "seed": 5},
}


def test_terms_repeat_share_and_stand_for_others(folder: Path) -> None:
    parts, problems = mixed(folder, "a*3", OURS)
    assert problems == []
    assert parts == [MixturePart([str(folder / "a.jsonl")], [str(folder / "bank")], 3, ALL)]
    assert names(mixed(folder, "twice + a@0.1*2", OURS)[0]) == [
        *(("a", 1), ("b", 2), ("c", 2), ("c", 1), ("a", 2))
    ]
    (part,) = mixed(folder, "c2@0.1*2", OURS)[0]
    assert (part.repeats, part.chosen) == (2, Selection.parse("random:10%", seed=5))
    assert len(part.chosen.of(30)) == 3


def test_an_empty_mixture_takes_each_dataset_once(folder: Path) -> None:
    plain = {name: OURS[name] for name in ("b", "a")}
    assert names(mixed(folder, "", plain)[0]) == [("b", 1), ("c", 1), ("a", 1)]


def test_a_mixture_of_llava_next_is_read(folder: Path) -> None:
    content = {
        "datasets": [
            {"json_path": "a.jsonl", "sampling_strategy": "all"},
            {"json_path": "b.jsonl", "sampling_strategy": "first:10%"},
            {"json_path": "{a,c}.jsonl", "sampling_strategy": "random:3", "seed": 2},
            {"json_path": "c.jsonl", "sampling_strategy": "50%"},
        ]
    }
    parts, problems = mixed(folder, "", content)
    assert problems == []
    assert names(parts) == [("a", 1), ("b", 1), ("a", 1), ("c", 1), ("c", 1)]
    assert [len(part.chosen.of(20)) for part in parts] == [20, 2, 3, 10]
    assert parts[2].chosen.seed == 2


def test_registries_of_vila_and_lmms_engine_are_read(folder: Path) -> None:
    vila = {
        "a": {"_target_": "llava.data.LLaVADataset", "data_path": "a.jsonl", "media_dir": "/x"},
        "b": {"data_path": "b.jsonl"},
    }
    assert names(mixed(folder, "a+b*2", vila)[0]) == [("a", 1), ("b", 2)]
    lmms = {"datasets": [{"path": "a.jsonl", "data_folder": "/x", "data_type": "json"}]}
    assert names(mixed(folder, "", lmms)[0]) == [("a", 1)]


def test_variables_of_the_environment_stand_in_paths(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path that begins with one is relative to the working folder, as on a command line."""
    content = {
        "a": {"records": "${DATA}/{a,b}.jsonl", "banks": "${DATA}/bank", "media_dir": "${NAME}/x"},
        "c": {"records": "./${NAME}.jsonl"},
    }
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("DATA", folder.name)
    monkeypatch.setenv("NAME", "c")
    (first, second), problems = mixed(folder, "", content)
    assert problems == []
    assert first.records == [f"{folder.name}/a.jsonl", f"{folder.name}/b.jsonl"]
    assert (first.banks, first.folders.media_dir) == ([f"{folder.name}/bank"], "c/x")
    assert second.records == [str(folder / "c.jsonl")]
    monkeypatch.delenv("DATA")
    _, (line,) = mixed(folder, "", content)
    said = "a: ${DATA}: no such variable in the environment; set it"
    assert line == f"data_config {folder / 'mix.yaml'}: {said}"


def test_paths_of_other_trainers_are_also_looked_for_where_one_works(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "yaml").mkdir()
    monkeypatch.chdir(folder)
    path = folder / "yaml" / "stage1_data.yaml"
    entry = {"json_path": "a.jsonl", "data_folder": "videos", "source": "webvid"}
    path.write_text(yaml.safe_dump({"datasets": [entry]}))
    problems: list[str] = []
    (part,) = read_mixture(str(path), "", problems)
    assert problems == []
    assert (part.records, part.folders.media_dir) == (["a.jsonl"], "videos")
    (folder / "yaml" / "a.jsonl").write_text((folder / "b.jsonl").read_text())
    (part,) = read_mixture(str(path), "", problems)
    assert part.records == [str(folder / "yaml" / "a.jsonl")]  # beside the YAML wins
    path.write_text(yaml.safe_dump({"b": {"records": "b.jsonl"}}))
    read_mixture(str(path), "", problems)
    assert "no such file" in problems[0]  # ours are relative to the YAML alone


def test_hub_names_stay_as_they_are(folder: Path) -> None:
    (part,), problems = mixed(folder, "", {"x": {"records": "lmms-lab/LLaVA-Video-178K:0_30_s"}})
    assert (part.records, problems) == (["lmms-lab/LLaVA-Video-178K:0_30_s"], [])


LOOP = {"a": ["b"], "b": "a+c"}
BAD: list[tuple[str, Any, str]] = [
    ("a*x", OURS, "'a*x': repeat by a positive integer"),
    ("a*0", OURS, "'a*0': repeat by a positive integer"),
    ("a@2", OURS, "@2: take a share above 0, at most 1"),
    ("a@0", OURS, "@0: take a share above 0"),
    ("d", OURS, "no dataset 'd' in"),
    ("a", LOOP, "a -> b -> a never ends"),
    ("", {"a": {"banks": "x"}}, "a needs `records`"),
    ("", {"a": 3}, "a needs `records`"),
    ("", {"a": {"records": "a.jsonl", "json_path": "b"}}, "has both records and json_path"),
    ("", {"a": {"records": "a.jsonl", "reapeats": 2}}, "unknown reapeats (known: records"),
    ("", {"a": {"records": "none.jsonl"}}, "a: no such file"),
    ("", {"a": {"records": "a.jsonl", "seed": "x"}}, "seed must be an integer"),
    ("", {"datasets": [{"json_path": "a.jsonl", "sampling_strategy": "some"}]}, "datasets[0]: sam"),
    ("a@0.5", {"a": {"records": "a.jsonl", "sampling_strategy": "all"}}, "keep one"),
    ("a", {"datasets": [{"json_path": "a.jsonl"}]}, "datasets without names; leave it out"),
    ("", ["a"], "expected `name: {records"),
]


@pytest.mark.parametrize(("mixture", "content", "expected"), BAD)
def test_what_is_wrong_with_a_mixture_is_named(
    folder: Path, mixture: str, content: Any, expected: str
) -> None:
    _, problems = mixed(folder, mixture, content)
    assert any(expected in line for line in problems), problems
    assert all(line.startswith(("data_mixture", "data_config")) for line in problems)


def test_all_problems_of_a_mixture_come_together(folder: Path) -> None:
    content = {"a": {"records": "x.jsonl"}, "b": {"banks": []}}
    assert len(mixed(folder, "a+b+c+a*0", content)[1]) == 4


def test_yaml_makes_no_objects(folder: Path) -> None:
    path = folder / "mix.yaml"
    path.write_text("a: !!python/object/apply:os.system ['true']\n")
    problems: list[str] = []
    assert read_mixture(str(path), "", problems) == []
    assert "could not determine a constructor" in problems[0]


def test_a_run_draws_what_its_mixture_chose(folder: Path, make_bank: Callable[..., Path]) -> None:
    arrays = {4: np.zeros((8, 2, 2, 5), np.float16), 8: np.zeros((8, 1, 1, 5), np.float16)}
    bank = make_bank(folder / "bank", {"v.mp4": arrays})
    path = folder / "llava.yaml"
    entries = [
        {"json_path": "a.jsonl", "sampling_strategy": "first:2"},
        {"json_path": "b.jsonl", "sampling_strategy": "random:3"},
    ]
    path.write_text(yaml.safe_dump({"datasets": entries}))
    dataset = open_dataset(TrainConfig(bank=[str(bank)], data_path=[str(path)]))
    ids = [record.id for record in dataset.records]
    assert ids[:2] == ["a0", "a1"]
    assert ids[2:] == [f"b{k}" for k in Selection.parse("random:3").of(20)]
    # rows that are not chosen are not looked at
    (folder / "a.jsonl").write_text((folder / "a.jsonl").read_text() + "not json\n")
    assert len(open_dataset(TrainConfig(bank=[str(bank)], data_path=[str(path)])).records) == 5


def test_an_absolute_path_is_joined_only_where_it_may_be(
    folder: Path, make_bank: Callable[..., Path]
) -> None:
    arrays = {4: np.zeros((8, 2, 2, 5), np.float16), 8: np.zeros((8, 1, 1, 5), np.float16)}
    bank = make_bank(folder / "bank", {"/videos/v.mp4": arrays})
    row = json.loads((folder / "a.jsonl").read_text().splitlines()[0])
    row["video"] = "/videos/v.mp4"
    row["conversations"][0]["value"] = "<video>?"
    path = folder / "absolute.jsonl"
    path.write_text(json.dumps(row))
    config = TrainConfig(bank=[str(bank)], data_path=[str(path)])
    with pytest.raises(UserError, match=r"'/videos/v\.mp4' leads out of its root"):
        open_dataset(config)
    assert len(open_dataset(replace(config, allow_outside=True)).records) == 1


def test_a_digest_tells_choices_and_contents_apart(folder: Path) -> None:
    file = str(folder / "a.jsonl")
    choices = [ALL, Selection.parse("first:3"), Selection.parse("25%"), Selection.parse("25%", 1)]
    digests = {file_digest(file, chosen) for chosen in choices}
    assert len(digests) == 4
    assert file_digest(str(folder / "b.jsonl")) not in digests
    assert file_digest(str(folder / "none")) == file_digest(str(folder / "nor this"))


# -- globs, second names, files that are there twice


@pytest.fixture
def sets(folder: Path, make_bank: Callable[..., Path]) -> Callable[..., list[str]]:
    """A function that returns the ids of a run's records, with its notes after them."""
    arrays = {4: np.zeros((8, 2, 2, 5), np.float16), 8: np.zeros((8, 1, 1, 5), np.float16)}
    bank = make_bank(folder / "bank", {"v.mp4": arrays})

    def taken(content: Any = None, **settings: Any) -> list[str]:
        if content is not None:
            (folder / "mix.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
            settings["data_config"] = str(folder / "mix.yaml")
        # with it a note would say that no answer has a coordinate
        settings["enable_lape"] = False
        dataset = open_dataset(TrainConfig(bank=[str(bank)], **settings))
        return [*(record.id for record in dataset.records), *dataset.notes]

    return taken


def refused(taken: Callable[..., list[str]], *content: Any, **settings: Any) -> list[str]:
    with pytest.raises(UserError) as stop:
        taken(*content, **settings)
    return stop.value.problems


def test_a_pattern_takes_the_files_that_match_in_the_order_of_their_names(
    folder: Path, sets: Callable[..., list[str]]
) -> None:
    (folder / "y" / "two").mkdir(parents=True)
    for place, name in (("y/two/c", "c"), ("y/b", "b"), ("y/B", "b"), ("y/.hidden", "a")):
        (folder / f"{place}.jsonl").write_text((folder / f"{name}.jsonl").read_text())
    (folder / "y" / "notes.txt").write_text("no record")
    flat = sets(data_path=[str(folder / "?.jsonl")])
    assert flat == sets(data_path=[str(folder / f"{name}.jsonl") for name in "abc"])
    deep = sets(data_path=[str(folder / "y" / "**" / "*.jsonl")])
    assert [deep[0], deep[20], deep[40], len(deep)] == ["b0", "b0", "c0", 60]
    assert sets({"x": {"records": "y/**/*.jsonl"}}) == deep
    assert sets({"datasets": [{"json_path": "{a,y/tw*/c}.jsonl"}]})[::20] == ["a0", "c0"]
    # a file of that very name is no pattern
    (folder / "[ab].jsonl").write_text((folder / "c.jsonl").read_text())
    assert sets(data_path=[str(folder / "[ab].jsonl")])[0] == "c0"


def test_a_pattern_that_matches_nothing_says_what_there_is(
    folder: Path, sets: Callable[..., list[str]]
) -> None:
    (line,) = refused(sets, data_path=[str(folder / "*.parquet")])
    assert line == (
        f"{folder / '*.parquet'}: no file matches; {folder} holds a.jsonl, b.jsonl, bank, c.jsonl"
    )
    (line,) = refused(sets, {"x": {"records": "none/*.jsonl"}})
    assert line.endswith(f"no file matches; there is no folder {folder / 'none'}")
    assert line.startswith(f"data_config {folder / 'mix.yaml'}: x: ")


ALIASES = {
    "a": {"records": "a.jsonl"},
    "first": {"data_path": "./a.jsonl"},
    "bc": {"records": ["b.jsonl", "c.jsonl"]},
    "c": {"records": "c.jsonl"},
    "all": "a+bc*2",
}


def test_second_names_of_a_dataset_are_not_trained_twice(sets: Callable[..., list[str]]) -> None:
    taken = sets(ALIASES)
    assert taken[:60:20] == ["a0", "b0", "c0"]
    assert "all stand for other names, and are left out without a data_mixture" in taken[60]
    assert "first are names of it" in taken[61]
    assert "c are names of it" in taken[62]
    assert len(taken) == 63
    # what a mixture asks for by name is taken as it asks
    assert len(sets(ALIASES, data_mixture="a+first")) == 40
    assert len(sets(ALIASES, data_mixture="all+c")) == 120


UNLIKE: dict[str, tuple[dict[str, Any], str]] = {
    "turns": ({"turns": "independent"}, "have other turns"),
    "the run's own turns": ({"turns": "dialogue"}, "have other turns"),
    "splice": ({"splice": {"records": 5}}, "splice it otherwise"),
}


@pytest.mark.parametrize("kind", UNLIKE)
def test_a_file_that_two_names_use_otherwise_is_not_taken_once_without_a_word(
    sets: Callable[..., list[str]], kind: str
) -> None:
    own, words = UNLIKE[kind]
    (line,) = refused(sets, {"a": {"records": "a.jsonl"}, "b": {"records": "a.jsonl", **own}})
    assert f"{words}, or one alone does" in line or f"{words}; say" in line
    assert "say in data_mixture which to take" in line


def test_other_choices_of_one_file_are_not_two_datasets(sets: Callable[..., list[str]]) -> None:
    small = {"a": {"records": "a.jsonl"}, "few": {"records": "a.jsonl", "sampling_strategy": "10%"}}
    (line,) = refused(sets, small)
    assert "choose other rows of it; say in data_mixture which to take" in line
    assert len(sets(small, data_mixture="few")) == 2
    lists = {
        "datasets": [{"json_path": "a.jsonl", "sampling_strategy": f"first:{n}"} for n in (2, 3)]
    }
    assert len(sets(lists)) == 5


def test_a_file_that_is_listed_twice_is_named(folder: Path, sets: Callable[..., list[str]]) -> None:
    a, b = (str(folder / f"{name}.jsonl") for name in "ab")
    (line,) = refused(sets, data_path=[a, b, f"{folder}/./a.jsonl"])
    assert line == (
        f"{a}: is listed in data_path {a} and data_path {folder}/./a.jsonl; leave one out, or repeat "
        "a dataset by a mixture such as name*2"
    )
    assert "listed in" in refused(sets, data_path=[a, str(folder / "*.jsonl")])[0]
    assert "listed in" in refused(sets, {"x": {"records": "a.jsonl"}}, data_path=[a])[0]
    (line,) = refused(sets, {"datasets": [{"json_path": "{a,b,a}.jsonl"}]})
    assert "datasets[0], twice; leave one out" in line
    (folder / "only").mkdir()
    (folder / "only" / "link.jsonl").symlink_to(folder / "a.jsonl")
    assert a in refused(sets, data_path=[a, str(folder / "only")])[0]


def test_the_fields_of_other_registries_are_taken_or_refused(folder: Path) -> None:
    vila = {
        "x": {
            "_target_": "llava.data.LLaVADataset",
            "data_path": "a.jsonl",
            "media_dir": "/data/clips",
            "is_video": True,
        }
    }
    (part,), problems = mixed(folder, "x", vila)
    assert (part.folders, problems) == (Folders("/data/clips"), [])
    entry = {"path": "a.jsonl", "data_folder": "clips", "data_type": "json"}
    (part,), problems = mixed(folder, "", {"datasets": [entry]})
    assert (part.folders, problems) == (Folders("clips"), [])
    both = {
        "x": {"records": "a.jsonl", "bank": "p", "banks": "q", "media_dir": "y", "data_folder": "z"}
    }
    _, problems = mixed(folder, "x", both)
    assert [line.rpartition(" has ")[2] for line in problems] == [
        "both banks and bank; keep one",
        "both media_dir and data_folder; keep one",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: {records: a.jsonl}\nb: {path: b.jsonl}\na: {path: c.jsonl}\n", "line 3: a stands in line 1"),
        ("a:\n  records: a.jsonl\n  records: b.jsonl\n", "line 3: records stands in line 2"),
        ("datasets:\n- json_path: a.jsonl\n  json_path: b.jsonl\n", "line 3: json_path stands in line 2"),
    ],
)  # fmt: skip
def test_a_key_that_is_there_twice_is_named(folder: Path, text: str, said: str) -> None:
    """YAML's loaders keep the last one, and a dataset would be lost."""
    path = folder / "mix.yaml"
    path.write_text(text)
    problems: list[str] = []
    read_mixture(str(path), "", problems)
    assert problems == [f"data_config {path}: {said}, too; keep one"]
