"""The commands: every option is told, every mistake is one line and exit code 2, and early.

pytest tests/preprocess/test_cli.py
"""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result
from transformers import VideoMAEConfig, VideoMAEImageProcessor

from preprocess.cli.main import main
from preprocess.cli.options import Devices, first_device, make_sampling
from preprocess.encode.features import EncodeOptions
from preprocess.encode.run import processes
from preprocess.encode.tower import devices_of
from shards.format.features import Sampling
from shards.format.plan import read_plan
from shards.read.bank import Bank

PLANNED = (
    "--out --tower --stride --frames --fps --max-frames --frames-like --video-root --layer --fit "
    "--pool --dtype --codec --tower-dtype --batch-frames --tower-threads --device --allow-truncated "
    "--folder-fps --allow-outside --missing --on-bad-record --follow-links --archive-ids "
    "--shard-size --prune --help"
)
OPTIONS = {
    "bench": PLANNED.replace(
        "--shard-size --prune", "--clips --decoders --devices --machines --price"
    ),
    "plan": f"{PLANNED} --no-estimate",
    "encode": f"{PLANNED} --devices --procs --decoders --on --address",
    "work": (
        "--share --devices --procs --decoders --tower --video-root --device --template --on --address "
        "--help"
    ),
    "finish": "--help",
    "merge": "--out --help",
    "derive": "--out --stride --codec --frames --shard-size --help",
    "retry": (
        "--tower --video-root --device --batch-frames --tower-threads --allow-truncated --help"
    ),
    "show": "--out --help",
    "status": "--help",
    "verify": "--deep --help",
    "repair": "--tower --device --video-root --help",
    "diff": "--help",
    "export": "--help",
    "gc": "--dry-run --help",
    "realmodels": "--help",
    "toyworld": "--train-clips --test-clips --seed --help",
    "footage": "--train-clips --test-clips --phrases --seconds --size --seed --help",
}


def preprocess(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words], prog_name="preprocess")


def refused(result: Result) -> str:
    """Return what a refusal says: exit code 2, one line, nothing on stdout, no traceback."""
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def encode_words(toy: Path, out: Path, *more: object) -> Sequence[object]:
    return ["encode", toy / "videos" / "test", "--out", out, "--tower", toy / "tower", *more]


def test_the_table_here_names_every_command() -> None:
    assert set(OPTIONS) == set(main.commands)


@pytest.mark.parametrize("command", OPTIONS)
def test_help_names_every_option_and_no_other(command: str) -> None:
    result = preprocess(command, "--help")
    assert result.exit_code == 0
    shown = re.findall(r"^  +(?:-\w, )?(--[a-z-]+)", result.output, re.MULTILINE)
    assert sorted(shown) == sorted(OPTIONS[command].split())


@pytest.mark.parametrize("words", [["--help"], ["-h"], []])
def test_the_bare_command_lists_the_commands(words: list[str]) -> None:
    result = preprocess(*words)
    assert result.exit_code == (0 if words else 2)
    listed = re.findall(r"^  ([a-z]+)  ", result.output.split("Commands:")[1], re.MULTILINE)
    assert listed == list(main.commands)


@pytest.mark.parametrize("command", [name for name in OPTIONS if "--device " in OPTIONS[name]])
@pytest.mark.parametrize("device", ["0", "0,1", "", "gpu 1", "cuda:x", "cuda:", "meta", "CUDA"])
def test_what_is_no_device_is_refused_before_anything_is_done(
    tmp_path: Path, command: str, device: str
) -> None:
    words = [tmp_path / "x", "--out", tmp_path / "bank", "--tower", tmp_path / "tower"]
    given = words if command in ("bench", "plan", "encode") else words[:1]
    line = refused(preprocess(command, *given, "--device", device))
    assert f"auto, cpu, cuda or cuda:1 is needed, got {device!r}" in line
    hinted = device.startswith("0") and command in ("encode", "work")
    assert line.endswith("--devices takes numbers of GPUs") == hinted
    assert not any(tmp_path.iterdir())


