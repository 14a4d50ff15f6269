"""The page of a folder of evidence: what encoding cost once, and would have cost for each run."""

import io
import json
from contextlib import redirect_stdout as captured
from pathlib import Path
from typing import Any

import pytest

from preprocess.cli.encode import report
from preprocess.encode.pipeline.summary import Summary
from shards.text import duration
from train.sweep.page import head, read_encoded
from train.sweep.record import Record

ENCODED = "{}: {:,} clips, {:,} frames, 1 MB in {} s; {:,} clips there already\n"


def write_run(folder: Path, name: str, seed: int, bank: list[str], rows: int, steps: int) -> None:
    out = folder / "runs" / name / f"seed-{seed}"
    out.mkdir(parents=True)
    batch = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 2}
    (out / "run.json").write_text(json.dumps({"config": {"bank": bank, **batch}}))
    lines = [{"kind": "train", "step": k} for k in range(steps)] + [{"kind": "eval", "step": 1}]
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    Record({}, seconds=60.0).write(out)


def encodings(folder: Path, **ends: list[tuple[Any, ...]]) -> None:
    """Write what encodings printed: (clips made, seconds, clips there already) of each attempt."""
    for name, own in ends.items():
        text = "".join(
            ENCODED.format(folder / name, clips, 16 * clips, seconds, there)
            for clips, seconds, there in own
        )
        (folder / f"encode-{name}.txt").write_text(f"scanning\n{text}")


def test_each_run_is_counted_with_the_banks_that_it_reads(tmp_path: Path) -> None:
    # of the large one an attempt after a stop made a quarter of the clips, and the others took as long
    encodings(tmp_path, bank=[(2000, 40.0, 0)], large=[(2000, 50.0, 6000)], idle=[(10, 3.0, 0)])
    write_run(tmp_path, "a", 0, [str(tmp_path / "bank")], 4, 100)
    write_run(tmp_path, "a", 1, [str(tmp_path / "bank")], 4, 100)
    write_run(tmp_path, "b", 0, [str(tmp_path / "large")], 8, 50)
    write_run(tmp_path, "both", 0, [f"{tmp_path}/bank", f"{tmp_path}/large/"], 5, 10)
    write_run(tmp_path, "elsewhere", 0, ["/data/other"], 5, 10)
    said = head(tmp_path)
    assert sum(line.startswith("- encoded once: ") for line in said) == 3
    (runs,) = [line for line in said if "trained on that" in line]
    assert runs == f"- 4 runs trained on that, {duration(240)} in all"
    # 40 + 40 + 200 + 240 seconds; once 40 + 200 + 3
    times = 2 * 800 + 800 + 100
    each = 1600 * 40 / 2000 + 800 * 200 / 8000 + 100 * 240 / 10000
    (again,) = [line for line in said if "again would have" in line]
    assert again == (
        f"- encoding for each run again would have taken {duration(520)} in place of {duration(243)}; "
        f"and again each time that a clip is trained on ({times:,} times), {duration(each)}"
    )


def test_an_encoding_that_was_stopped_is_read_as_encode_ends(
    toy_bank: Path, tmp_path: Path
) -> None:
    said = []
    for clips, there in ((9, 0), (4, 5), (1, 8)):
        with captured(io.StringIO()) as shown:
            report(toy_bank, Summary(clips=clips, frames=8 * clips, seconds=3.0, skipped=there))
        said.append(shown.getvalue())
    for k, (text, seconds) in enumerate(zip(said, (3.0, 6.75, 27.0), strict=True)):
        (tmp_path / f"encode-{k}.txt").write_text(text)
        found = read_encoded(tmp_path / f"encode-{k}.txt")
        assert found
        assert (found.clips, found.seconds) == (9, seconds)


@pytest.mark.parametrize("own", [[], [(0, 0.4, 2000)]])
def test_an_encoding_whose_time_is_not_known_is_left_out(
    tmp_path: Path, own: list[tuple[Any, ...]]
) -> None:
    encodings(tmp_path, bank=own)
    write_run(tmp_path, "a", 0, [str(tmp_path / "bank")], 4, 100)
    assert not [line for line in head(tmp_path) if "encod" in line]
