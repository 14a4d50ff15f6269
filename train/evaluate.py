"""Score a model on record files: answers on banked clips, and the held-out losses.

    accelerate launch train/evaluate.py --model runs/a --bank bank --data_path test.jsonl
    python train/evaluate.py --rescore runs/a/predictions-test.jsonl     # no model is needed

The kind of answer follows from the reference: two times are a span, x y a point, x y x y a box, and so
on (`train/scores/kinds.py`). An answer from which it cannot be read counts as 0. Each file of
--data_path is a test set: its scores go to MODEL/eval-NAME.json, every answer to
MODEL/predictions-NAME.jsonl. Records are cut to the token limits of the model's training.
"""

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from model.config import TURNS, read_model_config
from shards.errors import UserError
from shards.format.features import FeatureConfig
from shards.read.banks import Banks, arithmetic_note, conflicts
from shards.signed import Json, write_atomic
from train.answers import (
    FEWEST_NEW_TOKENS,
    check_lengths,
    evaluate,
    foresee,
    loader_of,
    new_tokens,
    questions_of,
)
from train.data.dataset import Dataset, open_records
from train.data.drops import add_record_flags, record_settings, write_drops
from train.data.records import Record
from train.data.swapped import SwappedDataset
from train.pages.read.foreseen import write_foreseen
from train.scores.captions import check_captions
from train.scores.kinds import asked_of
from train.scores.predictions import Prediction, read_predictions, report_of, write_predictions
from train.scores.results import (
    CONTROLS,
    Results,
    foreseen_beside,
    predictions_beside,
    report_beside,
    report_problem,
    results_of,
)
from train.scores.summary import table
from train.settings.ancestors import accelerate_words
from train.settings.config import TrainConfig
from train.settings.exits import command
from train.settings.folders import Folders
from train.settings.launcher import wishes
from train.settings.output import read_object
from train.settings.recorded import limit_of_run, trained_with
from train.start.stage_files import model_problem
from train.sweep.record import problem_of_report

if TYPE_CHECKING:
    from model.vlm import VLM

SCORED = "answers", "tasks", "questions", "cut", "off_scale", "constant_span_miou", "examples"
"""Fields of a report that depend on its answers, which --rescore replaces."""


@command
def main(argv: list[str]) -> None:
    args = arguments(argv)
    if args.rescore:
        rescore(args.rescore, args.output)
        return
    # -- everything that can be refused, before an answer is generated
    if problems := wishes(os.environ, accelerate_words(argv)).problems:
        raise UserError.of(problems)
    strides = strides_of(args.model)
    if problem := model_problem(args.model):
        raise UserError(problem)
    limit = limit_of_run(args.model) if args.max_tokens is None else args.max_tokens
    results = places(args)
    settings = replace(record_settings(args), turns=args.turns or turns_of(args.model))
    how = (*strides, settings, Folders(args.media_dir, tuple(args.strip_prefix)), args.turns or "")
    sets = [open_records(args.bank, [path], *how) for path in args.data_path]
    # another clip's frames under the same questions: what is still scored, the text gives away
    if args.control == "shuffled":
        sets = [SwappedDataset.of(dataset) for dataset in sets]
    records = [dataset.held_out[: args.max_records or None] for dataset in sets]
    for own in records:
        check_questions(own)
        check_turns(own, settings.turns, args.model)
    if args.untrained:
        untrained_config(args.model)

    import torch
    from accelerate import Accelerator

    from model.family.conformance import admit
    from train.loop.floor import floor_of_model

    # -- the model, and the banks it is scored on
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    model = (untrained if args.untrained else load)(args.model).to(accelerator.device).eval()
    sets = [of_its_features(dataset, model, args.model) for dataset in sets]
    # questions that do not see each other take a mask that not every LLM keeps to
    admit(model, apart=any(record.independent for own in records for record in own))
    # baselines fitted on the training clips: fitted on the test clips they would be too good
    floor = floor_of_model(args.model, model.config)
    loaders = [loader_of(model, dataset, limit) for dataset in sets]
    caps = [
        new_tokens(loader, questions_of(own), args.max_new_tokens)
        for loader, own in zip(loaders, records, strict=True)
    ]
    for loader, own, most in zip(loaders, records, caps, strict=True):
        check_lengths(model, loader, questions_of(own), most)

    # -- answers and losses, a test set after the other
    for place, loader, own, most in zip(results, loaders, records, caps, strict=True):
        report, said = evaluate(model, loader, own, args.batch_size, most, accelerator, floor)
        if accelerator.is_main_process:
            about: Json = {"test_set": place.name, "data_path": place.data_path}
            about |= {name: args.control == name for name in CONTROLS} | {"turns": how_asked(own)}
            write(place, loader.dataset, about | report, said, keep=args.output is None)
            if not args.control:
                write_foreseen(
                    foreseen_beside(place.report), foresee(model, loader, own, accelerator)
                )
    accelerator.end_training()


