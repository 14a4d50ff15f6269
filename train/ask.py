"""Ask a trained model about a raw video or a banked clip; times come back as seconds, places as pixels.

    python train/ask.py clip.mp4 "When is the red circle visible?" --model runs/a
    python train/ask.py a/clip.mp4 "When is it?" --model runs/a --bank bank     # by its id
    python train/ask.py '[{"video": "a.mp4", "end": 4}, {"video": "b.mp4"}]' "..." --model ... --bank ...
    python train/ask.py clip.mp4 "When is it?" --model runs/a --show asked.png --truth test.jsonl

A raw clip goes through the same sampling, tower and pooling as `preprocess encode`; frames are left out
as in the model's training. The picture shows the clip's frames, with the spans, boxes and points of the
answer over the true ones.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from model.config import VLMConfig, joined_cells
from preprocess.decode.decode_child import DecodeChild
from preprocess.decode.request import ReadRequest
from shards.annotations.forms import MEDIA_TAG, path_of
from shards.annotations.timeline import Cut, cuts_of
from shards.errors import UserError
from shards.format.features import FeatureConfig
from shards.format.plan import TOWER_THREADS
from shards.hub import absent
from shards.read.bank import ClipInfo, of_units
from shards.read.banks import Banks
from shards.read.timeline import Medium, parts_of, timeline_of
from shards.signed import Json
from train.data.coordinates import in_numbers, resolved
from train.data.records import Record, Turn
from train.data.spans import forwards
from train.evaluate import check_features
from train.scores.pointed import in_pixels
from train.settings.exits import command
from train.settings.recorded import token_limit, trained_with
from train.shown import Picture
from train.start.stage_files import model_problem

if TYPE_CHECKING:
    import torch

    from model.tower.tower import Tower
    from model.vlm import VLM
    from preprocess.decode.events import Clip
    from train.batches.chat import Chat
    from train.batches.collate import Row


@dataclass(frozen=True)
class FreshClip:
    """A clip's features, computed by the tower just now."""

    info: ClipInfo
    features: dict[int, np.ndarray]

    def read(self, stride: int, frames: Sequence[int]) -> np.ndarray:
        """Return the features of some frames, as a banked clip does."""
        return self.features[stride][list(frames)]


@command
def main(argv: list[str]) -> None:
    args = arguments().parse_args(argv)
    if args.max_new_tokens < 1:
        raise UserError("must be at least 1", got=args.max_new_tokens, where="--max_new_tokens")
    # flags that would have no effect are refused: who gives them expects one
    if args.bank and args.tower:
        raise UserError(
            "a banked clip needs no tower", where="--tower", fix="leave out --tower or --bank"
        )
    if args.bank and args.show:
        raise UserError(
            "frames can be drawn of a file only", where="--show", fix="leave out --bank"
        )
    if args.truth and not args.show:
        raise UserError("--truth is drawn, and nothing is", fix="name a picture with --show")
    question = (args.question, args.model)
    if args.bank:
        said = ask_banked(args.video, *question, args.bank, args.max_new_tokens)
    else:
        video = Path(args.video)
        # before the model is loaded, which takes far longer than to see that a picture cannot be written
        picture = Picture.of(args.show, args.truth, video, args.question) if args.show else None
        said = ask(video, *question, args.tower, args.max_new_tokens, picture)
    print(said)  # noqa: T201
    if args.show:
        print(args.show)  # noqa: T201


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("video", help="a file; with --bank a clip's id, or a timeline")
    parser.add_argument("question")
    parser.add_argument(
        "--model", required=True, type=Path, help="a run's folder or a checkpoint-N"
    )
    parser.add_argument("--bank", nargs="+", help="bank folders, one of which has the clip")
    parser.add_argument(
        "--tower", help="present place of the vision tower [that when the bank was made]"
    )
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--show", type=Path, metavar="PNG", help="draw the answer over the frames")
    parser.add_argument(
        "--truth",
        metavar="ANSWER",
        help="drawn too: the right answer, such as 'from <t:1.5> to <t:2.875>', or a file of records "
        "in which this video is asked this question",
    )
    return parser


def ask(
    video: Path,
    question: str,
    folder: Path,
    tower: str | None,
    max_new_tokens: int,
    picture: Picture | None = None,
) -> str:
    """Return a model's answer about a video, in seconds and pixels, and draw the picture of it."""
    refuse_absent(video)  # before the model is loaded, which takes far longer
    answerer = Answerer.load(folder)
    with DecodeChild() as child:
        # decoded in a child: a damaged file can crash the decoder, and then says so in a line
        clip = fresh_clip(video, answerer.features, answerer.load_tower(tower), child)
    truth = asked(question, clip.info, picture.truth)[1].text if picture else ""
    said = answerer.answer([clip], asked(question, clip.info), max_new_tokens)
    if picture:
        truth = in_numbers(truth, clip.info.duration, answerer.chat.counts)
        picture.draw(video, clip.info, answerer.features.sampling, question, said, truth)
    return in_pixels(said, clip.info.display_size)


