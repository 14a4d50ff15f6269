"""A Qwen-VL checkpoint as a stage: from a bank of its tower's merged tokens it computes what it is.

Random tiny checkpoints of transformers' own classes; the reference is their forward on the same
features, rounded as the bank rounds them.
"""

import copy
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
)
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

from model.family.conformance import admit
from model.generate import Cached, generate
from model.tower.forward.qwen import patchify
from model.tower.tower import Tower
from model.vlm import VLM
from preprocess.encode.run import EncodeOptions, encode
from shards.errors import UserError
from shards.format.features import Sampling
from shards.read.timeline import Medium
from tests.train.start.checkpoints import (
    EXACT,
    World,
    as_theirs,
    batch_of,
    close,
    laid_out,
    our_logits,
)
from tests.train.start.tiny import (
    LLM_WIDTH,
    PATCH,
    TAGS,
    qwen2,
    qwen2_5,
    qwen3,
    save_qwen,
)
from train.batches.chat import Chat
from train.batches.collate import Row
from train.data.dataset import open_dataset
from train.export import export
from train.start.prepare_llm import checkpoint_activations
from train.start.stage import bank_problem, build, kind_of
from train.start.stage_files import stage_problem

VIDEO = -1
"""Stands for their video token."""
MERGED: Mapping[str, Any] = dict(EXACT) | {
    "mm_projector_type": "identity",
    "frame_marks": "none",
    "fast_stride": 1,
}
SIZES = {"a": (24, 40), "b": (40, 24), "c": (8, 56)}
"""Height and width of each clip: merged grids of 3x5, 5x3 and 1x7."""
FRAMES = {"a": 6, "b": 14, "c": 2}


MAKE: Mapping[str, tuple[Callable[[bool], Any], bool, str]] = {
    "qwen2_vl": (qwen2, False, "merged"),
    "qwen2_vl tied": (qwen2, True, "merged"),
    "qwen2_5_vl": (qwen2_5, False, "merged"),
    "qwen3_vl": (qwen3, False, "0,1,merged"),
    "qwen3_vl tied": (qwen3, True, "0,1,merged"),
}
"""Kind -> what makes a checkpoint, whether its head is its table of words, the layer that is banked."""
KINDS = [kind for kind in MAKE if "tied" not in kind]


@pytest.fixture(scope="module")
def worlds(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, World]:
    """One world per kind of checkpoint."""
    root = tmp_path_factory.mktemp("qwen-stages")
    for number, (name, (height, width)) in enumerate(SIZES.items()):
        (root / "videos" / name).mkdir(parents=True)
        noise = np.random.default_rng(number)
        for k in range(FRAMES[name]):
            pixels = noise.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "videos" / name / f"{k:03}.png")
    return {name: make_world(root, name, *made, toy) for name, made in MAKE.items()}


def make_world(
    root: Path, name: str, make: Callable[[bool], Any], tied: bool, layer: str, toy: Path
) -> World:
    place = root / name.replace(" ", "-")
    folder = place / "stage"
    theirs = save_qwen(folder, lambda: make(tied), toy)
    options = EncodeOptions(
        tower=str(folder),
        strides=(1, 2),
        sampling=Sampling(fps="2", max_frames=64),
        layer=layer,
    )
    summary = encode([str(root / "videos")], place / "bank", options)
    assert (summary.clips, summary.failures) == (3, [])
    talk = [{"from": "human", "value": "<video>\nWhen?"}, {"from": "gpt", "value": "from 1.5"}]
    lines = [json.dumps({"id": k, "video": k, "conversations": talk}) for k in SIZES]
    data = place / "data.jsonl"
    data.write_text("\n".join(lines))
    return World(folder, theirs, place / "bank", data, MERGED)


