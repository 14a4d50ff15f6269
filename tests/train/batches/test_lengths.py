"""Lengths: equal to what encoding and laying out make, kept on disk, and never wrong for being kept."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import train.batches.lengths as counting
from model.lape.tokens import LapeTokens
from model.vlm import VLMConfig
from shards.errors import UserError
from train.batches.chat import MEDIA, Chat
from train.batches.collate import lay_out
from train.batches.lengths import cache_folder, count_tokens, counted, tokenizer_digest
from train.batches.measure import measure
from train.batches.turns import encode_apart
from train.data.dataset import open_dataset
from train.data.records import Record, Turn, made_independent
from train.settings.config import TrainConfig

ROOT = Path(__file__).resolve().parents[3]
BINS = (20, 30, 30)
TEXTS = ["When is it?", "at", " ", "<|im_end|>", "<t:1.5>", "from <t:0.25> to <t:2>", "<x:0.31>"]
TEXTS += ["<TEMP-007> <HEIGHT-029>", "<video>", "é 漢字\n", "<TEMP-INPUT>", "assistant: "]


@st.composite
def conversations(draw: st.DrawFn) -> tuple[list[Turn], list[float]]:
    turns = []
    for k in range(draw(st.integers(1, 3)) * 2):
        words = draw(st.lists(st.sampled_from(TEXTS), min_size=1, max_size=5))
        turns.append(Turn(("user", "assistant")[k % 2], "".join(words)))
    if draw(st.booleans()):
        turns.insert(0, Turn("system", "Be brief."))
    first = turns[1] if turns[0].role == "system" else turns[0]
    turns[turns.index(first)] = Turn("user", "<video>" + first.text)  # times have a clip to lie in
    tags = sum(turn.text.count("<video>") for turn in turns)
    return turns, [draw(st.floats(0.5, 40)) for _ in range(tags)]


@given(talks=st.lists(conversations(), min_size=1, max_size=6), lape=st.booleans())
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_counts_are_those_of_encoding(
    make_tokenizer: Callable[[], Any],
    talks: list[tuple[list[Turn], list[float]]],
    lape: bool,
) -> None:
    tokenizer = make_tokenizer()
    plain = Chat(make_tokenizer(), LapeTokens(BINS) if lape else None)
    exact = Chat(tokenizer, LapeTokens.add_to(tokenizer, 20, 30) if lape else None)
    records = [
        Record(str(k), tuple("c" * len(durations)), tuple(turns), "", str(k))
        for k, (turns, durations) in enumerate(talks)
    ]
    counts = count_tokens(plain, records, [d for _, durations in talks for d in durations])
    for (turns, durations), (text, supervised) in zip(talks, counts.tolist(), strict=True):
        encoded = exact.encode(turns, durations)
        assert text == sum(id_ != MEDIA for id_ in encoded.ids)
        assert supervised == sum(encoded.supervised) > 0


def test_several_processes_count_what_one_counts(
    make_tokenizer: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = Chat(make_tokenizer(), None)
    texts = ["red", "<video>Where?", "<video>When, in <video>?", "is it <t:0.50>"]
    records, durations = [], list[float]()
    for k in range(25):
        turns = (
            Turn("user", f"<video> {k % 4} {texts[k % 4]}"),
            Turn("assistant", texts[-k % 2 * 3]),
        )
        media = sum(turn.text.count("<video>") for turn in turns)
        records.append(Record(str(k), ("c",) * media, turns, "", f"r.jsonl:{k}"))
        # a time past the end of its clip cannot be written
        durations += [float(k % 3)] * media
    found: list[list[object]] = []
    for processes, chunk in ((1, 4096), (3, 2), (2, 5)):
        monkeypatch.setattr(counting, "CHUNK", chunk)
        monkeypatch.setattr(counting, "cores", lambda sharers, own=processes: own)
        counts = counted(chat, records, durations, lenient=True)
        with pytest.raises(UserError) as stop:
            counted(chat, records, durations)
        found.append([counts.tolist(), str(stop.value)])
    assert found[0] == found[1] == found[2]
    assert 0 < (counts[:, 0] == counting.UNWRITABLE).sum() < 25


@given(talks=st.lists(conversations(), min_size=1, max_size=4), lape=st.booleans())
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_counts_of_independent_turns_are_those_of_encoding(
    make_tokenizer: Callable[[], Any],
    talks: list[tuple[list[Turn], list[float]]],
    lape: bool,
) -> None:
    chat = Chat(tokenizer := make_tokenizer(), None)
    chat = Chat(tokenizer, LapeTokens.add_to(tokenizer, 20, 30)) if lape else chat
    records, durations = [], list[float]()
    # twice: the second time all that records share is known
    for k, (turns, own) in enumerate([*talks, *talks[::-1]]):
        record = Record(str(k), tuple("c" * len(own)), tuple(turns), "", str(k))
        try:
            records.append(made_independent(record))
        except UserError:  # media in a later turn
            continue
        durations += own
    counts = counted(chat, records, durations).tolist()
    for record, (text, supervised, shared, longest, pairs) in zip(records, counts, strict=True):
        own, durations = durations[: record.media], durations[record.media :]
        apart = record.independent
        encoded = encode_apart(chat, record, own) if apart else chat.encode(record.turns, own)
        kept = [id_ != MEDIA for id_ in encoded.ids]
        assert (text, supervised) == (sum(kept), sum(encoded.supervised))
        starts = encoded.turns or (len(kept),)
        sizes = np.diff([*starts, len(kept)]).tolist()
        assert shared == sum(kept[: starts[0]])
        assert longest == max(sizes)
        assert pairs == sum(n * (n + 1) // 2 for n in sizes)


@pytest.fixture
def config(toy_config: TrainConfig) -> TrainConfig:
    return toy_config


def lengths(config: TrainConfig) -> tuple[list[int], list[int]]:
    dataset = open_dataset(config)
    found = measure(config, dataset, config.stage_path, tokenizer_digest(config.stage_path))
    return found.text.tolist(), found.supervised.tolist()


@pytest.mark.parametrize("lape", [True, False])
@pytest.mark.parametrize("strategy", ["interleave", "first_slow", "uniform"])
@pytest.mark.parametrize("ratio", ["0", "0.25", "0.3", "1"])
def test_countingare_those_of_the_rows_laid_out(
    config: TrainConfig, lape: bool, strategy: str, ratio: str
) -> None:
    from train.start.templates import load_with_template

    config = replace(
        config, enable_lape=lape, frame_sampling_strategy=strategy, slow_frame_ratio=ratio
    )
    dataset = open_dataset(config)
    found = measure(config, dataset, config.stage_path, "digest")
    chat = Chat(
        load_with_template(config.stage_path, ""), LapeTokens((20, 20, 20)) if lape else None
    )
    vlm = VLMConfig(
        slow_stride=4, fast_stride=8, frame_sampling_strategy=strategy, slow_frame_ratio=ratio
    )
    for most in (1, 2, 5, 100):
        frames = np.full(len(dataset.records), most)
        visual, transitions = found.visual(frames), found.transitions(frames)
        for k, record in enumerate(dataset.records):
            infos = [clip.info for clip in dataset.clips(record)]
            encoded = chat.encode(record.turns, [info.duration for info in infos])
            row = lay_out(encoded, infos, vlm, dataset.banks.config.pool, most)
            assert len(row) == found.text[k] + visual[k]
            assert sum(row.supervised) == found.supervised[k]
            assert len(row.frames) - len(infos) == transitions[k]


def test_a_second_look_tokenises_nothing(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = lengths(config)

    def refuse(*_: object) -> None:
        raise AssertionError("tokenised again")

    monkeypatch.setattr("train.batches.measure.load_with_template", refuse)
    assert lengths(config) == first
    assert lengths(replace(config, slow_frame_ratio="1", seed=5)) == first


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "folder of no one"])
def test_a_damaged_cache_is_made_anew(config: TrainConfig, damage: str) -> None:
    first = lengths(config)
    (file,) = cache_folder().glob("lengths-*.bin")
    whole = file.read_bytes()
    if damage == "cut":
        file.write_bytes(whole[:-3])
    elif damage == "flip":
        file.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    elif damage == "empty":
        file.write_bytes(b"")
    else:
        file.unlink()
    assert lengths(config) == first
    assert file.read_bytes() == whole
    assert [path.name for path in cache_folder().iterdir()] == [file.name], "nothing half written"


def test_a_cache_that_cannot_be_written_stops_nothing(
    config: TrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert sum(lengths(config)[0]) > 0
    assert "lengths are not cached" in capsys.readouterr().err


def test_whatever_changes_a_length_is_counted_anew(
    config: TrainConfig, toy: Path, tmp_path: Path
) -> None:
    import shutil

    lengths(config)
    number = len(list(cache_folder().iterdir()))

    def is_new(changed: TrainConfig) -> bool:
        nonlocal number
        lengths(changed)
        before, number = number, len(list(cache_folder().iterdir()))
        return number > before

    assert not is_new(replace(config, max_frames_num=3))
    assert is_new(replace(config, enable_lape=False))
    assert is_new(replace(config, num_spatial_tokens=30))
    records = tmp_path / "train.jsonl"
    records.write_bytes((toy / "train.jsonl").read_bytes())
    assert not is_new(replace(config, data_path=[str(records)])), "the same file elsewhere"
    records.write_text(records.read_text() + "\n")
    assert is_new(replace(config, data_path=[str(records)]))
    shutil.copytree(toy / "llm", tmp_path / "llm")
    assert not is_new(replace(config, stage_path=str(tmp_path / "llm")))
    template = "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    (tmp_path / "llm" / "chat_template.jinja").write_text(template)
    assert is_new(replace(config, stage_path=str(tmp_path / "llm")))


def test_the_same_file_with_other_records_kept_is_counted_anew(
    config: TrainConfig, toy: Path, tmp_path: Path
) -> None:
    first, *rest = (toy / "train.jsonl").read_text().splitlines()
    record = json.loads(first)
    stranger = dict(record, id="stranger", video="nowhere.mp4")
    stranger["conversations"] = [*record["conversations"], *record["conversations"][1:] * 3]
    lines = [json.dumps(stranger), first, *rest]
    path = tmp_path / "r.jsonl"
    path.write_text("\n".join(lines))
    kept = lengths(replace(config, data_path=[str(path)], missing="drop"))
    assert kept == lengths(config)


def test_a_record_that_cannot_be_encoded_is_named(config: TrainConfig, tmp_path: Path) -> None:
    video = json.loads((tmp_path.parent and Path(config.data_path[0])).read_text().splitlines()[0])
    turns = [{"from": "human", "value": "<video>?"}, {"from": "gpt", "value": "<TEMP-099>"}]
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({"id": "far", "video": video["video"], "conversations": turns}))
    with pytest.raises(UserError, match=r"bad.jsonl:1 \(id far\): anchor 099 of time: the model"):
        lengths(replace(config, data_path=[str(path)]))


def test_a_kept_plan_is_shown_without_torch_and_without_a_tokenizer(
    config: TrainConfig, tmp_path: Path
) -> None:
    lengths(config)
    argv = [
        *("--stage_path", config.stage_path, "--bank", config.bank[0], "--plan"),
        *("--data_path", config.data_path[0], "--output_dir", str(tmp_path / "out")),
        *("--num_temporal_tokens", "20", "--num_spatial_tokens", "20", "--pack_tokens", "2048"),
    ]
    script = (
        f"import sys\nfrom train.run import main\nmain({argv!r})\n"
        "heavy = {'torch', 'transformers', 'accelerate', 'decord', 'av'} & set(sys.modules)\n"
        "sys.exit(3 if heavy else 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    names = [line.split()[0] for line in done.stdout.splitlines()]
    shown = ["records", "packs", "steps", "tokens", "heaviest", "model", "encoder", "memory"]
    assert names == [*shown, "read", "time", "hours", "encoding", "plan"]
    assert "6 kept, 0 dropped" in done.stdout
    assert not (tmp_path / "out").exists()
