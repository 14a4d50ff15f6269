"""Score a model on a record file: answers on banked clips, and the held-out losses.

    accelerate launch train/evaluate.py --model runs/a --bank bank --data_path test.jsonl

What is asked is read from the reference: two times are a span, x y a point, x y x y a box, and so on
(`train/scores/kinds.py`). An answer that does not say it counts as 0.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shards.errors import UserError
from shards.signed import Json
from train.data.dataset import Dataset, open_records
from train.data.folders import Folders
from train.data.records import Record, duration_before
from train.loop.held_out import held_out_loss
from train.scores.captions import check_captions
from train.scores.kinds import Asked, asked_of
from train.scores.scoring import score
from train.scores.summary import constant_span, summarise_scores, table
from train.settings.config import TrainConfig
from train.settings.exits import command

if TYPE_CHECKING:
    from accelerate import Accelerator

    from model.vlm import VLM
    from train.batches.loader import Loader
    from train.loop.floor import Floor


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
    parser.add_argument(
        "--allow_outside", action="store_true", help="records may name videos by absolute paths"
    )
    parser.add_argument("--media_dir", default="", help="as that of a run")
    parser.add_argument("--strip_prefix", nargs="+", default=[], help="as those of a run")
    args = parser.parse_args(argv)
    strides = strides_of(args.model)
    dataset = open_records(
        args.bank,
        args.data_path,
        *strides,
        allow_outside=args.allow_outside,
        media=Folders(args.media_dir, tuple(args.strip_prefix)),
    )
    records = dataset.held_out[: args.max_records or None]
    if any(
        asked_of(r, k, r.turns[k].text, 0.0).kind == "caption" for r, k in questions_of(records)
    ):
        check_captions()

    import torch
    from accelerate import Accelerator

    from train.loop.floor import floor_of_model

    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    model = untrained(args.model) if args.untrained else load(args.model, dataset)
    model.to(accelerator.device).eval()
    floor = floor_of_model(args.model, model.config)
    report = evaluate(model, dataset, records, args.batch_size, accelerator, floor)
    if accelerator.is_main_process:
        name = "eval-untrained.json" if args.untrained else "eval.json"
        output = args.output or args.model / name
        output.write_text(json.dumps(report, indent=2) + "\n")
        print(table(report))  # noqa: T201
        print(f"written: {output}")  # noqa: T201
    accelerator.end_training()


def strides_of(folder: Path) -> tuple[int, int]:
    """Return the slow and the fast stride of a trained model; UserError where there is none."""
    if not (folder / "config.json").exists():
        raise UserError("no trained model here (config.json is missing)", where=f"--model {folder}")
    facts = json.loads((folder / "config.json").read_text())["model"]
    return facts["slow_stride"], facts["fast_stride"]


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
    floor: "Floor | None" = None,
) -> Json:
    """Return losses and scores of a model over records, the same on every rank.

    floor: what the frame-causal loss is read against.
    """
    from accelerate.utils import gather_object

    from model.family.conformance import admit
    from train.batches.chat import Chat
    from train.batches.loader import Loader

    admit(model)
    chat = Chat.of(model)
    loader = Loader(dataset, chat, model.config)
    rank, world = accelerator.process_index, accelerator.num_processes
    losses = held_out_loss(model, loader, records, batch_size, accelerator, floor)
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