def test_a_mistyped_flag_is_refused_with_a_suggestion(toy: Path, tmp_path: Path) -> None:
    line = refused(preprocess(*encode_words(toy, tmp_path / "b", "--strides", "4")))
    assert "--strides" in line
    assert re.search(r"Did you mean.*'?--stride\b", line)


def test_an_abbreviated_flag_is_not_guessed(toy: Path, tmp_path: Path) -> None:
    assert "--str" in refused(preprocess(*encode_words(toy, tmp_path / "b", "--str", "4")))


DEVICES = {
    "auto": ("cuda:0", "cuda:1", "cuda:2"),
    "cpu": ("cpu",),
    "0": ("cuda:0",),
    "2,0": ("cuda:2", "cuda:0"),
    "0,0": None,
    "cpu,0": None,
    "": None,
    "0,": None,
    "cuda": None,
}
"""What --devices is given -> the towers' devices on a machine of three GPUs; None if it is refused."""


@pytest.mark.parametrize("given", DEVICES)
def test_each_tower_has_a_device_of_its_own(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    context = click.Context(main)
    if DEVICES[given] is None:
        with pytest.raises(click.BadParameter, match="numbers of GPUs such as 0,1"):
            Devices().convert(given, None, context)
        return
    first, every = first_device("auto", Devices().convert(given, None, context))
    # as the tower that is loaded to plan finds it
    options = EncodeOptions(
        "t", (4,), Sampling(num_frames=1), device="cuda" * (first == "auto") or first
    )
    assert devices_of(replace(options, devices=every)) == DEVICES[given]


@pytest.mark.parametrize(
    ("devices", "procs", "count"),
    [((), None, 1), ((), 2, 2), ((), 3, 3), (("auto",), None, 3), (("cuda:1",), None, 1)],
)
def test_gpus_that_are_left_idle_are_told(
    devices: tuple[str, ...],
    procs: int | None,
    count: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    options = EncodeOptions("t", (4,), Sampling(num_frames=1), device="cuda", devices=devices)
    assert processes(options, procs) == count
    told = f"note: {count} of 3 GPUs will be used; --devices auto takes all\n"
    assert capsys.readouterr().err == told * (not devices and count < 3)
    assert processes(replace(options, device="cpu", devices=()), None) == 1
    assert not capsys.readouterr().err


def test_devices_make_the_bank_that_a_device_makes(
    toy: Path, toy_bank: Path, toy_options: EncodeOptions, tmp_path: Path
) -> None:
    words = ["--stride", "4,8", "--frames", 8, "--tower", toy / "tower", "--out", tmp_path / "b"]
    done = preprocess("encode", toy / "videos", *words, "--devices", "cpu", "--procs", 2)
    assert done.exit_code == 0, done.output
    shards = [file.name for file in sorted((toy_bank / "shards").glob("*.tar"))]
    for name in shards:
        made, expected = (one / "shards" / name for one in (tmp_path / "b", toy_bank))
        assert made.read_bytes() == expected.read_bytes()
    refused = preprocess("encode", toy / "videos", *words, "--devices", "cpu", "--device", "cpu")
    assert refused.exit_code == 2
    assert "--device and --devices: give one of them" in refused.output
    ray = preprocess("work", tmp_path / "b", "--devices", "0,1", "--on", "ray")
    assert "--devices: ray gives each worker its device" in ray.output


@pytest.mark.parametrize("command", ["encode", "plan"])
@pytest.mark.parametrize(
    ("url", "way"),
    [
        ("s3://bucket/x", "aws s3 cp"),
        ("https://host/a.mp4", "curl -LO"),
        ("hf://datasets/o/n", "hf download"),
        ("gs://b/x", "gcloud storage cp"),
        ("az://b/x", "name a path"),
    ],
)
def test_urls_are_refused_as_input_and_as_bank(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, url: str, way: str
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ["--tower", toy / "tower"]
    line = refused(preprocess(command, toy / "videos", "--out", url, *asked))
    assert f"{url}: out must be a local path, got a URL" in line
    line = refused(preprocess(command, url, "--out", tmp_path / "bank", *asked))
    assert f"{url}: " in line
    assert way in line
    line = refused(preprocess("verify", url))
    assert "must be a local path" in line
    assert list(tmp_path.iterdir()) == []


def test_what_is_skipped_is_told_by_plan_and_encode_and_listed(toy: Path, tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    shutil.copytree(toy / "videos" / "test", videos)
    for name in ("a.srt", "b.srt", "c.part", "Thumbs.db"):
        (videos / name).write_bytes(b"x")
    (videos / "more").symlink_to(toy / "videos" / "train")
    words = [videos, "--out", tmp_path / "bank", "--tower", toy / "tower", "--frames", 2]
    told = (
        "skipped: 3 files of unknown type: .srt 2 .part 1, 1 link to a folder (--follow-links), "
        f"1 hidden or system file; all in {tmp_path}/bank/skipped.jsonl"
    )
    for command in (["plan", "--no-estimate"], ["encode"]):
        result = preprocess(command[0], *words, *command[1:])
        assert result.exit_code == 0, result.output
        assert told in result.stdout.splitlines()
        listed = (tmp_path / "bank" / "skipped.jsonl").read_text().splitlines()
        assert {json.loads(line)["where"] for line in listed} == {
            str(videos / name) for name in ("a.srt", "b.srt", "c.part", "Thumbs.db", "more")
        }
        made = "0 of 1 planned shard made: " if command[0] == "plan" else ""
        assert f"bank: {made}sound;" in preprocess("verify", tmp_path / "bank").output
    result = preprocess("encode", *words, "--follow-links")
    assert "9 clips" in preprocess("plan", *words, "--no-estimate", "--follow-links").stdout
    assert result.exit_code == 0
    assert preprocess("verify", tmp_path / "bank").exit_code == 0
    assert "skipped.jsonl" not in preprocess("gc", tmp_path / "bank", "--dry-run").output


def test_a_mistyped_command_is_refused_with_a_suggestion() -> None:
    assert "'encode'" in refused(preprocess("encod"))


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--layer", "last"], "an integer or merged is needed, got 'last'"),
        (["--layer", "merged"], "has no layer merged: merged tokens are those of Qwen2-VL"),
        (["--layer", "9"], "layer 9 of"),
    ],
)
def test_a_layer_that_the_tower_has_not_is_refused(
    toy: Path, tmp_path: Path, words: Sequence[str], why: str
) -> None:
    assert why in refused(preprocess(*encode_words(toy, tmp_path / "b", *words)))
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("strides", ["8,4", "4,4", "0", "x", "-4,8", "4,", "", "4.0", "4 8"])
def test_strides_that_do_not_rise_are_refused(toy: Path, tmp_path: Path, strides: str) -> None:
    line = refused(preprocess(*encode_words(toy, tmp_path / "b", "--stride", strides)))
    assert "--stride" in line
    assert "such as 4,8" in line
    assert repr(strides) in line
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--frames", 8, "--fps", 1], "--frames"),
        (["--frames", 8, "--max-frames", 9], "--max-frames"),
        (["--frames", 0], "--frames"),
        (["--fps", "fast"], "'fast'"),
        (["--fps", "0"], "'0'"),
        (["--fps", "nan"], "'nan'"),
        (["--max-frames", -1], "--max-frames"),
        (["--pool", "median"], "--pool"),
        (["--dtype", "int8"], "--dtype"),
        (["--codec", "zip"], "--codec"),
        (["--procs", 0], "--procs"),
        (["--tower-threads", 0], "--tower-threads"),
        (["--layer", "last"], "--layer"),
        (["--batch-frames", 0], "--batch-frames"),
        (["--shard-size", 0], "--shard-size"),
        (["--video-root", "/no/such/root"], "/no/such/root"),
    ],
)
def test_a_value_that_cannot_be_is_refused(
    toy: Path, tmp_path: Path, words: list[object], named: str
) -> None:
    assert named in refused(preprocess(*encode_words(toy, tmp_path / "b", *words)))
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["encode"],
        ["encode", "videos", "--tower", "t"],
        ["encode", "videos", "--out", "b"],
        ["encode", "--out", "b", "--tower", "t"],
        ["toyworld"],
        ["footage", "a.mp4"],
        ["realmodels"],
    ],
)
def test_what_is_missing_is_named(words: list[str]) -> None:
    assert "Missing" in refused(preprocess(*words))


