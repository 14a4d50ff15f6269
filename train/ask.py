"""Ask a trained model about a raw video; times come back as seconds, places as pixels.

    python train/ask.py clip.mp4 "When is the red circle visible?" --model runs/a
    python train/ask.py clip.mp4 "When is ...?" --model runs/a --show asked.png --truth test.jsonl

The clip goes through the same sampling, tower and pooling as `preprocess encode`. The picture shows
its frames, with the spans and boxes of the answer over the true ones.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from preprocess.decode.child import DecodeChild
from preprocess.decode.request import ReadRequest
from shards.annotations.forms import MEDIA_TAG
from shards.errors import UserError
from shards.format.features import FeatureConfig, Sampling
from shards.format.plan import TOWER_THREADS
from shards.hub import absent
from shards.read.bank import ClipInfo, of_units
from shards.signed import Json
from train.data.coordinates import settled
from train.data.markup import MARKUP, SHARE
from train.data.records import Record, Turn, read_records
from train.pointed import pointed
from train.scores.kinds import asked as asked_of_text
from train.scores.scoring import score
from train.settings.exits import command
from train.settings.output import file_problem

if TYPE_CHECKING:
    from PIL.Image import Image

    from model.tower.tower import Tower


@dataclass(frozen=True)
class FreshClip:
    """A clip's features, just made by the tower."""

    info: ClipInfo
    features: dict[int, np.ndarray]

    def read(self, stride: int, frames: Sequence[int]) -> np.ndarray:
        return self.features[stride][list(frames)]


@command
def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("video", type=Path)
    parser.add_argument("question")
    parser.add_argument(
        "--model", required=True, type=Path, help="a run's folder or a checkpoint-N"
    )
    parser.add_argument(
        "--tower", help="where the vision tower lies now [as when the bank was made]"
    )
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--show", type=Path, metavar="PNG", help="draw the answer over the frames")
    parser.add_argument(
        "--truth",
        metavar="ANSWER",
        help="drawn too: the right answer, such as 'from <t:1.5> to <t:2.875>', or a file of records "
        "in which this video is asked this question",
    )
    args = parser.parse_args(argv)
    if args.truth and not args.show:
        raise UserError("--truth is drawn, and nothing is", fix="name a picture with --show")
    if args.show:
        check_picture(args.show)
    truth = find_truth(args.truth, args.video, args.question) if args.truth else ""
    answer = ask(args.video, args.question, args.model, args.tower, args.max_new_tokens, truth)
    print(in_pixels(answer.said, answer.clip.display_size))  # noqa: T201
    if args.show:
        draw_answer(answer, args.question, args.video).save(args.show)
        print(args.show)  # noqa: T201


@dataclass(frozen=True)
class Answer:
    """Texts with markup: times in seconds of the clip, places as fractions of the frame."""

    said: str
    truth: str
    clip: ClipInfo
    sampling: Sampling


def ask(
    video: Path,
    question: str,
    folder: Path,
    tower: str | None,
    max_new_tokens: int,
    truth: str = "",
) -> Answer:
    """Return a model's answer about a video; truth: the right one, where it is known."""
    from model.family.conformance import admit
    from model.generate import generate, write_answer
    from model.vlm import VLM, read_model_config
    from train.batches.chat import Chat
    from train.batches.collate import collate, lay_out

    read_model_config(folder)
    model = VLM.load(folder).eval()
    admit(model)
    features = FeatureConfig.from_json(model.features)
    name = tower or find_tower(model.tower, folder)
    with DecodeChild() as child:
        clip = fresh_clip(video, features, load_tower(features, name), child)
    chat = Chat.of(model)
    turns = asked(question, clip.info)
    truth = asked(question, clip.info, truth)[1].text
    encoded = chat.encode(turns, [clip.info.duration], answer=1)
    row = lay_out(encoded, [clip.info], model.config, features.pool, stamp=chat.stamp)
    batch = collate([row], [[clip]], model.config, [str(video)])
    pieces = generate(model, batch, stop=chat.stop, max_new_tokens=max_new_tokens)[0]
    said = write_answer(model, pieces, clip.info.duration)
    truth = chat.in_numbers(truth, clip.info.duration)
    return Answer(said, truth, clip.info, features.sampling)


def asked(question: str, clip: ClipInfo, answer: str = "") -> list[Turn]:
    """Return the turns of a question; UserError for a time or place that its clip does not have."""
    turns = (Turn("user", f"<video>\n{question}"), Turn("assistant", answer))
    if MEDIA_TAG.search(question):  # the chat says that it has no medium for it
        return list(turns)
    asked_record = Record(clip.id, (clip.id,), turns, "", "the question")
    record, _, problems = settled(asked_record, [clip.duration], clip=False)
    if problems:
        raise UserError.of(
            f"{problem.where}: {problem.what}; times are seconds of the clip, which lasts "
            f"{clip.duration:.2f}, places fractions of the frame"
            for problem in problems
        )
    return list(record.turns)


