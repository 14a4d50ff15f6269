"""`turns: independent` in a run: what is planned lies in the rows, and questions are asked alone."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from model.lape.tokens import LAPE_AXES, LapeTokens
from model.mask import dense_mask
from model.vlm import VLMConfig
from shards.errors import UserError
from train.answers import questions_of
from train.batches.chat import Chat
from train.batches.loader import Loader
from train.batches.plan import plan_run
from train.data.coordinates import repeating
from train.data.dataset import Dataset, open_dataset, open_records
from train.data.records import Record, Turn
from train.evaluate import check_turns, how_asked, turns_of
from train.pages.read.runs import TestSet
from train.settings.config import DataSettings, TrainConfig, needs_mask
from train.start.prepare_llm import choose_attention
from train.start.stage import model_config
from train.start.templates import load_with_template


@pytest.fixture
def config(toy_config: TrainConfig) -> TrainConfig:
    return replace(toy_config, max_frames_num=6, turns="independent")


@pytest.fixture(scope="module")
def phrases(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the training clips show, by a phrase each."""
    path = tmp_path_factory.mktemp("phrases") / "phrases.jsonl"
    clips = dict.fromkeys(
        json.loads(line)["video"] for line in (toy / "train.jsonl").read_text().splitlines()
    )
    rows = [json.dumps({"video": clip, "phrase": f"thing {k}"}) for k, clip in enumerate(clips)]
    path.write_text("\n".join(rows))
    return path


def loader_of(config: TrainConfig, dataset: Dataset) -> Loader:
    vlm: VLMConfig = model_config(config, dataset)
    bins = config.num_temporal_tokens, config.num_spatial_tokens, config.num_spatial_tokens
    anchors = LapeTokens(bins, LAPE_AXES[config.lape_axes]) if config.enable_lape else None
    frames = vlm.time_form, vlm.around_frames
    chat = Chat(load_with_template(config.stage_path, ""), anchors, frames=frames)
    return Loader(dataset, chat, vlm)