@pytest.mark.parametrize(
    ("frames", "fps", "max_frames", "like", "expected"),
    [
        (None, None, None, None, Sampling(fps="1", max_frames=64)),
        (None, "0.50", None, None, Sampling(fps="1/2", max_frames=64)),
        (None, "30000/1001", 9, None, Sampling(fps="30000/1001", max_frames=9)),
        (8, None, None, None, Sampling(num_frames=8)),
        (None, "2.0", 768, "qwen3_vl", Sampling(fps="2", max_frames=768, like="qwen3_vl")),
        (8, None, None, "llava", Sampling(num_frames=8, like="llava")),
    ],
)
def test_flags_mean_a_sampling(
    frames: int | None,
    fps: str | None,
    max_frames: int | None,
    like: str | None,
    expected: Sampling,
) -> None:
    assert make_sampling(frames, fps, max_frames, like) == expected


def test_every_missing_input_has_its_line(toy: Path, tmp_path: Path) -> None:
    tower = toy / "tower"
    words = ["/no/a.mp4", "/no/b", "--video-root", "/no/root", "--out", tmp_path, "--tower", tower]
    result = preprocess("encode", *words)
    assert result.exit_code == 2
    assert result.stderr.splitlines() == [
        "error: --video-root /no/root: no such folder",
        "error: /no/a.mp4: no such file or folder",
        "error: /no/b: no such file or folder",
    ]