def arguments(argv: list[str]) -> argparse.Namespace:
    """Return the parsed arguments; UserError for numbers out of range."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", type=Path, help="a run's folder or a checkpoint-N")
    parser.add_argument("--bank", nargs="+", help="bank folders")
    parser.add_argument("--data_path", nargs="+", help="records, as those of a run: the test sets")
    parser.add_argument(
        "--rescore", type=Path, help="score the answers of a predictions-NAME.jsonl"
    )
    parser.add_argument("--output", type=Path, help="where to write [MODEL/eval-NAME.json]")
    parser.add_argument("--batch_size", type=int, default=16, help="records answered together [16]")
    parser.add_argument("--max_records", type=int, default=0, help="score only the first N records")
    parser.add_argument(
        "--max_new_tokens",
        type=int,
        help=f"tokens of an answer at most [{FEWEST_NEW_TOKENS}, or twice the longest reference of "
        "its kind]",
    )
    parser.add_argument(
        "--max_tokens", type=int, help="tokens of a record at most, 0: no limit [as in training]"
    )
    parser.add_argument(
        "--untrained", action="store_true", help="score the same model before any training step"
    )
    parser.add_argument(
        "--shuffle_features",
        action="store_true",
        help="score the model with the features of another clip of the test set for each",
    )
    parser.add_argument(
        "--turns",
        choices=TURNS,
        help="whether a question is asked after those before it in its record, or alone [as in "
        "training]",
    )
    parser.add_argument("--media_dir", default="", help="as that of a run")
    parser.add_argument("--strip_prefix", nargs="+", default=[], help="as those of a run")
    add_record_flags(parser, "missing")
    args = parser.parse_args(argv)
    if args.untrained and args.shuffle_features:
        parser.error("--untrained and --shuffle_features are a control each: take one of them")
    args.control = "untrained" if args.untrained else "shuffled" * args.shuffle_features
    # not required=True: --rescore needs none of them
    needed = [name for name in ("model", "bank", "data_path") if not getattr(args, name)]
    if needed and not args.rescore:
        parser.error(f"the following arguments are required: --{', --'.join(needed)}")
    least = {"batch_size": 1, "max_records": 0, "max_new_tokens": 1, "max_tokens": 0}
    if problems := [
        f"--{name}: must be at least {number}, got {getattr(args, name)}"
        for name, number in least.items()
        if getattr(args, name) is not None and getattr(args, name) < number
    ]:
        raise UserError.of(problems)
    return args


def places(args: argparse.Namespace) -> list[Results]:
    """Return the files of each test set; UserError where they cannot be written, or are a sweep's."""
    results = results_of(args.model, args.data_path, args.output, control=args.control)
    if problems := list(filter(None, (problem_of_report(own.report) for own in results))):
        raise UserError.of(problems)
    return results


def rescore(path: Path, output: Path | None) -> None:
    """Score the answers of a file, and write report and answers with the new scores."""
    predictions = read_predictions(path)
    report_path = output or report_beside(path)
    problem = report_problem(report_path)
    # a sweep's own answers may be scored again in their place, others may not take it
    if not problem and output and predictions_beside(output).resolve() != path.resolve():
        problem = problem_of_report(output)
    if problem:
        raise UserError(problem)
    # losses and limits cannot be computed without the model: they stay as they were
    known = {k: v for k, v in read_object(report_beside(path)).items() if k not in SCORED}
    report = {"records": len({p.record for p in predictions})} | known | report_of(predictions)
    write_predictions(predictions_beside(report_path), predictions)
    write_atomic(report_path, json.dumps(report, indent=2).encode() + b"\n")
    print(f"{table(report)}\nwritten: {report_path}")  # noqa: T201


