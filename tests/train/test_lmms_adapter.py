"""A trained model under the real lmms-eval: a local task of the kind of charades_sta.

Needs `pip install 'framebank[lmms-eval]'`; it skips where that is not installed.
"""

import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None,
    reason="lmms-eval is not installed: pip install 'framebank[lmms-eval]'",
)

TASK = """
task: toy_grounding
dataset_path: json
dataset_kwargs:
  data_files: {{test: {records}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.to_visual
doc_to_text: !function utils.to_text
doc_to_target: timestamp
process_results: !function utils.process_results
generation_kwargs: {{max_new_tokens: 96, temperature: 0, do_sample: false, until: ["\\n\\n"]}}
metric_list:
  - {{metric: charades_sta_mIOU, aggregation: !function utils.miou, higher_is_better: true}}
  - {{metric: charades_sta_IOU@5, aggregation: !function utils.iou5, higher_is_better: true}}
"""
UTILS = """
from lmms_eval.tasks.charades_sta.utils import temporal_grounding_aggregate_iou5 as iou5_of
from lmms_eval.tasks.charades_sta.utils import temporal_grounding_aggregate_miou as miou_of
from lmms_eval.tasks.charades_sta.utils import temporal_grounding_process_results_generation

VIDEOS = "{videos}"


def to_visual(doc):
    return [f"{{VIDEOS}}/{{doc['video']}}"]


def to_text(doc):
    return doc["caption"]


def process_results(doc, results):
    return temporal_grounding_process_results_generation(doc, results)


def miou(results, args=None):
    return miou_of(results, args)


def iou5(results, args=None):
    return iou5_of(results, args)
"""