def banked(clip_id: str, banks: Banks) -> Medium:
    """Return a clip by its id, or a medium by its timeline, as JSON; UserError for one not banked."""
    cuts = [Cut(clip_id)]
    # a bracket may begin a file's name, too
    if clip_id.startswith("[") and banks.find(clip_id) is None:
        cuts = cuts_of({"timeline": clip_id}, lambda video: path_of(video, "timeline"))
    places = [banks.find(cut.video) for cut in cuts]
    for cut, place in zip(cuts, places, strict=True):
        if place is None:
            why = "in quarantine" if cut.video in banks.quarantined() else "in no bank"
            # ids are written here by hand: no setting turns another name into them
            near = " or ".join(map(repr, banks.near.like(cut.video)))
            fix = f"did you mean {near}?" if near else "encode it, or name its bank"
            raise UserError(f"the clip {cut.video!r} is {why}", fix=fix)
    found = [place for place in places if place is not None]
    # a bare id is one clip; anything else was written as a timeline
    return found[0].clip() if clip_id == cuts[0].video else timeline_of(found, cuts).clip()


def ask_banked(
    clip_id: str, question: str, folder: Path, banks: Sequence[str], max_new_tokens: int
) -> str:
    """Return a model's answer about a clip of a bank, in seconds and pixels."""
    opened = Banks.open(banks)
    clip = banked(clip_id, opened)
    answerer = Answerer.load(folder)
    # before the answer: the features of another tower have the same shape, and give nonsense
    check_features(answerer.model, opened, folder)
    said = answerer.answer([clip], asked(question, clip.info), max_new_tokens)
    return in_pixels(said, size_of(clip))


def size_of(medium: Medium) -> tuple[int, int] | None:
    """Return (height, width) of a medium's frames; None for parts of several sizes."""
    sizes = {part.info.display_size for part in parts_of([medium])}
    return sizes.pop() if len(sizes) == 1 else None


@dataclass(frozen=True)
class Answerer:
    """A trained model, ready for questions about clips, with frames chosen as in its training."""

    model: "VLM"
    chat: "Chat"
    features: FeatureConfig
    folder: Path
    limit: int
    """Most tokens of a conversation; 0 for no limit, or where the folder does not record one."""

    @classmethod
    def load(cls, folder: Path, device: "torch.device | str" = "cpu") -> "Answerer":
        """Load a model; UserError where there is none, or its LLM does not pass `conformance.admit`."""
        from model.family.conformance import admit
        from model.vlm import VLM, read_model_config
        from train.batches.chat import Chat

        read_model_config(folder)
        if problem := model_problem(folder):
            raise UserError(problem)
        model = VLM.load(folder).to(device).eval()
        admit(model)
        features = with_strides(FeatureConfig.from_json(model.features), model.config)
        limit = token_limit(trained_with(folder) or {})
        return cls(model, Chat.of(model), features, folder, limit)

    def load_tower(self, name: str | None = None) -> "Tower":
        """Return the tower of the model's features, from its present place or by its name."""
        places = [name] if name else tower_places(self.model.tower, self.folder)
        return load_tower(self.features, places)

    def answer(self, clips: Sequence[Medium], turns: Sequence[Turn], max_new_tokens: int) -> str:
        """Return the answer for the last turn, which is empty: text with markup.

        Its times are seconds of the last clip. Of a token limit only the question is subtracted: the
        length of the answer is not known, as it was in training.
        """
        from model.batch import to_device
        from model.generate import generate, write_answer
        from train.batches.collate import collate

        infos = [clip.info for clip in clips]
        # for messages alone; a text without media has no clip
        ids = [info.id for info in infos[:1]] or ["question"]
        batch = collate([self.row(infos, turns)], [clips], self.model.config, ids)
        batch = to_device(batch, self.model.visual.frame_end.device)
        stop = self.chat.stop
        pieces = generate(self.model, batch, stop=stop, max_new_tokens=max_new_tokens)[0]
        return forwards(write_answer(self.model, pieces, infos[-1].duration if infos else 0.0))

    def row(self, infos: Sequence[ClipInfo], turns: Sequence[Turn]) -> "Row":
        """Return the question as tokens, with as many frames as the limit allows, one at least."""
        from train.batches.collate import frames_within, lay_out

        config, pool, stamp = self.model.config, self.features.pool, self.chat.stamp
        # answer: the prompt ends where the answer would begin, as in training
        encoded = self.chat.encode(turns, [i.duration for i in infos], answer=len(turns) - 1)
        most = config.max_frames_num
        if self.limit:
            # 1: even a question that leaves no room for a frame is asked of one
            most = max(frames_within(encoded, infos, config, pool, self.limit, stamp), 1)
        return lay_out(encoded, infos, config, pool, most, stamp)


