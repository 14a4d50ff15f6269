"""Score a model on a record file: answers on banked clips, and the held-out losses.

    accelerate launch train/evaluate.py --model runs/a --bank bank --data_path test.jsonl

What is asked is read from the reference: two times are a span, x y a point, x y x y a box, and so on
(`train/scores/kinds.py`). An answer that does not say it counts as 0.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.config import read_model_config
from shards.errors import UserError
from shards.signed import Json, write_atomic
from train.data.dataset import Dataset, open_records
from train.data.drops import add_record_flags, record_settings, write_drops
from train.data.folders import Folders
from train.data.records import Record, duration_before
from train.loop.held_out import held_out_loss
from train.scores.captions import check_captions
from train.scores.kinds import Asked, asked_of
from train.scores.scoring import score
from train.scores.summary import constant_span, summarise_scores, table
from train.settings.config import TrainConfig
from train.settings.exits import command
from train.settings.output import file_problem
from train.start.stage_files import model_problem

if TYPE_CHECKING:
    from accelerate import Accelerator

    from model.vlm import VLM
    from train.batches.loader import Loader


@command
def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model", required=True, type=Path, help="a run's folder or a checkpoint-N"
    )
    parser.add_argument("--bank", required=True, nargs="+", help="bank folders")
    parser.add_argument("--data_path", required=True, nargs="+", help="records, as those of a run")
    parser.add_argument("--output", type=Path, help="where to write [MODEL/eval.json]")
    parser.add_argument("--batch_size", type=int, default=16, help="records answered together [16]")
    parser.add_argument("--max_records", type=int, default=0, help="score only the first N records")
    parser.add_argument(
        "--untrained", action="store_true", help="score the same model before any training step"
    )
    parser.add_argument("--media_dir", default="", help="as that of a run")
    parser.add_argument("--strip_prefix", nargs="+", default=[], help="as those of a run")
    add_record_flags(parser)
    args = parser.parse_args(argv)
    strides = strides_of(args.model)
    name = "eval-untrained.json" if args.untrained else "eval.json"
    output = args.output or args.model / name
    if problem := model_problem(args.model) or report_problem(output):
        raise UserError(problem)
    media = Folders(args.media_dir, tuple(args.strip_prefix))
    dataset = open_records(args.bank, args.data_path, *strides, record_settings(args), media)
    records = dataset.held_out[: args.max_records or None]
    if any(
        asked_of(r, k, r.turns[k].text, 0.0).kind == "caption" for r, k in questions_of(records)
    ):
        check_captions()

    import torch
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    model = untrained(args.model) if args.untrained else load(args.model, dataset)
    model.to(accelerator.device).eval()
    report = evaluate(model, dataset, records, args.batch_size, accelerator)
    if accelerator.is_main_process:
        report["dropped"] = dict(Counter(drop.reason for drop in dataset.drops))
        write_atomic(output, json.dumps(report, indent=2).encode() + b"\n")
        print(table(report))  # noqa: T201
        listed = output.with_suffix(".dropped.jsonl")
        write_drops(listed, dataset.drops)
        for line in [*dataset.notes, *([f"listed in {listed}"] if dataset.drops else [])]:
            print(line)  # noqa: T201
        print(f"written: {output}")  # noqa: T201
    accelerator.end_training()


def strides_of(folder: Path) -> tuple[int, int]:
    """Return the slow and the fast stride of a trained model; UserError where there is none."""
    model = read_model_config(folder)["model"]
    return model.slow_stride, model.fast_stride


def report_problem(path: Path) -> str | None:
    """Return why a report may not be written to a file: said before the scoring, not after."""
    if (problem := file_problem(path)) or not path.exists():
        return problem
    try:
        is_report = "tasks" in json.loads(path.read_bytes())
    except (ValueError, TypeError):
        is_report = False
    return None if is_report else f"{path}: holds something else than a report; name another file"


def load(folder: Path, dataset: Dataset) -> "VLM":
    """Load a model and refuse banks that it was not made for."""
    from model.vlm import VLM
    from shards.format.features import FeatureConfig, differences
    from shards.read.banks import joint

    model = VLM.load(folder)
    theirs = FeatureConfig.from_json(model.features)
    lines = differences(joint(dataset.banks.config), joint(theirs))
    if lines:
        raise UserError(f"the bank's features are not those of {folder}: {'; '.join(lines)}")
    return model


def untrained(folder: Path) -> "VLM":
    """Return a run's model as it was before its first step."""
    from train.start.stage import assemble

    facts = json.loads((folder / "run.json").read_text())
    config = TrainConfig(**facts["config"])
    saved = json.loads((folder / "config.json").read_text())
    return assemble(
        config,
        config.seed,
        saved["model"],
        saved["tower_width"],
        saved["features"],
        saved["tower"],
        print,
    )


def evaluate(
    model: "VLM",
    dataset: Dataset,
    records: Sequence[Record],
    batch_size: int,
    accelerator: "Accelerator",
) -> Json:
    """Return losses and scores of a model over records, the same on every rank."""
    from accelerate.utils import gather_object

    from model.family.conformance import admit
    from train.batches.chat import Chat
    from train.batches.loader import Loader

    admit(model)
    chat = Chat.of(model)
    loader = Loader(dataset, chat, model.config)
    rank, world = accelerator.process_index, accelerator.num_processes
    losses = held_out_loss(model, loader, records, batch_size, accelerator)
    questions = questions_of(records)
    mine = questions[rank::world]
    own = []
    for begin in range(0, len(mine), batch_size):
        own += answer(model, loader, mine[begin : begin + batch_size])
    # dealt out in turn over the ranks, and put back into the order of the records
    gathered = gather_object([(rank + k * world, pair) for k, pair in enumerate(own)])
    pairs = [pair for _, pair in sorted(gathered, key=lambda numbered: numbered[0])]
    asked, said = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    scores = [score(*pair) for pair in pairs]
    report: Json = {"records": len(records), "answers": len(pairs), "losses": losses}
    report["tasks"] = summarise_scores(asked, said, scores)
    constant = constant_span(asked)
    if constant is not None:
        report["constant_span_miou"] = constant
    report["examples"] = [
        {"record": record.id, "reference": about.reference, "answer": text}
        for (record, _), (about, text) in zip(questions[:20], pairs, strict=False)
    ]
    return report


def questions_of(records: Sequence[Record]) -> list[tuple[Record, int]]:
    """Return (record, number of the turn) for each answer of some records."""
    return [
        (record, k)
        for record in records
        for k, turn in enumerate(record.turns)
        if turn.role == "assistant"
    ]


def answer(
    model: "VLM", loader: "Loader", questions: Sequence[tuple[Record, int]]
) -> list[tuple[Asked, str]]:
    """Return what each question asks for, and the model's answer."""
    from model.batch import to_device
    from model.generate import generate, write_answer

    batch = to_device(loader.prompts(questions), device_of(model))
    out = []
    for (record, turn), said in zip(
        questions, generate(model, batch, stop=loader.chat.stop), strict=True
    ):
        durations = [clip.info.duration for clip in loader.dataset.clips(record)]
        duration = duration_before(record, durations, turn)
        reference = loader.chat.in_numbers(record.turns[turn].text, duration)
        about = asked_of(record, turn, reference, duration)
        out.append((about, write_answer(model, said, duration)))
    return out


def device_of(model: "VLM") -> Any:
    return model.visual.frame_end.device


if __name__ == "__main__":
    main(sys.argv[1:])