@pytest.fixture(scope="module")
def entry_points(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the module path with what an installed framebank says of itself, and no module."""
    folder = tmp_path_factory.mktemp("installed")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder, [n for n in file.namelist() if ".dist-info/" in n])
    wheel.unlink()
    return folder


@pytest.fixture(scope="module")
def task(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a task of lmms-eval, and the records of the same questions beside it."""
    folder = tmp_path_factory.mktemp("task")
    docs, rows = [], []
    for line in (toy / "test.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["task"] != "span":
            continue
        question, answer = (turn["value"] for turn in row["conversations"])
        times = [float(part.partition(">")[0]) for part in answer.split("<t:")[1:]]
        caption = question.removeprefix("<video>\n")
        docs.append({"video": row["video"], "caption": caption, "timestamp": times})
        rows.append(row)
    assert len(docs) > 3
    records = folder / "docs.jsonl"
    records.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (folder / "spans.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "toy_grounding.yaml").write_text(TASK.format(records=records))
    (folder / "utils.py").write_text(UTILS.format(videos=toy / "videos"))
    return folder


@pytest.fixture(scope="module")
def lmms_eval(entry_points: Path, task: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(model_args: str, out: Path) -> subprocess.CompletedProcess[str]:
        paths = [str(ROOT), str(entry_points), *filter(None, sys.path)]
        return subprocess.run(
            [
                *(sys.executable, "-m", "lmms_eval", "--model", "framebank"),
                *("--model_args", model_args, "--tasks", "toy_grounding", "--batch_size", "1"),
                *("--include_path", str(task), "--output_path", str(out), "--log_samples"),
            ],
            cwd=task,
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            | {"HF_HOME": str(out / "hf"), "HF_DATASETS_CACHE": str(out / "datasets")},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.mark.slow
@pytest.mark.parametrize("lape", [True, False])
def test_the_real_package_gives_the_number_that_evaluate_gives(
    lmms_eval: Callable[..., subprocess.CompletedProcess[str]],
    train_here: Callable[..., Path],
    toy: Path,
    toy_bank: Path,
    task: Path,
    tmp_path: Path,
    lape: bool,
) -> None:
    run = train_here(
        tmp_path / "run",
        data_path=task / "spans.jsonl",
        enable_lape=lape,
        max_steps=150,
        per_device_train_batch_size=4,
        learning_rate=3e-3,
    )
    from train.evaluate import main

    main(["--model", str(run), "--bank", str(toy_bank), "--data_path", str(task / "spans.jsonl")])
    ours = json.loads((run / "eval-spans.json").read_text())["tasks"]["span"]
    assert ours["iou"] > 0.3, "it answers in spans"
    done = lmms_eval(f"pretrained={run},tower={toy / 'tower'}", tmp_path / "out")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (written,) = (tmp_path / "out").rglob("*_results.json")
    theirs = json.loads(written.read_text())["results"]["toy_grounding"]
    assert theirs["charades_sta_mIOU,none"] == pytest.approx(100 * ours["iou"], abs=1e-3)
    assert theirs["charades_sta_IOU@5,none"] == pytest.approx(100 * ours["r@0.5"])


def test_coordinates_are_written_as_tasks_read_them() -> None:
    from lmms_eval.tasks.charades_sta.utils import extract_time
    from lmms_eval.tasks.refcoco.utils_rec import parse_float_sequence_within

    from train.lmms_adapter import in_plain_numbers, until

    for said in (
        "from <t:1.500000> to <t:4.250000>",
        "<t:1.500000><t:4.250000>",
        "from 1.5 to 4.25",
    ):
        assert extract_time(in_plain_numbers(said)) == [[1.5, 4.25]]
    for said in (
        "<x:0.100000><y:0.200000><x:0.500000><y:0.600000>",
        "at <x:0.1> <y:0.2> <x:0.5> <y:0.6>",
        "0.100 0.200 0.500 0.600",
        "[0.1, 0.2, 0.5, 0.6]",
    ):
        assert parse_float_sequence_within(in_plain_numbers(said)) == [0.1, 0.2, 0.5, 0.6]
    tube = "<t:0.5><x:0.1><y:0.2><x:0.5><y:0.6> <t:1><x:0.2><y:0.3><x:0.6><y:0.7>"
    assert in_plain_numbers(tube) == "0.5 [0.1, 0.2, 0.5, 0.6] 1 [0.2, 0.3, 0.6, 0.7]"
    assert in_plain_numbers("B.") == "B."
    assert until("yes\n\nno", ["\n\n"]) == "yes"
    assert until("yes", None) == "yes"


def test_what_the_model_cannot_do_is_refused_by_name(trained_run: Path, toy: Path) -> None:
    from PIL import Image

    from shards.errors import UserError
    from train.lmms_adapter import Framebank, check_greedy, with_media

    assert with_media("Why?", 2, "here") == "<video><video>\nWhy?"
    assert with_media("<image>\nWhy?", 1, "here") == "<image>\nWhy?"
    with pytest.raises(UserError, match="here: its text has 1 tags of media for 2 media"):
        with_media("<image>\nWhy?", 2, "here")
    check_greedy({"temperature": 0, "do_sample": False, "num_beams": 1}, "here")
    for settings in ({"do_sample": True, "temperature": 0.7}, {"num_beams": 4}):
        with pytest.raises(UserError, match="here: wants sampling or beams"):
            check_greedy(settings, "here")
    given = {"pretrained": str(trained_run), "tower": str(toy / "tower")}
    with pytest.raises(UserError, match="max_frames_num: not known"):
        Framebank(**given, max_frames_num=4)
    with pytest.raises(UserError, match="batch_size 4"):
        Framebank(**given, batch_size=4)
    with pytest.raises(UserError, match="name the model"):
        Framebank()
    model = Framebank(**given)
    for ask in (model.loglikelihood, model.generate_until_multi_round):
        with pytest.raises(UserError, match="framebank answers tasks of generate_until"):
            ask([])
    with pytest.raises(UserError, match="there: neither a file nor a picture, got dict"):
        model._clip({"array": []}, "there")
    picture = Image.effect_noise((64, 64), 50).convert("RGB")
    path = toy.parent / "picture.png"
    picture.save(path)
    ours, theirs = model._clip(picture, "there"), model._clip(str(path), "there")
    for stride in (4, 8):
        assert (ours.read(stride, [0]) == theirs.read(stride, [0])).all()
    assert ours.info.duration == 0
