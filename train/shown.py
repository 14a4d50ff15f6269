"""The picture of an answer about a raw video: its frames, the answer, and the right answer."""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from preprocess.decode.decode_child import DecodeChild
from preprocess.decode.request import ReadRequest
from shards.annotations.forms import MEDIA_TAG
from shards.errors import UserError
from shards.format.features import Sampling
from shards.read.bank import ClipInfo
from shards.signed import Json
from train.data.markup import MARKUP, SHARE
from train.data.records import read_records
from train.scores.kinds import asked
from train.scores.pointed import in_pixels, pointed
from train.scores.scoring import score
from train.settings.output import file_problem


@dataclass(frozen=True)
class Picture:
    """A picture to draw."""

    path: Path
    truth: str
    """The right answer, in markup; empty where it is not known."""

    @classmethod
    def of(cls, path: Path, truth: str | None, video: Path, question: str) -> "Picture":
        """Return a picture that can be written; UserError else, before a model is loaded."""
        from PIL import Image

        if problem := file_problem(path):
            raise UserError(problem, where="--show")
        # by Pillow's own table, before the model is asked: it would fail after the answer
        if path.suffix.lower() not in Image.registered_extensions():
            raise UserError("no format of pictures", path.name, expected="a .png", where="--show")
        return cls(path, find_truth(truth, video, question) if truth else "")

    def draw(
        self, video: Path, info: ClipInfo, sampling: Sampling, question: str, said: str, truth: str
    ) -> None:
        """Write the picture: the clip's frames as displayed, which are decoded a second time.

        said, truth: with markup, times in seconds.
        """
        from preprocess.show.answer import Pointed, answer_page
        from preprocess.show.picture import save

        size = info.display_size
        with DecodeChild() as child:
            # without pixels: frames as displayed, not as the tower takes them
            clip = child.read_clip(ReadRequest(video, sampling))
        about = asked(truth, info.duration, question=question)
        title = in_pixels(said, size) + shown_score(score(about, said) if truth else {})
        layers = [Pointed(title, *pointed(said, question))]
        if truth:
            layers.append(Pointed(in_pixels(truth, size), *pointed(truth, question)))
        times = (clip.timestamps - clip.start).tolist()
        title = in_pixels(question, size)
        save(answer_page(title, clip.frames, times, info.duration, *layers), self.path)


def find_truth(truth: str, video: Path, question: str) -> str:
    """Return the right answer: the text itself, or the answer in a file of records."""
    if not Path(truth).exists():
        # a misspelt file name is no answer: it has neither times nor places
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
        # about this video alone: times in an answer about a timeline, or a medium after it, are of that
        if len(record.clips) != 1 or record.cuts:
            continue
        # by the end of the path, whole folders: records name videos relative to a
        # root that is not known here
        if f"/{video.absolute().as_posix()}".endswith(f"/{record.clips[0]}"):
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


def shown_score(scores: Json) -> str:
    """Return the score of an answer that is drawn, where it has one."""
    names = [name for name in ("iou", "viou", "error", "exact") if name in scores][:1]
    return "".join(f"    ({name} {scores[name]:.2f})" for name in names)
