"""The questions of records, their token limits, a model's answers to them, and the next frames that it
predicts."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from model.family.limits import apart_up_to
from shards.annotations.forms import MEDIA_TAG
from shards.signed import Json
from train.data.dataset import Dataset
from train.data.records import Record, Turn, duration_before
from train.data.spans import forwards
from train.loop.held_out import held_out_loss
from train.pages.read.foreseen import MOST_CLIPS, MOST_FRAMES, Foreseen, NextFrame
from train.scores.predictions import Prediction, report_of

if TYPE_CHECKING:
    from accelerate import Accelerator

    from model.batch import Batch
    from model.vlm import VLM
    from train.batches.chat import Chat
    from train.batches.loader import Loader
    from train.loop.floor import Floor

FEWEST_NEW_TOKENS = 96
"""Least token limit of an answer; kinds with longer references have more."""


def loader_of(model: "VLM", dataset: Dataset, limit: int) -> "Loader":
    """Return the loader of a test set, its records cut to `limit` tokens, as in training."""
    from train.batches.chat import Chat
    from train.batches.loader import Loader

    return Loader(dataset, Chat.of(model), model.config, limit=limit)


def new_tokens(
    loader: "Loader", questions: Sequence[tuple[Record, int]], asked: int | None
) -> dict[str, int]:
    """Return kind -> most tokens of an answer: `asked`, or twice the longest reference of the kind."""
    most: dict[str, int] = {}
    for record, turn in questions:
        blank = question_of(loader, record, turn)
        if asked is None:
            # twice: a wrong answer may be longer than the right one, and is read to its end
            needed = 2 * reference_tokens(loader.chat, blank.reference, blank.duration)
            most[blank.asked.kind] = max(most.get(blank.asked.kind, FEWEST_NEW_TOKENS), needed)
        else:
            most[blank.asked.kind] = asked
    return most


def reference_tokens(chat: "Chat", reference: str, duration: float) -> int:
    """Return the number of tokens of an answer as the model would write it, its end included."""
    # a time in an answer is written as a share of a clip, so that a clip has to stand before it
    media = [duration] if duration > 0 else []
    said = Turn("assistant", MEDIA_TAG.sub("", reference))
    turns = [Turn("user", "<video>" * len(media)), said]
    return sum(chat.encode(turns, media).supervised)


def check_lengths(
    model: "VLM",
    loader: "Loader",
    questions: Sequence[tuple[Record, int]],
    most: dict[str, int],
) -> None:
    """Raise UserError where a question and its answer are longer than the LLM's context."""
    from model.generate import check_room

    for record, turn in questions:
        new = most[question_of(loader, record, turn).asked.kind]
        check_room(model, loader.prompt_length(record, turn), new)


def evaluate(
    model: "VLM",
    loader: "Loader",
    records: Sequence[Record],
    batch_size: int,
    most: dict[str, int],
    accelerator: "Accelerator",
    floor: "Floor | None" = None,
) -> tuple[Json, list[Prediction]]:
    """Return losses and scores of a model over records, and its answers, the same on every rank.

    most: kind -> most tokens of an answer. floor: the baselines of the frame-causal loss.
    """
    from accelerate.utils import gather_object
    from tqdm import tqdm

    # rank::world: each process has as many questions as the others, give or take one
    rank, world = accelerator.process_index, accelerator.num_processes
    questions = questions_of(records)
    # of all questions: every process has to take as many together
    size = rows_at_once(model, loader, questions, most, batch_size)
    losses = held_out_loss(model, loader, records, size, accelerator, floor)
    mine = questions[rank::world]
    own = []
    shown = None if rank == 0 else True  # on a terminal alone
    for begin in tqdm(range(0, len(mine), size), "answers", disable=shown):
        with accelerator.autocast():  # the precision that Accelerate was asked for, as for losses
            own += answer(model, loader, mine[begin : begin + size], most)
    # rank r has answers r, r + world, ...: put back into the order of the records
    gathered = gather_object([(rank + k * world, said) for k, said in enumerate(own)])
    predictions = [said for _, said in sorted(gathered, key=lambda numbered: numbered[0])]
    report: Json = {"records": len(records), "losses": losses}
    report["limits"] = limits_of(loader, records) | {"max_new_tokens": most}
    return report | report_of(predictions), predictions


def rows_at_once(
    model: "VLM",
    loader: "Loader",
    questions: Sequence[tuple[Record, int]],
    most: dict[str, int],
    batch_size: int,
) -> int:
    """Return how many rows are computed together: one where long ones would change others."""
    apart = apart_up_to(model.llm.config.to_dict())
    if apart is None or not questions:
        return batch_size
    longest = max(loader.prompt_length(*question) for question in questions)
    return batch_size if longest + max(most.values()) <= apart.tokens else 1


