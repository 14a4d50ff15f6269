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

Scores are those of `train/evaluate.py`, filed as a control beside the model's: where a model
stays far below them, it does not use what the tower saw; where both are low, the tower is the limit.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from shards.errors import UserError
from shards.signed import Json
from train.data.dataset import open_dataset, open_records
from train.evaluate import strides_of, write
from train.probes.places import Places
from train.probes.spans import Spans
from train.scores.predictions import report_of
from train.scores.results import CONTROLS, results_of
from train.settings.config import TrainConfig
from train.settings.exits import command


@command
def main(argv: list[str]) -> None:
    """Answer what test sets ask about spans or places from the frames alone, and score it."""
    args = arguments(argv)
    strides = strides_of(args.model)
    results = results_of(args.model, args.data_path, None, control="probe")
    probe: Places | Spans
    probe = places_probe(args, strides) if args.places else spans_probe(args, strides)
    for place, path in zip(results, args.data_path, strict=True):
        dataset = open_records(args.bank, [path], *strides)
        # of several clips it is not known which one a question is about
        clips = ((record, dataset.clips(record)) for record in dataset.held_out)
        one = ((record, media[0]) for record, media in clips if len(media) == 1)
        found = [answer for record, medium in one if (answer := probe.answer(record, medium))]
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


def spans_probe(args: argparse.Namespace, strides: tuple[int, int]) -> Spans:
    # a splice of one part each: its reader finds banked stretches and their phrases, nothing is spliced
    scenes = TrainConfig(bank=args.bank, splice_path=args.scenes, splice=["parts=1"])
    scenes = replace(scenes, slow_frame_ratio="1")  # which frames are slow is not asked
    sources = [source for splice in open_dataset(scenes).splices for source in splice.sources]
    # the coarser of the two grids: cells are averaged anyway, and there are fewer to read
    return Spans(sources, strides[1])


def places_probe(args: argparse.Namespace, strides: tuple[int, int]) -> Places:
    dataset = open_records(args.bank, args.places, *strides)
    media = ((record, dataset.clips(record)) for record in dataset.held_out)
    return Places([(record, own[0]) for record, own in media if len(own) == 1], strides[0])


if __name__ == "__main__":
    main(sys.argv[1:])