def asked(question: str, clip: ClipInfo, answer: str = "") -> list[Turn]:
    """Return the turns of a question; UserError for a time or place that its clip does not have."""
    turns = (Turn("user", f"<video>\n{question}"), Turn("assistant", answer))
    if MEDIA_TAG.search(question):  # the chat says that it has no medium for it
        return list(turns)
    asked_record = Record(clip.id, (clip.id,), turns, "", "the question")
    # by the rules for records, so that a question is read as it would be in training
    record, _, problems = resolved(asked_record, [clip.duration], clip=False)
    if problems:
        raise UserError.of(
            f"{problem.where}: {problem.what}; times are seconds of the clip, which lasts "
            f"{clip.duration:.2f}, places fractions of the frame"
            for problem in problems
        )
    return list(record.turns)


def tower_places(name: str, folder: Path) -> list[str]:
    """Return possible places of a tower of this name, the likeliest first: its own path, or a new one.

    A new one is searched for by the end of its path in the folders above the model and above the banks
    of its run: model, banks and tower may have been moved together, or be mounted elsewhere.
    """
    # run.json is in the model's folder, or one above a checkpoint-N
    above = [folder.resolve(), *folder.resolve().parents]
    runs = [place / "run.json" for place in above[:2]]
    run: Json = next((json.loads(path.read_text()) for path in runs if path.is_file()), {})
    # banks are named relative to where the run was started, which is not recorded:
    # every folder above is tried
    banks = [base / bank for bank in run.get("config", {}).get("bank", []) for base in above]
    for bank in banks:
        if bank.is_dir():
            above += [place for place in bank.resolve().parents if place not in above]
    parts = Path(name).parts
    # the longest end of its path first: fewer folders match it by chance
    tails = [parts[k:] for k in range(1, len(parts))] if Path(name).is_absolute() else [parts]
    found = [str(base.joinpath(*tail)) for tail in tails for base in above]
    found = [place for place in found if Path(place).is_dir()]
    # a name that is no path here, moved or of the Hub, is tried only where nothing else was found
    return list(dict.fromkeys([name, *found] if Path(name).exists() or not found else found))


def with_strides(features: FeatureConfig, config: VLMConfig) -> FeatureConfig:
    """Return a bank's features with all strides that a model reads: some may be beside the bank."""
    read = {config.slow_stride, config.fast_stride}
    # a projector that joins cells reads them finer than the stride that it gives
    read |= {stride // joined_cells(config.mm_projector_type) for stride in read}
    return replace(features, strides=tuple(sorted({*features.strides, *read})))


def load_tower(features: FeatureConfig, places: Sequence[str]) -> "Tower":
    """Load the tower of some features from the first place that has it; UserError if none has."""
    problems = []
    for place in places:
        try:
            return _load_tower(features, place)
        except UserError as error:  # another tower, or a folder of the same name
            problems.append(error)
    # of the likeliest place: what others say about it would mislead
    raise problems[0]


def _load_tower(features: FeatureConfig, name: str) -> "Tower":
    from model.tower.tower import Tower

    if why := absent(name):
        raise UserError(why, where=f"tower {name}", fix="give its present place by --tower")
    tower = Tower.load(
        name, layer=features.layer, dtype=features.tower_dtype, attention=features.attention
    )
    # names and places change; weights are the same only if their digest is
    if tower.digest != features.tower_digest:
        raise UserError(
            "not the tower that the model was trained on (digest "
            f"{tower.digest[:12]}, expected {features.tower_digest[:12]})",
            where=f"tower {name}",
            fix="name it with --tower",
        )
    # frames may have been padded, stretched or cropped for the bank: set alike, before it is compared
    tower.fit_like(features.processor)
    if tower.pixels.to_json() != features.processor:
        raise UserError(
            f"tower {name}: its image processor has other values than when the bank was made: "
            f"{tower.pixels.to_json()}, expected {features.processor}"
        )
    return tower


def refuse_absent(video: Path) -> None:
    """Raise UserError for a video that does not exist."""
    if not video.exists():
        raise UserError(
            "no such file", where=video, fix="correct the path; a banked clip's id: --bank"
        )


def fresh_clip(
    video: Path, features: FeatureConfig, tower: "Tower", child: DecodeChild
) -> FreshClip:
    """Return a video's features exactly as `preprocess encode` banks them."""
    clip, stored = encoded(video, features, tower, child)
    height, width = clip.display_size
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


def encoded(
    video: Path, features: FeatureConfig, tower: "Tower", child: DecodeChild
) -> tuple["Clip", dict[int, np.ndarray]]:
    """Return a video's frames, and their features per stride as `preprocess encode` stores them."""
    refuse_absent(video)
    clip = child.read_clip(ReadRequest(video, features.sampling, pixels=tower.pixels))
    stored, _ = tower.features(
        clip.frames,
        features.strides,
        pool_mode=features.pool,
        dtype=features.dtype,
        threads=TOWER_THREADS,
    )
    return clip, stored


if __name__ == "__main__":
    main(sys.argv[1:])
