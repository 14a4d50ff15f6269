"""What the banked frames say by themselves, with no language model in between: spans, or places.

    python -m train.probe --bank bank --scenes train-scenes.jsonl --data_path test.jsonl --model runs/a
    python -m train.probe --bank bank --places stills.jsonl --data_path test-stills.jsonl --model runs/a

Scenes are rows as those of `splice`: what a stretch of a clip shows. The frames of each meaning
have a mean, and a frame shows that whose mean is nearest (Euclid, cells averaged, at the model's
fast stride). A question about a span that names one of the phrases is answered by the longest run of its
frames.

Places are records of media of one frame: pictures, or stills cut from clips. A small network learns
from a frame's cells (at the model's slow stride) and a question's words what the answer is, and so
answers questions for a point or a box in such media.

Of a record of several questions those are answered that do not see each other, which is so where the
model was trained with `turns: independent`.

Scores are those of `train/evaluate.py`, filed as a control beside the model's: where a model
stays far below them, it does not use what the tower saw; where both are low, the tower is the limit.
"""

import argparse
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from model.config import read_model_config
from shards.errors import UserError
from shards.signed import Json
from train.data.coordinates import UNNAMED
from train.data.dataset import open_dataset, open_records
from train.data.records import Record
from train.evaluate import strides_of, turns_of, write
from train.probes.places import Places
from train.probes.spans import Spans
from train.scores.predictions import report_of
from train.scores.results import CONTROLS, results_of
from train.settings.config import DataSettings, TrainConfig
from train.settings.exits import command


@command
def main(argv: list[str]) -> None:
    """Answer what test sets ask about spans or places from the frames alone, and score it."""
    args = arguments(argv)
    strides = strides_of(args.model)
    results = results_of(args.model, args.data_path, None, control="probe")
    # asked as the model is: questions that do not see each other are one by one
    settings, counts = DataSettings(turns=turns_of(args.model)), counts_of(args.model)
    probe: Places | Spans
    probe = (places_probe if args.places else spans_probe)(args, strides, counts)
    for place, path in zip(results, args.data_path, strict=True):
        dataset = open_records(args.bank, [path], *strides, settings)
        # of several clips it is not known which one a question is about
        clips = ((record, dataset.clips(record)) for record in dataset.held_out)
        one = ((record, media[0]) for record, media in clips if len(media) == 1)
        asked = ((record, turn, medium) for record, medium in one for turn in asked_alone(record))
        found = [answer for question in asked if (answer := probe.answer(*question))]
        if not found:
            raise UserError(
                probe.none,
                got=f"{len(dataset.held_out)} records",
                where=path,
                fix="name rows about what this test set asks for",
            )
        said = [prediction for prediction, _ in found]
        # over frames, not over questions: how often a frame shows its meaning
        hits = [named for _, named in found if named is not None]
        report: Json = {"test_set": place.name, "data_path": place.data_path}
        report |= {name: name == "probe" for name in CONTROLS} | {"records": len(said)}
        report |= report_of(said)
        if hits:
            report["frames_named"] = float(np.concatenate(hits).mean())
        write(place, dataset, report, said, keep=True)
        if others := sum(record.questions for record in dataset.held_out) - len(said):
            print(f"{others} other questions of {path} are not what this probe answers")  # noqa: T201
        if hits:
            print(f"{report['frames_named']:.1%} of the frames in these spans are named right")  # noqa: T201


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m train.probe",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--bank", nargs="+", required=True, help="bank folders")
    learned = parser.add_mutually_exclusive_group(required=True)
    learned.add_argument("--scenes", nargs="+", help="rows as those of splice_path: for spans")
    learned.add_argument("--places", nargs="+", help="records of single frames: for places")
    parser.add_argument("--data_path", nargs="+", required=True, help="records: the test sets")
    parser.add_argument(
        "--model", type=Path, required=True, help="the run beside whose scores it is filed"
    )
    return parser.parse_args(argv)


def asked_alone(record: Record) -> list[int]:
    """Return the turns of answers to questions that nothing was said before."""
    pairs = enumerate(pairwise(turn.role for turn in record.turns), 1)
    turns = [turn for turn, roles in pairs if roles == ("user", "assistant")]
    return turns if record.independent or record.questions == 1 else []


def counts_of(folder: Path) -> tuple[int, int, int]:
    """Return a model's anchors of each axis, by which those named in records are read."""
    model = read_model_config(folder)["model"]
    spatial = model.num_spatial_tokens
    return (model.num_temporal_tokens, spatial, spatial) if model.enable_lape else UNNAMED


def spans_probe(
    args: argparse.Namespace, strides: tuple[int, int], counts: tuple[int, int, int]
) -> Spans:
    # a splice of one part each: its reader finds banked stretches and their phrases, nothing is spliced
    scenes = TrainConfig(bank=args.bank, splice_path=args.scenes, splice=["parts=1"])
    scenes = replace(scenes, slow_frame_ratio="1")  # which frames are slow is not asked
    sources = [source for splice in open_dataset(scenes).splices for source in splice.sources]
    # the coarser of the two grids: cells are averaged anyway, and there are fewer to read
    return Spans(sources, strides[1], counts)


def places_probe(
    args: argparse.Namespace, strides: tuple[int, int], counts: tuple[int, int, int]
) -> Places:
    dataset = open_records(args.bank, args.places, *strides)
    media = ((record, dataset.clips(record)) for record in dataset.held_out)
    return Places([(record, own[0]) for record, own in media if len(own) == 1], strides[0], counts)


if __name__ == "__main__":
    main(sys.argv[1:])