def their_inputs(world: World, row: Row, clips: Sequence[Medium]) -> dict[str, Any]:
    """Return what their forward is given of a row: ids with video tokens, pixels, grids, seconds."""
    ids = torch.from_numpy(row.ids).where(torch.from_numpy(row.block) < 0, VIDEO)
    ids = ids.where(ids != VIDEO, world.theirs.config.video_token_id)[None]
    tower = Tower.load(str(world.folder))
    pixels, grids = [], []
    for clip in clips:
        name = Path(clip.info.id).name
        folder = world.folder.parents[1] / "videos" / name
        frames = np.stack([np.asarray(Image.open(path)) for path in sorted(folder.iterdir())])
        pixels.append(patchify(tower.normalise(frames), 2, PATCH, 2))
        grids.append([len(frames) // 2, frames.shape[1] // PATCH, frames.shape[2] // PATCH])
    found = {"input_ids": ids, "mm_token_type_ids": 2 * (ids == world.theirs.config.video_token_id)}
    found |= {"pixel_values_videos": torch.cat(pixels), "video_grid_thw": torch.tensor(grids)}
    if world.theirs.config.model_type == "qwen2_5_vl":
        found["second_per_grid_ts"] = torch.tensor([1.0] * len(clips))
    return found


@contextmanager
def banked_tokens(world: World, clips: Sequence[Medium]) -> Iterator[None]:
    """Let their tower's tokens be those of the bank, which are theirs rounded to float16."""
    stored = [clip.read(1, range(len(clip.info.timestamps))) for clip in clips]
    tokens = torch.cat([torch.from_numpy(own).float().flatten(0, 2) for own in stored])

    def hook(module: Any, args: Any, output: Any) -> Any:
        *earlier, merged = tokens.split(LLM_WIDTH, dim=-1)
        own = getattr(output, "deepstack_features", [])
        for ours, theirs in zip([*earlier, merged], [*own, output.pooler_output], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3)
        output.pooler_output = merged
        if earlier:
            output.deepstack_features = earlier
        return output

    handle = world.theirs.model.visual.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def their_logits(world: World, row: Row, clips: Sequence[Medium]) -> Tensor:
    with torch.no_grad(), banked_tokens(world, clips):
        world.theirs.model.rope_deltas = None
        return world.theirs(**their_inputs(world, row, clips)).logits[0]


TALKS = [
    ("a", ("<video>\nWhen is it?", "from 1.5 to 2.25")),
    ("b", ("Look: <video>", "at 0.5", "and 0.25 ?", "red")),
    ("c", ("<video>circle", "1.5")),
    ("ab", ("<video> then <video> when?", "from 1.5")),
    ("", ("When is the red circle visible?", "from 1.5 to 2.25")),
]


@pytest.mark.parametrize("kind", MAKE)
def test_logits_are_those_of_the_checkpoint(worlds: dict[str, World], kind: str) -> None:
    world = worlds[kind]
    model, said = world.start()
    assert "projector: none (identity): the bank holds the merged tokens" in said
    assert model.config.frame_positions == "mrope"
    assert (model.config.around_media or model.config.around_frames) == TAGS[:2]
    rows, theirs = [], []
    for names, texts in TALKS:
        clips = world.clips(names)
        rows.append((laid_out(model, clips, *texts), clips))
        given = rows[-1][0]
        theirs.append(their_logits(world, given, clips) if names else text_logits(world, given))
    as_theirs(model, rows, theirs)


def text_logits(world: World, row: Row) -> Tensor:
    with torch.no_grad():
        world.theirs.model.rope_deltas = None
        return world.theirs(input_ids=torch.from_numpy(row.ids)[None]).logits[0]


@pytest.mark.parametrize("kind", MAKE)
def test_answers_are_those_of_the_checkpoint(worlds: dict[str, World], kind: str) -> None:
    world = worlds[kind]
    model, _ = world.start()
    prompts = [
        (laid_out(model, clips, "<video>\nWhen?", prompt=True), clips)
        for clips in (world.clips(name) for name in "abc")
    ]
    said = generate(model, batch_of(model, *prompts), stop=frozenset(), max_new_tokens=12)
    for pieces, (row, clips) in zip(said, prompts, strict=True):
        with banked_tokens(world, clips):
            world.theirs.model.rope_deltas = None
            ids = world.theirs.generate(
                **their_inputs(world, row, clips),
                max_new_tokens=12,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        assert [piece.token for piece in pieces] == ids[0, len(row) :].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_cached_decoding_is_the_whole_row(worlds: dict[str, World], kind: str) -> None:
    """Prompts of two lengths, read on for longer than a clip lasts in positions of time."""
    world = worlds[kind]
    model, _ = world.start()
    clips = [world.clips(name) for name in "ab"]
    texts = [("<video>\nWhen?", "from 1.5 to 2.25, red at 0.5" * 2), ("<video>?", "circle" * 9)]
    rows = [laid_out(model, own, *said) for own, said in zip(clips, texts, strict=True)]
    prompts = [
        laid_out(model, own, said[0], prompt=True) for own, said in zip(clips, texts, strict=True)
    ]
    whole = our_logits(model, batch_of(model, *zip(rows, clips, strict=True)))
    steps = min(len(row) - len(prompt) for row, prompt in zip(rows, prompts, strict=True))
    assert steps > 18
    with torch.no_grad():
        reader = Cached(model, batch_of(model, *zip(prompts, clips, strict=True)))
        states = [reader.prompt()]
        for k in range(steps - 1):
            ids = [row.ids[len(prompt) + k] for row, prompt in zip(rows, prompts, strict=True)]
            table = model.llm.get_input_embeddings()
            states.append(reader.read(table(torch.as_tensor(np.asarray(ids)))))
        found = model.logits(torch.stack(states, 1).flatten(0, 1)).unflatten(0, (2, steps))
    for number, prompt in enumerate(prompts):
        close(found[number], whole[number, len(prompt) - 1 : len(prompt) - 1 + steps])


def test_a_checkpoint_that_was_published_is_read_as_well(
    worlds: dict[str, World], tmp_path: Path
) -> None:
    """As on the Hub, its text settings lie flat in config.json, and `rope_scaling` says mrope."""
    world = worlds["qwen2_5_vl"]
    shutil.copytree(world.folder, tmp_path / "stage")
    facts = json.loads((tmp_path / "stage" / "config.json").read_text())
    text = facts.pop("text_config")
    rope = text.pop("rope_parameters")
    facts |= {name: value for name, value in text.items() if name not in ("model_type", "dtype")}
    facts["rope_theta"] = rope["rope_theta"]
    facts["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    (tmp_path / "stage" / "config.json").write_text(json.dumps(facts))
    model, _ = world.start(stage_path=str(tmp_path / "stage"))
    clips = world.clips("b")
    row = laid_out(model, clips, *TALKS[1][1])
    close(our_logits(model, batch_of(model, (row, clips)))[0], their_logits(world, row, clips))


def test_positions_begin_anew_with_each_record_and_clip(worlds: dict[str, World]) -> None:
    world = worlds["qwen2_5_vl"]
    model, _ = world.start()
    one, two = world.clips("a"), world.clips("ba")
    rows = [laid_out(model, one, "<video>?", "red"), laid_out(model, two, "<video><video>", "red")]
    alone = batch_of(model, *zip(rows, [one, two], strict=True)).rope
    joined = batch_of(model, *zip(rows, [one, two], strict=True), packed=True).rope
    assert alone is not None
    assert joined is not None
    kept = [alone[:, k, : len(row)] for k, row in enumerate(rows)]
    assert torch.equal(joined[:, 0], torch.cat(kept, dim=1))
    first = rows[0].frames[0].first
    assert kept[0][:, :first].tolist() == [list(range(first))] * 3
    # three units a second apart, three positions a second; rows of five cells
    cells = [
        (first + 3 * t, first + y, first + x) for t in range(3) for y in range(3) for x in range(5)
    ]
    assert kept[0][:, first : first + 45].T.tolist() == [list(place) for place in cells]
    assert kept[0][:, first + 45].tolist() == [first + 5] * 3


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_the_model_comes_back_from_disk_and_a_run_starts_from_it(
    worlds: dict[str, World], kind: str, tmp_path: Path
) -> None:
    world = worlds[kind]
    model, _ = world.start()
    clips = world.clips("b")
    row = laid_out(model, clips, *TALKS[1][1])
    expected = our_logits(model, batch_of(model, (row, clips)))
    model.save(tmp_path / "run")
    again = VLM.load(tmp_path / "run").eval()
    assert torch.equal(our_logits(again, batch_of(again, (row, clips))), expected)
    (tmp_path / "run" / "run.json").write_text("{}")
    assert kind_of(str(tmp_path / "run")) == "run"
    for stage in ("run", "run/llm"):
        later, _ = world.start(stage_path=str(tmp_path / stage))
        assert later.config.frame_positions == "mrope"
        assert torch.equal(our_logits(later, batch_of(later, (row, clips))), expected)
    # the LLM alone is plain on text, in transformers too
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "llm")
    said = laid_out(model, [], "When is it?", "red")
    with torch.no_grad():
        close(plain(torch.from_numpy(said.ids)[None]).logits[0], text_logits(world, said))


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_training_settings_of_all_kinds_take_such_a_stage(
    worlds: dict[str, World], kind: str
) -> None:
    """LAPE, the frame-causal loss, closing vectors and frames that see themselves go with M-RoPE."""
    world = worlds[kind]
    model, said = world.start(
        enable_lape=True,
        loss_weight=0.15,
        frame_marks="frames",
        frame_attention="block",
        fast_stride=2,
        slow_frame_ratio="0.5",
    )
    admit(model)
    assert "stage     lape: new, the stage has no coordinate tables" in said
    clips = world.clips("b")
    row = laid_out(model, clips, "<video>\nWhen?", "from <t:1.5>")
    batch = batch_of(model, (row, clips))
    losses = model(batch)
    (losses["ce"] + losses["ar"].sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    if kind == "qwen3_vl":  # where each frame stands alone
        return
    # a coarser frame's rows lie where the finer one's do; its closing token is beside its last cell
    assert batch.rope is not None
    fast = next(frame for frame in row.frames if frame.grid.stride == 2)
    base = row.frames[0].first
    places = (batch.rope[:, 0, fast.first : fast.first + fast.tokens] - base).T.tolist()
    assert [place[1:] for place in places] == [[y, x] for y in (0, 2, 4) for x in (0, 2)] + [[6, 4]]


def test_plain_positions_are_a_setting(worlds: dict[str, World]) -> None:
    world = worlds["qwen2_vl"]
    model, _ = world.start(frame_positions="plain", media_tags="none")
    assert (model.config.mrope_sections, model.config.around_media) == ("", None)
    clips = world.clips("a")
    row = laid_out(model, clips, "<video>", "red")
    assert batch_of(model, (row, clips)).rope is None


def test_times_are_written_as_the_checkpoint_was_trained(worlds: dict[str, World]) -> None:
    """As its own processor writes them, of whose text the tokens between the tags are the cells'."""
    world = worlds["qwen3_vl"]
    model, said = world.start()
    assert "DeepStack: 2 layers of the tower" in said
    clips = world.clips("a")
    row = laid_out(model, clips, "<video>\nWhen?", prompt=True)
    processor = SimpleNamespace(
        video_processor=SimpleNamespace(merge_size=2, temporal_patch_size=2),
        vision_start_token=TAGS[0],
        vision_end_token=TAGS[1],
        video_token=TAGS[2],
        _calculate_timestamps=partial(Qwen3VLProcessor._calculate_timestamps, None),
    )
    metadata = SimpleNamespace(fps=2, frames_indices=list(range(FRAMES["a"])))
    grids = torch.tensor([[3, 24 // PATCH, 40 // PATCH]])
    video = {"video_grid_thw": grids, "video_metadata": [metadata]}
    written = Qwen3VLProcessor.replace_video_token(processor, video, 0)
    tokenizer = model.tokenizer
    talk = [{"role": "user", "content": f"{written}\nWhen?"}]
    text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    pad = tokenizer.convert_tokens_to_ids(TAGS[2])
    ours = np.where(row.block < 0, row.ids, pad).tolist()
    assert ours == tokenizer(text, add_special_tokens=False).input_ids
    plain, _ = world.start(frame_time="none", media_tags="none")
    assert (plain.config.time_form, plain.config.around_frames) == ("", None)
    alone = laid_out(plain, clips, "<video>\nWhen?", prompt=True)
    stamps = [Chat.of(model).stamp(time) for time in (0.25, 1.25, 2.25)]
    assert len(alone) == len(row) - sum(len(part) for stamp in stamps for part in stamp)


def test_layers_that_are_computed_again_add_the_same(worlds: dict[str, World]) -> None:
    world = worlds["qwen3_vl"]
    found = []
    for again in (0, 1):
        model, _ = world.start()
        model.train()
        if again:
            checkpoint_activations(model.llm, again)
        clips = world.clips("a")
        batch = batch_of(model, (laid_out(model, clips, "<video>\nWhen?", "from 1.5"), clips))
        model(batch)["ce"].backward()
        model.eval()
        found.append({name: p.grad.clone() for name, p in model.llm.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


def test_what_is_not_the_checkpoints_own_is_refused_by_name(
    worlds: dict[str, World], toy: Path, toy_bank: Path, tmp_path: Path
) -> None:
    world, other = worlds["qwen2_vl"], worlds["qwen2_5_vl"]
    with pytest.raises(
        UserError, match=r"reads the merged tokens of its own tower, expected its own"
    ):
        world.start(stage_path=str(other.folder))
    newest = worlds["qwen3_vl"]
    with pytest.raises(UserError, match=r"adds features of the layers 0, 1 .*--layer 0,1,merged"):
        world.start(stage_path=str(newest.folder))
    with pytest.raises(
        UserError, match=r"takes merged tokens alone, and the bank holds layer 0,1,m"
    ):
        newest.start(stage_path=str(world.folder))
    with pytest.raises(UserError, match=r"what DeepStack adds would not be pooled"):
        newest.start(pool_after_projector=True)
    with pytest.raises(UserError, match=r"got features of width 32; take a bank of the checkpoint"):
        world.start(stage_path=str(toy / "llm"))
    with pytest.raises(
        UserError, match=r"mrope: its LLM was not trained with M-RoPE; set frame_pos"
    ):
        world.start(stage_path=str(toy / "llm"), frame_positions="mrope")
    settings = world.config(mm_projector_type="identity")
    unmerged = replace(settings, bank=[str(toy_bank)], data_path=[str(toy / "train.jsonl")])
    unmerged = replace(unmerged, mm_spatial_pool_stride=4, fast_stride=4)
    problem = bank_problem(unmerged, open_dataset(unmerged))
    assert problem is not None
    assert "the bank holds layer -2; set bank to one of preprocess encode" in problem
    with pytest.raises(UserError, match=r"the bank holds layer -2"):
        build(unmerged, open_dataset(unmerged), print)
    facts = json.loads((world.folder / "config.json").read_text())
    shutil.copytree(world.folder, tmp_path / "rounded")
    rounded = facts | {"quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "rounded" / "config.json").write_text(json.dumps(rounded))
    with pytest.raises(UserError, match=r"its weights are quantised"):
        world.start(stage_path=str(tmp_path / "rounded"))
    for change, why in (
        ({"model_type": "qwen3_vl_moe"}, "experts"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantised"),
        (
            {"text_config": facts["text_config"] | {"rope_parameters": {"rope_type": "yarn"}}},
            "yarn",
        ),
    ):
        stage = tmp_path / why
        stage.mkdir()
        (stage / "config.json").write_text(json.dumps(facts | change))
        problem = stage_problem(str(stage))
        assert problem is not None
        assert why in problem
        assert len(problem.splitlines()) == 1


@pytest.mark.parametrize(
    "kind",
    ["qwen2_5_vl", *(pytest.param(k, marks=pytest.mark.slow) for k in ("qwen2_vl", "qwen3_vl"))],
)
def test_a_run_trains_from_it_and_answers(
    worlds: dict[str, World], kind: str, train_here: Callable[..., Path], tmp_path: Path
) -> None:
    """The plan counts the tokens around media; packed steps; trained, saved, loaded and exported it is
    what transformers computes with its weights."""
    world = worlds[kind]
    settings: dict[str, Any] = dict(MERGED) | {
        "stage_path": world.folder,
        "bank": world.bank,
        "data_path": world.data,
        "pack_tokens": 300,
        "max_steps": 2,
        "num_train_epochs": 4,
    }
    out = train_here(tmp_path / "run", **settings)
    said = (out / "train.log").read_text()
    assert "positions: frames at their time, row and column (M-RoPE)" in said
    model = VLM.load(out).eval()
    assert model.config.mrope_sections == {"qwen3_vl": "2,1,1"}.get(kind, "1,1,2")
    admit(model)
    clips = world.clips("b")
    prompt = laid_out(model, clips, "<video>\nWhen?", prompt=True)
    batch = batch_of(model, (prompt, clips))
    answers = generate(model, batch, stop=frozenset(), max_new_tokens=3)
    assert [len(answer) for answer in answers] == [3]
    moved = replace(world, theirs=copy.deepcopy(world.theirs))
    weights = model.llm.state_dict()
    table = "embed_tokens.weight"
    before = moved.theirs.model.language_model.state_dict()[table].clone()
    own = {k.removeprefix("model."): v for k, v in weights.items() if k.startswith("model.")}
    moved.theirs.model.language_model.load_state_dict(own)
    moved.theirs.lm_head.load_state_dict({"weight": weights["lm_head.weight"]})
    assert not torch.equal(weights[f"model.{table}"], before)
    row = laid_out(model, clips, *TALKS[1][1])
    theirs = their_logits(moved, row, clips)
    export(out, tmp_path / "exported")
    for trained in (model, VLM.load(tmp_path / "exported").eval()):
        close(our_logits(trained, batch_of(trained, (row, clips)))[0], theirs)
