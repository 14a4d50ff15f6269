r"""Adapter of lmms-eval for a trained model: its published tasks, answered from raw videos and pictures.

    pip install 'framebank[lmms-eval]'
    python -m lmms_eval --model framebank --model_args pretrained=runs/a \
        --tasks temporal_grounding_charades

Media are decoded and encoded as `train/ask.py` does, with the limits of the model's training.
Coordinates are written as tasks read them: times in seconds, places as fractions in brackets. lmms-eval
finds this module by the entry point `framebank` of its group `lmms_eval.models`; nothing of ours
imports it.
"""

import re
import tempfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lmms_eval.api.model import lmms

from preprocess.decode.decode_child import DecodeChild
from shards.annotations.forms import MEDIA_TAG
from shards.errors import UserError
from train.ask import Answerer, FreshClip, fresh_clip
from train.data.records import Turn
from train.scores.kinds import GROUPS

KEPT = 8
"""Number of clips whose features are cached: benchmarks ask several questions in a row about a video."""
RUN = re.compile(r"<[txy]:-?[\d.]+>(?:[\s,]*<[txy]:-?[\d.]+>)*")
MARK = re.compile(r"<([txy]):(-?[\d.]+)>")
BOX = re.compile(r"(?<![\d.\[])[01]\.\d{3}(?:\s+[01]\.\d{3}){3}(?![\d.])")
"""A box in plain numbers, from a model without tokens for places: four fractions of three decimals."""


def manifest() -> Any:
    """Return lmms-eval's description of the model; the entry point names this function."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("framebank", simple_class_path=f"{__name__}.Framebank")


class Framebank(lmms):
    """A model trained by framebank."""

    is_simple = True

    def __init__(
        self,
        pretrained: str = "",
        tower: str | None = None,
        max_new_tokens: int = 128,
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        **others: object,
    ) -> None:
        """pretrained: a run's folder or a checkpoint-N. tower: present place of its vision tower.

        max_new_tokens: of an answer, for tasks that set none. device: that of a single process, from
        lmms-eval's --device.
        """
        super().__init__()
        import torch
        from accelerate import Accelerator

        if others:
            raise UserError(
                f"model_args {', '.join(others)}: not known",
                expected="pretrained, tower, max_new_tokens",
                fix="frames and their limits are those that the model was trained with",
            )
        if not pretrained:
            raise UserError("model_args: name the model, as pretrained=runs/a")
        # "auto" is lmms-eval's wish for whatever fits
        if str(batch_size) not in ("1", "auto"):
            raise UserError(
                f"batch_size {batch_size}: questions are answered one at a time", fix="use 1"
            )
        self.accelerator = Accelerator(cpu=not torch.accelerator.is_available())
        self._rank = self.accelerator.process_index
        self._world_size = self.accelerator.num_processes
        # of several processes each has a device of its own, whatever --device says
        self.device = self.accelerator.device if self._world_size > 1 or not device else device
        self.max_new_tokens = int(max_new_tokens)
        self.answerer = Answerer.load(Path(pretrained), self.device)
        self.tower = self.answerer.load_tower(tower)
        self.child = DecodeChild()
        self.clips = OrderedDict[tuple[str, int, int, int], FreshClip]()

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Return the answer to each request, in order."""
        from tqdm import tqdm

        return [
            self._answer(*request.args)
            for request in tqdm(requests, "answers", disable=None if self.rank == 0 else True)
        ]

    def _answer(
        self,
        context: str,
        settings: Mapping[str, Any],
        doc_to_visual: Any,
        doc_id: int,
        task: str,
        split: str,
    ) -> str:
        where = f"task {task}, document {doc_id}"
        # a task may name one medium, several, or none
        found = doc_to_visual(self.task_dict[task][split][doc_id])
        media = [found] if isinstance(found, str | Path) else list(found or [])
        clips = [self._clip(medium, where) for medium in media]
        turns = [Turn("user", with_media(context, len(clips), where)), Turn("assistant", "")]
        check_greedy(settings, where)
        most = int(settings.get("max_new_tokens") or self.max_new_tokens)
        # plain numbers: tasks read answers by patterns that know nothing of coordinate tokens
        said = in_plain_numbers(self.answerer.answer(clips, turns, most))
        return until(said, settings.get("until"))

    def _clip(self, medium: Any, where: str) -> FreshClip:
        """Return a medium's features: of a file, or of a picture in memory."""
        if isinstance(medium, str | Path):
            stat = Path(medium).stat()
            # a task may write its videos one after the other to one path
            key = str(medium), stat.st_ino, stat.st_size, stat.st_mtime_ns
            if key not in self.clips:
                self.clips[key] = self._encoded(Path(medium))
            # the one that was asked for longest ago is dropped first
            self.clips.move_to_end(key)
            while len(self.clips) > KEPT:
                self.clips.popitem(last=False)
            return self.clips[key]
        if not hasattr(medium, "save"):
            raise UserError("neither a file nor a picture", got=type(medium).__name__, where=where)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "picture.png"
            # PNG keeps each pixel, so that its features are those of the picture in memory
            medium.convert("RGB").save(path)
            return self._encoded(path)

    def _encoded(self, path: Path) -> FreshClip:
        return fresh_clip(path, self.answerer.features, self.tower, self.child)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        raise UserError("framebank answers tasks of generate_until, none of loglikelihood")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise UserError("framebank answers tasks of generate_until, none of several rounds")


def with_media(context: str, count: int, where: str) -> str:
    """Return a task's text with a tag for each medium, put first if it has none."""
    # tags in a task's own text stand where the media belong: only a text without any gets them in front
    tags = len(MEDIA_TAG.findall(context))
    if tags == count:
        return context
    if tags:
        raise UserError(f"its text has {tags} tags of media for {count} media", where=where)
    return "<video>" * count + "\n" + context


def check_greedy(settings: Mapping[str, Any], where: str) -> None:
    """Raise UserError where a task asks for sampling or beam search."""
    # temperature 0 is greedy, whatever do_sample says
    drawn = settings.get("do_sample") and float(settings.get("temperature") or 0) > 0
    if drawn or int(settings.get("num_beams") or 1) > 1:
        raise UserError(
            "wants sampling or beams, and answers here are greedy",
            where=where,
            fix="--gen_kwargs do_sample=False,num_beams=1",
        )


def in_plain_numbers(answer: str) -> str:
    """Return an answer as tasks read it: times as seconds, `1.5 - 4.0` two in a row; boxes in brackets.

    A box in the numbers of a model without coordinate tokens becomes the same.
    """

    def written(match: re.Match[str]) -> str:
        letters, numbers = zip(*MARK.findall(match[0]), strict=True)
        # GROUPS tells spans, times, points and boxes apart by the order of their axes
        parts, rest = [], list(numbers)
        for group in GROUPS.findall("".join(letters)):
            own, rest = rest[: len(group)], rest[len(group) :]
            parts.append(" - ".join(own) if group[0] == "t" else f"[{', '.join(own)}]")
        return " ".join(parts)

    def bracketed(match: re.Match[str]) -> str:
        return f"[{', '.join(match[0].split())}]"

    return BOX.sub(bracketed, RUN.sub(written, answer)).strip()


def until(answer: str, ends: str | Sequence[str] | None) -> str:
    """Return an answer up to the first of a task's stop strings."""
    for end in [ends] if isinstance(ends, str) else (ends or []):
        # tasks say by these where an answer ends; generation itself stops at the chat's own end
        answer = answer.split(end)[0] if end else answer
    return answer