KINDS: dict[str, dict[str, Any]] = {
    "alone": {},
    "closed media": {"frame_marks": "media"},
    "packed": {"pack_tokens": 600},
    "cut": {"max_tokens": 1, "frame_attention": "token"},
    "without lape": {"enable_lape": False, "pack_tokens": 600, "frame_time": "text"},
    "augmented": {"augment": ["jitter", "drop=0.3"]},
    "spliced": {"splice": ["records=5", "parts=2-3"], "augment": ["jitter"], "pack_tokens": 900},
    "spliced alone": {"splice": ["records=5", "parts=2-3"], "data_path": [], "enable_lape": False},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_counts_what_lies_in_the_rows(config: TrainConfig, phrases: Path, kind: str) -> None:
    config = replace(config, **KINDS[kind], num_train_epochs=1.5)
    if config.splice:
        config = replace(config, splice_path=[str(phrases)])
    dataset = open_dataset(config)
    assert dataset.turns == "independent"
    if config.max_tokens:
        whole = plan_run(replace(config, max_tokens=0), dataset, 2)
        config = replace(config, max_tokens=int(np.median(whole.tokens)) - 3)
    plan, loader = plan_run(config, dataset, 2), loader_of(config, dataset)
    several = 0
    for step in range(plan.num_steps):
        for number in range(plan.num_packs[step]):
            batch = loader.pack(plan, step, number)  # which compares the tokens
            rows = plan.pack(step, number)
            used = [record for row in rows for record in row]
            assert len(batch.labels) == plan.supervised[used].sum()
            assert batch.num_transitions == plan.transitions[used].sum()
            mask = dense_mask(batch.mask_start, batch.mask_end, batch.others)[:, 0]
            real = torch.arange(mask.shape[1]) < batch.lengths[:, None]
            pairs = plan.causal_pairs[used].sum()
            if config.frame_attention == "block":
                pairs += plan.frame_pairs[used].sum()
            assert mask[real].sum() == pairs
            longest = [int(row_positions.max()) + 1 for row_positions in batch.position_ids * real]
            assert longest == [int(plan.conversation[row].max()) for row in rows]
            several += batch.others is not None
    assert several
    if config.max_tokens:
        assert (plan.tokens[plan.uses] <= config.max_tokens).all()
        assert (plan.frames[plan.uses] < 6).any()


def test_a_plan_says_which_records_lose_frames_to_their_many_questions(config: TrainConfig) -> None:
    # a dialogue is one conversation, whose turns belong together
    for turns, said in (("independent", True), ("dialogue", False)):
        own = replace(config, turns=turns)
        dataset = open_dataset(own)
        whole = plan_run(own, dataset, 2)
        plan = plan_run(replace(own, max_tokens=int(whole.tokens.min()) + 1), dataset, 2)
        many = [record.questions > 1 for record in dataset.records]
        cut = (plan.frames < whole.frames) & many
        left_out = [k for records in plan.left_out.values() for k in records.tolist()]
        cut[left_out] = False
        words = f"; {cut.sum()} records have several independent questions, which count together"
        assert cut.any()
        assert (words in plan.frames_line) == said


def test_each_question_is_asked_alone(toy_bank: Path, config: TrainConfig, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in Path(config.data_path[0]).read_text().splitlines()]
    rows = [row for row in rows if len(row["conversations"]) > 2]
    single = []
    for row in rows:
        talk = row["conversations"]
        for k in range(0, len(talk), 2):
            tag = "" if k == 0 else "<video>\n"
            asked = [talk[k] | {"value": tag + talk[k]["value"]}, talk[k + 1]]
            single.append(row | {"conversations": asked})
    for name, own in (("many", rows), ("single", single)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    sets = [
        open_records(
            [str(toy_bank)], [str(tmp_path / f"{name}.jsonl")], 4, 8, DataSettings(turns=turns)
        )
        for name, turns in (("many", "independent"), ("single", "dialogue"), ("many", "dialogue"))
    ]
    many, one, dialogue = (loader_of(config, dataset) for dataset in sets)
    questions = [questions_of(dataset.held_out) for dataset in sets]
    assert len(questions[0]) == len(questions[1]) > len(rows)
    for ours, theirs in zip(questions[0], questions[1], strict=True):
        batch, expected = many.prompts([ours]), one.prompts([theirs])
        assert torch.equal(batch.input_ids, expected.input_ids)
        assert torch.equal(batch.coord, expected.coord)
        assert batch.others is None
        assert many.prompt_length(*ours) == one.prompt_length(*theirs)
    later = [k for k, (_, turn) in enumerate(questions[2]) if turn > 1]
    assert all(
        dialogue.prompt_length(*questions[2][k]) > many.prompt_length(*questions[0][k])
        for k in later
    )


def test_a_run_knows_how_its_questions_saw_each_other(
    train_here: Callable[..., Path],
    refused: Callable[..., str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = {"turns": "independent", "reduce": "exact"}
    whole = train_here(tmp_path / "whole", max_steps=4, save_steps=2, **settings)
    assert "train.jsonl: questions of a record do not see each other" in capsys.readouterr().err
    assert turns_of(whole) == "independent"
    assert json.loads((whole / "run.json").read_text())["config"]["turns"] == "independent"
    (tmp_path / "again").mkdir()
    (whole / "checkpoint-2").rename(tmp_path / "again" / "checkpoint-2")
    line = refused(train_here, tmp_path / "again", max_steps=4, reduce="exact")
    assert "independent turns of datasets" in line
    again = train_here(tmp_path / "again", max_steps=4, **settings)
    weights = "projector.safetensors"
    assert (whole / weights).read_bytes() == (again / weights).read_bytes()


def test_an_attention_without_a_mask_is_refused_before_anything_loads(config: TrainConfig) -> None:
    token = replace(config, frame_attention="token", attn="flash_attention_2")
    assert "independent turns" in str(needs_mask(token))
    assert needs_mask(replace(token, turns="dialogue")) is None
    with pytest.raises(
        UserError, match="attn flash_attention_2: takes no mask, so independent questions"
    ):
        choose_attention(replace(token, turns="dialogue"), "cuda", 100, apart=True)
    plain = replace(token, attn="auto")
    assert "do not see each other" in choose_attention(plain, "cpu", 100, apart=True)[1]


def test_datasets_of_both_kinds_are_told_apart(config: TrainConfig, tmp_path: Path) -> None:
    lines = Path(config.data_path[0]).read_text()
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(lines + "\n" * (name == "b"))

    def opened(a: str, b: str, run: str) -> Dataset:
        entries = {
            name: {"records": f"{name}.jsonl"} | ({"turns": turns} if turns else {})
            for name, turns in (("a", a), ("b", b))
        }
        (tmp_path / "data.yaml").write_text(yaml.safe_dump(entries))
        data = {"data_path": [], "data_config": str(tmp_path / "data.yaml")}
        return open_dataset(replace(config, turns=run, **data))

    assert opened("independent", "", "dialogue").turns == "mixed"
    assert opened("independent", "independent", "dialogue").turns == "independent"
    assert opened("dialogue", "dialogue", "independent").turns == "dialogue"
    mixed = opened("", "dialogue", "independent")
    assert [file.independent for file in mixed.files] == [True, False]
    assert ["b.jsonl" in line for line in mixed.warnings] == [True]
    with pytest.raises(UserError, match=r"--turns dialogue, or --turns independent"):
        check_turns(mixed.records, mixed.turns, tmp_path)
    with pytest.raises(UserError, match="turns must be one of dialogue, independent, got 'apart'"):
        opened("apart", "", "dialogue")


@pytest.mark.parametrize(
    ("many", "single", "run", "asked"),
    [
        # datasets of single questions have no kind of their own
        ("independent", "", "dialogue", True),
        ("independent", "dialogue", "dialogue", True),
        ("dialogue", "", "independent", True),  # mixed, as the run says
        ("dialogue", "dialogue", "independent", False),
        ("", "", "dialogue", False),
        ("", "", "independent", True),
    ],
)
def test_held_out_questions_are_asked_as_evaluate_will_ask_them(
    config: TrainConfig, tmp_path: Path, many: str, single: str, run: str, asked: bool
) -> None:
    rows = [json.loads(line) for line in Path(config.data_path[0]).read_text().splitlines()]
    rows = [row for row in rows if len(row["conversations"]) > 2]
    ones = [row | {"conversations": row["conversations"][:2]} for row in rows]
    for name, own in (("many", rows), ("single", ones), ("test", rows)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    entries = {"many": {"records": "many.jsonl"}, "single": {"records": "single.jsonl"}}
    for entry, turns in zip(entries.values(), (many, single), strict=True):
        entry.update({"turns": turns} if turns else {})
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(entries))
    data = {"data_path": [], "data_config": str(tmp_path / "data.yaml")}
    settings = replace(config, turns=run, eval_path=[str(tmp_path / "test.jsonl")], **data)
    dataset = open_dataset(settings)
    assert {record.independent for record in dataset.held_out} == {asked}
    if dataset.turns != "mixed":
        assert dataset.turns == ("independent" if asked else "dialogue")


def test_turns_on_the_command_line_of_evaluate_win_over_a_mixtures(
    config: TrainConfig, tmp_path: Path
) -> None:
    lines = Path(config.data_path[0]).read_text()
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(lines + "\n" * (name == "b"))
    said = {"a": {"records": "a.jsonl", "turns": "independent"}, "b": {"records": "b.jsonl"}}
    (tmp_path / "sets.yaml").write_text(yaml.safe_dump(said))

    def asked(trained: str, given: str = "") -> str:
        paths = [str(tmp_path / "sets.yaml")]
        how = DataSettings(turns=given or trained)
        return how_asked(open_records(config.bank, paths, 4, 8, how, turns=given).held_out)

    assert asked("dialogue") == "mixed"
    assert asked("independent") == "independent"
    assert asked("independent", "dialogue") == asked("mixed", "dialogue") == "dialogue"
    assert asked("dialogue", "independent") == asked("mixed", "independent") == "independent"
    # the model's training says nothing, and a dataset of the mixture neither
    records = open_records(config.bank, [str(tmp_path / "sets.yaml")], 4, 8).held_out
    with pytest.raises(UserError, match=r"--turns dialogue, or --turns independent"):
        check_turns(records, "mixed", tmp_path)
    check_turns([r for r in records if r.independent or r.questions == 1], "mixed", tmp_path)


@pytest.mark.parametrize("named", ["phrase", "caption"])
def test_spliced_records_are_not_scored(
    config: TrainConfig, phrases: Path, tmp_path: Path, named: str
) -> None:
    # rows with a caption are records, too, of other questions
    rows = phrases.read_text().replace('"phrase"', f'"{named}"')
    (tmp_path / "rows.jsonl").write_text(rows)
    path = str(tmp_path / "sets.yaml")
    said = {"scenes": {"records": "rows.jsonl", "splice": {"records": 5}}}
    Path(path).write_text(yaml.safe_dump(said))
    openings = (
        lambda: open_records(config.bank, [path], 4, 8),
        lambda: open_dataset(replace(config, eval_path=[path])),
    )
    for opening in openings:
        with pytest.raises(
            UserError, match="scenes: splice draws other records in each"
        ) as refused:
            opening()
        assert len(refused.value.problems) == 1
    assert open_dataset(replace(config, data_path=[path])).splices


def test_scores_of_dialogues_are_not_compared_with_those_of_questions_alone(tmp_path: Path) -> None:
    many, one_each = {"records": 3, "answers": 8}, {"records": 8, "answers": 8}
    reports = {turns: many | {"turns": turns} for turns in ("dialogue", "independent")}
    reports |= {"single": one_each | {"turns": ""}, "older": many}
    # before, the setting was named for records of one question, too
    reports |= {"older single": one_each | {"turns": "dialogue"}}
    for (one, ours), (other, theirs) in product(reports.items(), repeat=2):
        same = TestSet("test", "test.jsonl", ours, tmp_path).asks_as(theirs)
        assert same == ({one, other} != {"dialogue", "independent"})


def test_dialogues_whose_answers_are_read_off_earlier_ones_are_warned_of(
    config: TrainConfig, phrases: Path
) -> None:
    (line,) = open_dataset(replace(config, turns="dialogue")).warnings
    assert "later answers repeat coordinates of earlier turns" in line
    assert "set turns: independent" in line
    assert not open_dataset(config).warnings
    spliced = {"splice": ["records=50", "questions=span"], "splice_path": [str(phrases)]}
    alone = replace(config, turns="dialogue", data_path=[], **spliced)
    assert "phrases.jsonl: in " in open_dataset(alone).warnings[0]


LEAKS = {
    ("from <t:1> to <t:2>", "at <t:2.0>"): True,
    ("<x:0.5> <y:0.2>", "<x:0.2> <y:0.5>"): False,
    ("<TEMP-004>", "<TEMP-004>"): True,
    ("<TEMP-004>", "<HEIGHT-004>"): False,
    ("no", "<t:1>"): False,
}


LEAKING_QUESTIONS = {
    # questions and answers in turn
    ("What is from <t:1> to <t:4>?", "a dog", "When is a dog?", "from <t:1.0> to <t:4>"): True,
    ("Where at <t:2>?", "<x:0.1><y:0.2>", "Is it still at <t:3>?", "at <t:3>, yes"): False,
    (
        "Where at <t:2>?",
        "at <t:2> <x:0.1><y:0.2>",
        "And it at <t:2>?",
        "at <t:2> <x:0.5><y:1>",
    ): False,
    ("When?", "<t:2>", "What is at <t:2>?", "at <t:2> a dog, until <t:5>", "When?", "<t:5>"): True,
}
"""A question gives away what later ones ask for; what an answer takes from its own is no leak."""


@pytest.mark.parametrize("texts", LEAKING_QUESTIONS)
def test_questions_give_away_later_answers_and_not_their_own(texts: tuple[str, ...]) -> None:
    turns = [Turn(("user", "assistant")[k % 2], text) for k, text in enumerate(texts)]
    assert repeating(Record("r", (), tuple(turns), "", "f:1")) == LEAKING_QUESTIONS[texts]


@pytest.mark.parametrize("answers", LEAKS)
def test_an_answer_leaks_where_it_has_an_earlier_ones_coordinate(answers: tuple[str, str]) -> None:
    turns = [turn for text in answers for turn in (Turn("user", "<t:1>?"), Turn("assistant", text))]
    assert repeating(Record("r", (), tuple(turns), "", "f:1")) == LEAKS[answers]
    assert not repeating(Record("r", (), tuple(turns), "", "f:1", independent=True))


def test_pairs_of_packed_rows_are_counted_as_the_mask_allows(config: TrainConfig) -> None:
    from train.loop.metrics import SCALARS, sums_of

    dataset = open_dataset(config)
    loader = loader_of(config, dataset)
    batch = loader.batch(dataset.records[:3])
    found = sums_of({"ce": torch.zeros(())}, batch)[SCALARS.index("pairs")]
    mask = dense_mask(batch.mask_start, batch.mask_end, batch.others)[:, 0]
    real = torch.arange(mask.shape[1]) < batch.lengths[:, None]
    assert found == mask[real].sum()
    assert np.isfinite(float(found))