def test_a_folder_that_is_no_tower_is_refused(toy: Path, tmp_path: Path) -> None:
    (tmp_path / "tower").mkdir()
    words = encode_words(toy, tmp_path / "b")
    for name, why in (("tower", "cannot be loaded"), ("nowhere", "no such folder")):
        line = refused(preprocess(*words, "--tower", tmp_path / name))
        assert f"tower {tmp_path / name}: {why}; " in line
        assert "a folder with config.json" in line
    assert not (tmp_path / "b").exists()


def test_a_language_model_is_no_tower(toy: Path, tmp_path: Path) -> None:
    line = refused(preprocess(*encode_words(toy, tmp_path / "b", "--tower", toy / "llm")))
    assert "qwen2 is not supported" in line
    assert "siglip" in line


@pytest.mark.parametrize("with_processor", [True, False])
def test_a_tower_that_mixes_frames_is_refused(
    toy: Path, tmp_path: Path, with_processor: bool
) -> None:
    VideoMAEConfig(hidden_size=32, num_hidden_layers=1).save_pretrained(tmp_path / "tower")
    if with_processor:
        VideoMAEImageProcessor().save_pretrained(tmp_path / "tower")
    line = refused(preprocess(*encode_words(toy, tmp_path / "b", "--tower", tmp_path / "tower")))
    assert "videomae mixes frames" in line
    assert "use SigLIP, CLIP or DINOv2" in line


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_tower_without_whole_weights_is_refused(toy: Path, tmp_path: Path, damage: str) -> None:
    tower = shutil.copytree(toy / "tower", tmp_path / "tower")
    (weights,) = tower.glob("*.safetensors")
    raw = weights.read_bytes()
    weights.unlink()
    if damage == "cut":
        weights.write_bytes(raw[: len(raw) // 2])
    line = refused(preprocess(*encode_words(toy, tmp_path / "b", "--tower", tower)))
    assert f"tower {tower}: cannot be loaded" in line


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--layer", 9], "layer 9 of 3 layers"),
        (["--layer", -5], "layer -5 of 3 layers"),
        (["--stride", "4,16", "--pool", "max"], "stride 16 with pool max leaves no cell"),
        (["--device", "typewriter"], "--device cpu"),
        (["--device", "cuda:99"], "--device cpu"),
    ],
)
def test_what_the_tower_cannot_do_is_refused(
    toy: Path, tmp_path: Path, words: list[object], named: str
) -> None:
    assert named in refused(preprocess(*encode_words(toy, tmp_path / "b", *words)))
    assert not (tmp_path / "b").exists()