def strides_of(folder: Path) -> tuple[int, int]:
    """Return the slow and the fast stride of a trained model; UserError where there is none."""
    model = read_model_config(folder)["model"]
    return model.slow_stride, model.fast_stride


def check_questions(records: Sequence[Record]) -> None:
    """Raise UserError where no record has an answer, or pycocoevalcap is missing for captions."""
    questions = questions_of(records)
    if not questions:
        raise UserError("no record has an answer to be scored against")
    # pycocoevalcap is an extra, and would be missed after all answers were generated
    if any(asked_of(r, k, r.turns[k].text, 0.0).kind == "caption" for r, k in questions):
        check_captions()


def turns_of(folder: Path) -> str:
    """Return the kind of turns in a model's training: one of `TURNS`, or mixed."""
    return str(read_model_config(folder)["model"].turns)


def how_asked(records: Sequence[Record]) -> str:
    """Return how records of several questions ask these: one of `TURNS`, or mixed; empty without any."""
    kinds = {TURNS[record.independent] for record in records if record.questions > 1}
    return "mixed" if len(kinds) > 1 else "".join(kinds)


def check_turns(records: Sequence[Record], turns: str, folder: Path) -> None:
    """Raise UserError where nothing says whether questions of a record see each other.

    So it is with a model whose training had both, for records of several questions that do not say it.
    """
    if turns == "mixed" and how_asked(records) in ("dialogue", "mixed"):
        raise UserError(
            "some of its training's datasets had questions that see those before them, others not",
            where=folder,
            fix="choose for these: --turns dialogue, or --turns independent",
        )


def load(folder: Path) -> "VLM":
    """Return a trained model."""
    from model.vlm import VLM

    return VLM.load(folder)


def of_its_features(dataset: Dataset, model: "VLM", folder: Path) -> Dataset:
    """Return a test set, with a note where its features are rounded otherwise than the model's.

    Raises UserError for banks of other features than a model was trained on.
    """
    check_features(model, dataset.banks, folder)
    note = arithmetic_note(dataset.banks, model.features["tower_dtype"])
    return replace(dataset, notes=(*dataset.notes, *note))


def check_features(model: "VLM", banks: Banks, folder: Path) -> None:
    """Raise UserError where banks hold other features than a model was trained on."""
    theirs = FeatureConfig.from_json(model.features)
    lines = conflicts(banks.config, theirs)
    if lines:
        raise UserError(f"the bank's features are not those of {folder}: {'; '.join(lines)}")


def untrained_config(folder: Path) -> TrainConfig:
    """Return the settings of a model's run; UserError where its folder does not record them."""
    config = trained_with(folder)
    if config is None:
        raise UserError(
            "no run.json here, which says how the model was before its first step",
            where=folder,
            fix="name the run's own folder, or leave out --untrained",
        )
    return TrainConfig(**config)


def untrained(folder: Path) -> "VLM":
    """Return a run's model as it was before its first step."""
    from train.start.stage import assemble

    config = untrained_config(folder)
    # features and tower as saved with the model: the banks of its run may be gone
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


def write(
    place: Results, dataset: Dataset, report: Json, said: Sequence[Prediction], *, keep: bool
) -> None:
    """Write and print a test set's results; keep: rename results of other records of this name."""
    report["dropped"] = dict(Counter(drop.reason for drop in dataset.drops))
    lines = [f"{place.name}: {table(report)}", *dataset.notes]
    if keep and (moved := place.set_aside()):
        lines.append(f"results of other records are now {', '.join(map(str, moved))}")
    write_predictions(place.predictions, said)
    write_atomic(place.report, json.dumps(report, indent=2).encode() + b"\n")
    listed = place.report.with_suffix(".dropped.jsonl")
    write_drops(listed, dataset.drops)
    lines += [f"listed in {listed}"] if dataset.drops else []
    print("\n".join([*lines, f"written: {place.report}, {place.predictions.name}"]))  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1:])