def find_tower(name: str, folder: Path) -> str:
    """Return where a tower lies that was named from another working directory, else its name.

    It is looked for from here, then from the folders above the model and above the banks of its run.
    The digest tells later whether it is the one.
    """
    if Path(name).exists() or Path(name).is_absolute():
        return name
    above = [folder.resolve(), *folder.resolve().parents]
    runs = [place / "run.json" for place in above[:2]]
    run: Json = next((json.loads(path.read_text()) for path in runs if path.is_file()), {})
    banks = [base / bank for bank in run.get("config", {}).get("bank", []) for base in above]
    for bank in banks:
        if bank.is_dir():
            above += [place for place in bank.resolve().parents if place not in above]
    return next((str(base / name) for base in above if (base / name).is_dir()), name)


def load_tower(features: FeatureConfig, name: str) -> "Tower":
    """Load the tower that made some features; UserError where it is another one."""
    from model.tower.tower import Tower

    if why := absent(name):
        raise UserError(why, where=f"tower {name}", fix="say with --tower where it lies now")
    tower = Tower.load(
        name, layer=features.layer, dtype=features.tower_dtype, attention=features.attention
    )
    if tower.digest != features.tower_digest:
        raise UserError(
            "not the tower that the model was trained on (digest "
            f"{tower.digest[:12]}, expected {features.tower_digest[:12]})",
            where=f"tower {name}",
            fix="name it with --tower",
        )
    if tower.pixels.to_json() != features.processor:
        raise UserError(
            f"tower {name}: its image processor has other values than when the bank was made: "
            f"{tower.pixels.to_json()}, expected {features.processor}"
        )
    return tower


def fresh_clip(
    video: Path, features: FeatureConfig, tower: "Tower", child: DecodeChild
) -> FreshClip:
    """Return a video's features exactly as `preprocess encode` would bank them."""
    if not video.exists():
        raise UserError("no such file", where=video)
    clip = child.read_clip(ReadRequest(video, features.sampling, pixels=tower.pixels))
    height, width = clip.display_size
    stored, _ = tower.features(
        clip.frames,
        features.strides,
        pool_mode=features.pool,
        dtype=features.dtype,
        threads=TOWER_THREADS,
    )
    timestamps, frame_index = of_units(clip.timestamps, clip.frame_index, tower.frames_per_unit)
    info = ClipInfo(
        id=str(video),
        start=clip.start,
        end=clip.end,
        timestamps=timestamps,
        frame_index=frame_index,
        display_size=(height, width),
        patch_grid=tower.grid_of(height, width),
        covered=tower.covered(height, width),
    )
    return FreshClip(info, stored)


def check_picture(path: Path) -> None:
    """Refuse a picture that cannot be written, before a model is asked."""
    from PIL import Image

    if problem := file_problem(path):
        raise UserError(problem, where="--show")
    if path.suffix.lower() not in Image.registered_extensions():
        raise UserError("no format of pictures", got=path.name, expected="a .png", where="--show")


def find_truth(truth: str, video: Path, question: str) -> str:
    """Return the right answer: the text itself, or the answer in a file of records."""
    if not Path(truth).exists():
        if MARKUP.search(truth) or SHARE.search(truth):
            return truth
        raise UserError(
            "no such file, and no answer with times or places",
            got=repr(truth),
            expected="a file of records, or an answer such as 'from <t:1.5> to <t:2.875>'",
            where="--truth",
        )
    problems: list[str] = []
    found = set()
    for record in read_records(truth, problems):
        if any(f"/{video.absolute().as_posix()}".endswith(f"/{clip}") for clip in record.clips):
            for one, other in pairwise(record.turns):
                if one.role == "user" and MEDIA_TAG.sub("", one.text).strip() == question.strip():
                    found.add(other.text)
    if problems:
        raise UserError.of(problems)
    if len(found) != 1:
        raise UserError(
            f"{len(found) or 'no'} answers to this question about this video",
            where=truth,
            fix="write the answer itself: --truth 'from <t:1.5> to <t:2.875>'",
        )
    return found.pop()


def draw_answer(answer: Answer, question: str, video: Path) -> "Image":
    """Return the picture of an answer: the clip's frames as displayed, read once more."""
    from preprocess.show.answer import Pointed, answer_page

    size, duration = answer.clip.display_size, answer.clip.duration
    with DecodeChild() as child:
        clip = child.read_clip(ReadRequest(video, answer.sampling))
    about = asked_of_text(answer.truth, duration, question=question) if answer.truth else None
    scores = score(about, answer.said) if about else {}
    told = in_pixels(answer.said, size) + shown_scores(scores)
    said = Pointed(told, *pointed(answer.said, question))
    true = Pointed(in_pixels(answer.truth, size), *pointed(answer.truth, question))
    times = (clip.timestamps - clip.start).tolist()
    title = in_pixels(question, size)
    return answer_page(title, clip.frames, times, duration, said, true if about else None)


def shown_scores(scores: Json) -> str:
    """Return the score of an answer that is drawn, where it has one."""
    names = [name for name in ("iou", "viou", "error", "exact") if name in scores][:1]
    return "".join(f"    ({name} {scores[name]:.2f})" for name in names)


def in_pixels(answer: str, display_size: tuple[int, int]) -> str:
    """Return an answer with its markup written out: times in seconds, places in pixels."""
    height, width = display_size

    def written(match: re.Match[str]) -> str:
        letter, number = match.group(1), float(match.group(2))
        if letter == "t":
            return f"{number:.2f} s"
        return f"{letter} {number * (width if letter == 'x' else height):.0f} px "

    return MARKUP.sub(written, answer).strip()


if __name__ == "__main__":
    main(sys.argv[1:])