def test_a_file_is_no_folder_for_a_bank(toy: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    line = refused(preprocess(*encode_words(toy, tmp_path / "file")))
    assert str(tmp_path / "file") in line
    assert (tmp_path / "file").read_text() == "mine"
    assert "file" in refused(preprocess(*encode_words(toy, tmp_path / "file" / "below")))


def test_another_config_in_the_same_folder_is_refused(
    toy: Path, toy_bank: Path, tmp_path: Path
) -> None:
    bank = shutil.copytree(toy_bank, tmp_path / "bank")
    words = encode_words(toy, bank, "--frames", 8, "--stride", "4")
    line = refused(preprocess(*words))
    assert "strides: [4] here, [4, 8] there" in line
    assert "write to another folder" in line


def test_a_world_is_not_drawn_over_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    line = refused(preprocess("toyworld", tmp_path))
    assert "remove it or name another" in line
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_encode_says_what_it_did_and_a_rerun_that_it_was_done(toy: Path, tmp_path: Path) -> None:
    words = encode_words(toy, tmp_path / "b", "--frames", 4)
    first = preprocess(*words)
    assert first.exit_code == 0
    assert re.search(
        r"b: 3 clips, 12 frames, .*; 0 clips there already\n  the tower .*\n$", first.stdout
    )
    second = preprocess(*words)
    assert second.exit_code == 0
    assert re.search(r"b: 0 clips, 0 frames, .*; 3 clips there already\n$", second.stdout)
    bank = Bank.open(tmp_path / "b")
    assert (len(bank), bank.config.strides, bank.config.layer) == (3, (4, 8), -2)
    assert bank.config.sampling == Sampling(num_frames=4)


def test_a_bad_video_is_listed_with_exit_code_1_on_every_run(toy: Path, tmp_path: Path) -> None:
    videos = shutil.copytree(toy / "videos" / "test", tmp_path / "videos")
    (videos / "bad.mp4").write_text("no video")
    words = ["encode", videos, "--out", tmp_path / "b", "--tower", toy / "tower", "--frames", 2]
    for _ in range(2):
        result = preprocess(*words)
        assert result.exit_code == 1
        assert f"1 clip failed, listed in {tmp_path / 'b' / 'quarantine.jsonl'}" in result.stdout
        assert re.search(r"^  bad\.mp4: cannot-open: .*bad\.mp4", result.stdout, re.MULTILINE)
    (entry,) = map(json.loads, (tmp_path / "b" / "quarantine.jsonl").read_text().splitlines())
    assert (entry["id"], entry["reason"]) == ("bad.mp4", "cannot-open")
    assert len(Bank.open(tmp_path / "b")) == 3


def test_the_installed_command_is_this_one() -> None:
    script = Path(sys.executable).parent / "preprocess"
    result = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"preprocess, version \d+\.\d+\.\d+\n", result.stdout)


