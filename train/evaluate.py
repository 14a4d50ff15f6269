"""Score a model on a record file: answers on banked clips, and the held-out losses.

    accelerate launch train/evaluate.py --model runs/a --bank bank --data_path test.jsonl

What is asked is read from the reference's markup: two times are a span, x y a point, x y x y a
box, anything else text. Unparsable answers count as 0.
"""

import argparse
import json
import math
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shards.reader import Banks
from train.config import TrainConfig, refuse
from train.dataset import Dataset, local_copies, shorten
from train.records import MARKUP, Record, check_coordinates, join, kind_of, read_records

if TYPE_CHECKING:
    from accelerate import Accelerator

    from model.vlm import VLM
    from train.loader import Loader

Json = dict[str, Any]
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
RECALLS = (0.3, 0.5, 0.7)


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
    args = parser.parse_args(argv)
    dataset = open_records(args.bank, args.data_path, args.model, args.allow_outside)

    import torch
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    try:
        model = untrained(args.model) if args.untrained else load(args.model, dataset)
    except ValueError as error:
        refuse([str(error)])
    model.to(accelerator.device).eval()
    records = dataset.held_out[: args.max_records or None]
    report = evaluate(model, dataset, records, args.batch_size, accelerator)
    if accelerator.is_main_process:
        name = "eval-untrained.json" if args.untrained else "eval.json"
        output = args.output or args.model / name
        output.write_text(json.dumps(report, indent=2) + "\n")
        print(table(report))  # noqa: T201
        print(f"written: {output}")  # noqa: T201
    accelerator.end_training()


def open_records(
    bank: Sequence[str], paths: Sequence[str], folder: Path, allow_outside: bool = False
) -> Dataset:
    """Open banks and records and join them; print every problem and exit with 2."""
    problems: list[str] = []
    if not (folder / "config.json").exists():
        problems.append(f"--model {folder}: no trained model here (config.json is missing)")
    records: list[Record] = []
    banks = None
    try:
        banks = Banks.open(bank)
    except ValueError as error:
        problems.append(str(error))
    for path in local_copies(paths, problems):
        read = read_records(path, problems, allow_outside=allow_outside)
        if banks:
            records += join(read, banks, "error", problems)
    for record in records:
        assert banks is not None
        check_coordinates(record, [banks.clip(id_).info.duration for id_ in record.clips], problems)
    if banks is None or problems:
        refuse(shorten(problems))
    facts = json.loads((folder / "config.json").read_text())["model"]
    return Dataset(banks, (), records, Counter(), facts["slow_stride"], facts["fast_stride"])


def load(folder: Path, dataset: Dataset) -> "VLM":
    """Load a model and refuse banks that it was not made for."""
    from model.vlm import VLM
    from shards.reader import joint
    from shards.schema import FeatureConfig, differences

    model = VLM.load(folder)
    theirs = FeatureConfig.from_json(model.features)
    lines = differences(joint(dataset.banks.config), joint(theirs))
    if lines:
        raise ValueError(f"the bank's features are not those of {folder}: {'; '.join(lines)}")
    return model