def limits_of(loader: "Loader", records: Sequence[Record]) -> Json:
    """Return the limits of a test set's records, and the frames that these leave out."""
    config = loader.config
    names = ("max_frames_num", "frame_sampling_strategy", "slow_frame_ratio", "frame_time")
    # counted from lengths, as the loader cuts: no features are read for it
    frames = used = shortened = too_long = 0
    for record in records:
        fitting = loader.fitting(record)
        banked = [len(clip.info.timestamps) for clip in loader.dataset.clips(record)]
        wanted = sum(min(count, config.max_frames_num) for count in banked)
        # 1: a question that is asked has one frame of each clip at least
        left = sum(min(count, max(fitting, 1)) for count in banked)
        frames, used = frames + wanted, used + min(left, wanted)
        shortened += left < wanted
        too_long += not fitting
    out: Json = {name: getattr(config, name) for name in names} | {"max_tokens": loader.limit}
    out |= {"frames": used, "frames_left_out": frames - used, "records_shortened": shortened}
    return out | {"records_too_long": too_long}


def questions_of(records: Sequence[Record]) -> list[tuple[Record, int]]:
    """Return (record, number of the turn) for each answer of some records."""
    return [
        (record, k)
        for record in records
        for k, turn in enumerate(record.turns)
        if turn.role == "assistant"
    ]


def question_of(loader: "Loader", record: Record, turn: int) -> Prediction:
    """Return a prediction without its answer: the question and its reference."""
    durations = [clip.info.duration for clip in loader.dataset.clips(record)]
    duration = duration_before(record, durations, turn)
    return Prediction.blank(record, turn, duration, loader.chat.counts)


def answer(
    model: "VLM",
    loader: "Loader",
    questions: Sequence[tuple[Record, int]],
    most: dict[str, int],
) -> list[Prediction]:
    """Return the model's answers; most: tokens of one at most, by kind."""
    from model.batch import to_device
    from model.generate import generate, write_answer

    batch = to_device(loader.prompts(questions), device_of(model))
    blanks = [question_of(loader, *question) for question in questions]
    caps = [most[blank.asked.kind] for blank in blanks]
    # one generation for the batch, as long as its longest kind may be; each
    # answer is cut to its own below
    said = generate(model, batch, stop=loader.chat.stop, max_new_tokens=max(caps))
    out = []
    for blank, cap, pieces in zip(blanks, caps, said, strict=True):
        text = forwards(write_answer(model, pieces[:cap], blank.duration))
        out.append(replace(blank, answer=text, cut=len(pieces) >= cap))
    return out


def foresee(
    model: "VLM", loader: "Loader", records: Sequence[Record], accelerator: "Accelerator"
) -> list[Foreseen]:
    """Return the next frames that a model predicts in the first records' clips, beside the true ones.

    Only of records of one clip, and each clip once; none for a model without the frame-causal loss.
    """
    import torch

    from model.batch import to_device

    # without the loss nothing has learned to predict frames
    if model.frame_causal is None:
        return []
    # by clip: several questions about one would give the same picture
    chosen: dict[tuple[str, ...], Record] = {}
    for record in records:
        if len(record.clips) == 1 and len(chosen) < MOST_CLIPS:
            chosen.setdefault(record.clips, record)
    found = []
    for (clip,), record in chosen.items():
        batch = to_device(loader.batch([record], with_copy=True), accelerator.device)
        (medium,) = loader.dataset.clips(record)
        with torch.no_grad(), accelerator.autocast():
            frames = list(next_frames(model, batch, medium.info.duration))
        # they come pair of streams by pair, and a picture shows them in time
        frames.sort(key=lambda frame: frame.time)
        found.append(Foreseen(clip, tuple(frames[:MOST_FRAMES])))
    return found


def next_frames(model: "VLM", batch: "Batch", duration: float) -> Iterator[NextFrame]:
    """Yield a model's prediction of each frame but the first, in the order of the transitions."""
    from model.frame_causal import frame_target, pair_of

    assert model.frame_causal is not None
    hidden = model.hidden_states(batch)
    for pairs in batch.transitions:
        source, target = batch.groups[pairs.source], batch.groups[pairs.target]
        states = hidden[source.token_index[pairs.source_frame]]
        times = target.time[pairs.target_frame]
        guess = model.frame_causal.predict(states, source, target, times, pairs.gap)
        assert pairs.copy is not None
        # compared as the loss compares them, so that these errors add up to the reported one
        truth = frame_target(target.features[pairs.target_frame])
        three = (truth, guess.float(), frame_target(pairs.copy))
        errors = [(t - truth).square().mean(dim=(1, 2)).tolist() for t in three[1:]]
        grid = target.grid.rows, target.grid.cols
        arrays = [tensor.unflatten(1, grid).cpu().numpy() for tensor in three]
        for k, time in enumerate(times.tolist()):
            facts = (time * duration, pair_of(batch, pairs), errors[0][k], errors[1][k])
            yield NextFrame(*facts, *(array[k] for array in arrays))


def device_of(model: "VLM") -> Any:
    return model.visual.frame_end.device