def test_a_plan_says_what_it_will_cost_and_encode_executes_it(toy: Path, tmp_path: Path) -> None:
    videos = shutil.copytree(toy / "videos" / "test", tmp_path / "videos")
    (videos / "bad.mp4").write_text("no video")
    bank = tmp_path / "b"
    words = [videos, "--out", bank, "--tower", toy / "tower", "--frames", 4, "--device", "cpu"]
    result = preprocess("plan", *words)
    assert result.exit_code == 0, result.output
    assert [path.name for path in bank.iterdir()] == ["plan.json"]
    said = result.stdout
    assert f"{bank}: 4 clips, 12 frames in 1 shard\n" in said
    assert "stride 4: 6.1 kB; stride 8: 1.5 kB\n" in said
    assert "new: 4 clips; changed: 0; gone: 0; pruned: 0\n" in said
    assert "cannot be opened: 1 clip (bad.mp4)\n" in said
    assert "to encode: 4 clips, 12 frames\n" in said
    assert re.search(r"roughly [0-9.]+ seconds to .* for one process here .* on 3 clips", said)
    planned = (bank / "plan.json").read_bytes()
    assert preprocess("encode", *words).exit_code == 1
    assert (bank / "plan.json").read_bytes() == planned
    result = preprocess("plan", *words, "--no-estimate")
    assert "in 1 shard, 1 of them finished\n" in result.stdout
    assert "new: 0 clips;" in result.stdout
    assert "nothing is left to encode\n" in result.stdout
    assert "roughly" not in result.stdout


def test_a_rerun_encodes_as_the_first_run_did_unless_told_otherwise(
    toy: Path, tmp_path: Path
) -> None:
    words = encode_words(toy, tmp_path / "b", "--frames", 2, "--device", "cpu")
    assert preprocess(*words, "--batch-frames", 2, "--tower-threads", 1).exit_code == 0
    for file, flags in (("late1", ()), ("late2", ("--batch-frames", 4))):
        (tmp_path / "v").mkdir(exist_ok=True)
        shutil.copy(toy / "videos/train/clip-00000.mp4", tmp_path / "v" / f"{file}.mp4")
        more = ["encode", tmp_path / "v", *words[2:], *flags]
        assert preprocess(*more).exit_code == 0
    plan = read_plan(tmp_path / "b")
    assert plan
    assert (plan.tower.batch_frames, plan.tower.threads) == (2, 1)
    encoded = Bank.open(tmp_path / "b").manifest.provenance.encoded
    assert [(how["batch_frames"], how["tower_threads"]) for how in encoded] == [(2, 1), (4, 1)]


@pytest.mark.parametrize("codec", ["blosc", "int8"])
def test_a_codec_is_chosen_at_encode_and_measured_in_the_manifest(
    toy: Path, toy_bank: Path, tmp_path: Path, codec: str
) -> None:
    words = encode_words(toy, tmp_path / "b", "--frames", 8, "--codec", codec, "--device", "cpu")
    assert preprocess(*words).exit_code == 0
    bank, plain = Bank.open(tmp_path / "b"), Bank.open(toy_bank)
    facts = bank.manifest.codec
    assert facts.name == codec
    assert set(facts.strides) == {"4", "8"}
    for told in facts.strides.values():
        assert told["ratio"]
        assert told["cosine_min"]
        assert told["channel_error_worst"] is not None
        assert 0.4 < told["ratio"] < 1.5
        assert told["cosine_min"] > 0.99
        assert told["channel_error_worst"] < 0.05
    for row, id_ in enumerate(bank.ids):
        exact = plain.read(plain.row(f"test/{id_}"), 4).astype(float)
        error = abs(bank.read(row, 4).astype(float) - exact).max() / exact.std()
        assert error == 0 if codec == "blosc" else 0 < error < 0.1
    before = (tmp_path / "b" / "bank.json").read_bytes()
    assert preprocess(*words).exit_code == 0
    assert (tmp_path / "b" / "bank.json").read_bytes() == before