def untrained(folder: Path) -> "VLM":
    """Return a run's model as it was before its first step."""
    from train.stage import assemble

    facts = json.loads((folder / "run.json").read_text())
    config = TrainConfig(**facts["config"])
    saved = json.loads((folder / "config.json").read_text())
    return assemble(
        config, saved["model"], saved["tower_width"], saved["features"], saved["tower"], print
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

    from train.chat import Chat
    from train.loader import Loader

    chat = Chat(model.tokenizer, model.lape.tokens if model.lape else None)
    loader = Loader(dataset, chat, model.config)
    rank, world = accelerator.process_index, accelerator.num_processes
    losses = held_out_loss(model, loader, records, batch_size, accelerator)
    questions = [question for record in records for question in questions_of(record)]
    mine = questions[rank::world]
    own = []
    for begin in range(0, len(mine), batch_size):
        own += answer(model, loader, mine[begin : begin + batch_size])
    # dealt out in turn over the ranks, and put back into the order of the records
    gathered = gather_object([(rank + k * world, said) for k, said in enumerate(own)])
    answers = [said for _, said in sorted(gathered)]
    scores = [score(reference, said, duration) for reference, said, duration, _ in answers]
    report: Json = {"records": len(records), "answers": len(answers), "losses": losses}
    report["tasks"] = summarise_scores(scores)
    spans = [(ref, duration) for ref, _, duration, _ in answers if kind_of(ref) == "span"]
    if spans:
        report["constant_span_miou"] = constant_span(spans)
    report["examples"] = [
        {"record": id_, "reference": ref, "answer": said} for ref, said, _, id_ in answers[:20]
    ]
    return report


def held_out_loss(
    model: "VLM",
    loader: "Loader",
    records: Sequence[Record],
    size: int,
    accelerator: "Accelerator",
) -> Json:
    """Return the metrics of records that are not trained on, `size` at a time; ranks share them."""
    import torch

    from model.batch import to_device
    from train.metrics import NUM_SUMS, summarise, sums_of

    was_training = model.training
    model.eval()
    # a row for each batch, so that they are added up in the same order on any number of ranks
    sums = torch.zeros(-(-len(records) // size), NUM_SUMS, dtype=torch.float64)
    sums = sums.to(accelerator.device)
    rank, world = accelerator.process_index, accelerator.num_processes
    for begin in range(rank * size, len(records), size * world):
        batch = loader.batch(records[begin : begin + size], with_copy=True)
        batch = to_device(batch, accelerator.device)
        with torch.no_grad(), accelerator.autocast():
            sums[begin // size] = sums_of(model(batch), batch)
    model.train(was_training)
    total = accelerator.reduce(sums, reduction="sum").sum(dim=0)
    return summarise(total, model.config.loss_weight)


def questions_of(record: Record) -> list[tuple[Record, str]]:
    """Return (prompt, reference) for each answer of a record; earlier answers stay in the prompt."""
    return [
        (Record(record.id, record.clips, record.turns[:k], record.task, record.where), turn.text)
        for k, turn in enumerate(record.turns)
        if turn.role == "assistant"
    ]


def answer(
    model: "VLM", loader: "Loader", questions: Sequence[tuple[Record, str]]
) -> list[tuple[str, str, float, str]]:
    """Return (reference, answer, seconds of the clip, record id) of some questions."""
    from model.batch import to_device
    from model.generate import generate, write_answer

    records = [record for record, _ in questions]
    batch = to_device(loader.batch(records, prompt=True), device_of(model))
    pieces = generate(model, batch, stop=loader.chat.stop)
    durations = [first_duration(loader.dataset, record) for record in records]
    return [
        (
            loader.chat.in_numbers(reference, duration),
            write_answer(model, said, duration),
            duration,
            record.id,
        )
        for (record, reference), said, duration in zip(questions, pieces, durations, strict=True)
    ]


def device_of(model: "VLM") -> Any:
    return model.visual.frame_end.device


def first_duration(dataset: Dataset, record: Record) -> float:
    return dataset.clips(record)[0].info.duration if record.clips else 0.0


def numbers_of(text: str) -> list[float]:
    """Return the numbers of an answer: those in markup where there is any, else the plain ones."""
    marked = [float(match.group(2)) for match in MARKUP.finditer(text) if match.group(2)]
    return marked or [float(number) for number in NUMBER.findall(text)]


def score(reference: str, said: str, duration: float) -> Json:
    """Return the scores of one answer, by what its reference is; unparsable answers get 0."""
    kind = kind_of(reference)
    if kind == "text":
        same = " ".join(said.lower().split()) == " ".join(reference.lower().split())
        return {"kind": kind, "exact": float(same)}
    truth, guess = numbers_of(reference), numbers_of(said)
    parsed = len(guess) >= len(truth)
    out: Json = {"kind": kind, "parsed": float(parsed)}
    guess = guess[: len(truth)]
    if kind == "span":
        out["iou"] = interval_iou(truth, guess) if parsed else 0.0
        out |= {f"r@{level}": float(out["iou"] >= level) for level in RECALLS}
    elif kind == "box":
        out["iou"] = box_iou(truth, guess) if parsed else 0.0
    # an unparsable answer errs by the whole range
    error = [abs(a - b) for a, b in zip(truth, guess, strict=True)] if parsed else []
    limit = duration if kind in ("span", "time") else 1.0
    out["error"] = sum(error) / len(error) if error else limit
    return out


def interval_iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the overlap of two intervals over their union; an inverted one is put in order."""
    a, b = sorted(a), sorted(b)
    union = max(a[1], b[1]) - min(a[0], b[0])
    return max(0.0, min(a[1], b[1]) - max(a[0], b[0])) / union if union > 0 else 0.0


def box_iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the overlap of two boxes x1 y1 x2 y2 over their union."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1]) for box in (a, b)]
    union = sum(areas) - width * height
    return width * height / union if union > 0 else 0.0


def constant_span(spans: Sequence[tuple[str, float]]) -> float:
    """Return the mIoU of the best single answer, as shares of the clip, found with the answers known.

    A model that has not looked at the videos cannot do better.
    """
    shares = [[n / duration for n in numbers_of(reference)] for reference, duration in spans]
    grid = [k / 20 for k in range(21)]
    guesses = [(start, end) for start in grid for end in grid if start < end]
    return max(sum(interval_iou(share, guess) for share in shares) for guess in guesses) / len(
        shares
    )


def summarise_scores(scores: Sequence[Json]) -> Json:
    """Return the mean of each score, by kind."""
    by_kind: dict[str, list[Json]] = defaultdict(list)
    for entry in scores:
        by_kind[entry["kind"]].append(entry)
    return {
        kind: {"count": len(entries)}
        | {
            name: math.fsum(entry[name] for entry in entries) / len(entries)
            for name in entries[0]
            if name != "kind"
        }
        for kind, entries in sorted(by_kind.items())
    }


def table(report: Json) -> str:
    """Return a report as people read it."""
    losses = report["losses"]
    lines = [f"{report['records']} records, {report['answers']} answers"]
    shown = ("ce_loss", "autoregressive_loss", "ar_copy_baseline", "ar_skill")
    lines.append("  ".join(f"{name} {losses[name]:.4f}" for name in shown if name in losses))
    for kind, entry in report["tasks"].items():
        parts = [f"{kind:6} n={entry['count']:<5}"]
        parts += [f"{name} {value:.3f}" for name, value in entry.items() if name != "count"]
        lines.append("  ".join(parts))
    if "constant_span_miou" in report:
        lines.append(f"best constant span: mIoU {report['constant_span_miou']:.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main(sys.argv[1:])
