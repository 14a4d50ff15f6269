"""The assembled model: what goes in where, the language loss, and a folder that tells the truth."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.batch import Batch, to_device
from model.config import read_model_config
from model.generate import choose, write_answer
from model.lape.tokens import NAMES, PRESETS, TIME
from model.llm import load_llm
from model.vlm import VLM, VLMConfig
from shards.errors import UserError

Model, Clip, Batches, Llm = (
    Callable[..., VLM],
    Callable[..., Any],
    Callable[..., Batch],
    Callable[..., Any],
)
QUESTION = "Look.<video>\nWhat is at <x:0.31><y:0.52> at <t:1.75>?"
ANSWER = "red from <t:0.4> to <t:3.3> at <x:0.111><y:0.999>"
SHORT = ("Where?", "at <x:0.5>")


def hats(u: float, bins: int) -> np.ndarray:
    return np.array([max(0.0, 1 - abs(u * (bins - 1) - i)) for i in range(bins)])


def bell(u: float, bins: int) -> np.ndarray:
    edges = np.arange(bins + 1) - 0.5 - u * (bins - 1)
    below = np.array([0.5 * math.erfc(-edge / math.sqrt(2)) for edge in edges])
    return np.diff(below) / np.diff(below).sum()


def double(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


@pytest.mark.parametrize("frame_attention", ["block", "token"])
@pytest.mark.parametrize("enable_lape", [True, False])
def test_every_token_is_embedded_as_what_it_is(
    make_model: Model,
    make_clip: Clip,
    make_batch: Batches,
    enable_lape: bool,
    frame_attention: str,
) -> None:
    model = make_model(enable_lape=enable_lape, frame_attention=frame_attention)
    clip = make_clip(frames=5, covered=(0.0, 0.1, 1.0, 0.8))
    batch = make_batch(model, ([clip], QUESTION, ANSWER), ([], *SHORT))
    embeds = model.embed(batch)[0].detach()
    begin = min(int(group.token_index.min()) for group in batch.groups)
    cells = {2: (3, 4), 4: (2, 2)}  # of 5x7 patches
    place = begin
    for frame, stride in enumerate((2, 4, 2, 4, 2)):
        features = torch.from_numpy(clip.features[stride][frame]).float()
        expected = model.projector(features) + model.visual.stream[int(stride == 4)]
        if model.lape is not None:
            group = next(g for g in batch.groups if g.grid.stride == stride)
            time = torch.tensor([frame / 5])  # 5 frames, one per second
            expected = (
                expected
                + model.lape.positions(group.grid, (0.0, 0.1, 1.0, 0.8), time, torch.ones(1))[0]
            )
        count = math.prod(cells[stride])
        torch.testing.assert_close(embeds[place : place + count], expected.detach().flatten(0, 1))
        assert torch.equal(embeds[place + count], model.visual.frame_end)
        place += count + 1
    table = model.llm.get_input_embeddings().weight
    coordinates = 0
    for k in [*range(begin), *range(place, int(batch.lengths[0]))]:
        axis = int(batch.axis[0, k])
        if axis < 0:
            assert torch.equal(embeds[k], table[batch.input_ids[0, k]])
            continue
        rows = double(model.lape.input_tables[axis])
        expected = hats(float(batch.coord[0, k]), len(rows)) @ rows
        np.testing.assert_allclose(embeds[k], expected, atol=1e-4)
        coordinates += 1
    assert coordinates == (7 if enable_lape else 0)


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("more_rows", [0, 1, 500])
@pytest.mark.parametrize(("num_temporal", "num_spatial"), [(50, 100), (100, 50), (150, 150)])
def test_an_anchor_is_the_same_in_string_id_input_logit_and_answer(
    make_llm: Llm,
    make_tokenizer: Callable[[], Any],
    make_model: Model,
    make_batch: Batches,
    num_temporal: int,
    num_spatial: int,
    more_rows: int,
    tied: bool,
    kind: str,
) -> None:
    rows = len(make_tokenizer()) + more_rows
    llm = make_llm(kind, rows=rows, tied=tied)
    model = make_model(llm, num_temporal_tokens=num_temporal, num_spatial_tokens=num_spatial)
    batch = make_batch(model, ([], "Say <TEMP-037><HEIGHT-037><WIDTH-037>", "ok"))
    embeds, hidden = model.embed(batch)[0], model.hidden_states(batch)[:1].detach()
    logits = model.logits(hidden)
    counts = (num_temporal, num_spatial, num_spatial)
    assert logits.shape == (1, rows + sum(counts))
    for axis, bins in enumerate(counts):
        string = f"<{NAMES[axis]}-037>"
        id_ = model.tokenizer.convert_tokens_to_ids(string)
        assert model.tokenizer.decode([id_]) == string
        place = int(torch.nonzero(batch.axis[0] == axis))
        assert batch.input_ids[0, place] == id_ == model.lape.tokens.token_id(axis, 37 / (bins - 1))
        assert batch.coord[0, place].item() == pytest.approx(37 / (bins - 1))
        row = model.lape.input_tables[axis][37]
        torch.testing.assert_close(embeds[place], row, rtol=1e-4, atol=1e-4)
        column = rows + sum(counts[:axis]) + 37
        expected = double(hidden[0]) @ double(model.lape.output_tables[axis][37])
        assert logits[0, column].item() == pytest.approx(expected, abs=1e-3)
        if id_ < rows:
            assert logits[0, id_] < -1e8  # the head's own column at that id is not a second anchor
        with torch.no_grad():
            before = model.lape.output_tables[axis].clone()
            model.lape.output_tables[axis][37] += 50 * hidden[0] / hidden[0].square().sum().sqrt()
            (piece,) = choose(model, hidden)
            model.lape.output_tables[axis].copy_(before)
        assert (piece.token, piece.axis) == (id_, axis)
        assert piece.coord == pytest.approx(37 / (bins - 1), abs=1e-3)
        text = write_answer(model, [piece], duration=8.0)
        seconds = 8.0 if axis == TIME else 1.0
        assert float(text[3:-1]) == pytest.approx(37 / (bins - 1) * seconds, abs=8e-3)
    text_logits = llm.get_output_embeddings()(hidden)
    own = [i for i in range(rows) if i not in model.lape.tokens.all_ids]
    assert torch.equal(logits[:, own], text_logits[:, own])


@pytest.mark.parametrize("letter", ["t", "y", "x"])
def test_changing_a_prompt_coordinate_changes_its_embedding_and_the_answer(
    make_model: Model, make_batch: Batches, make_clip: Clip, letter: str
) -> None:
    model, clip = make_model(), make_clip()
    one, other = (
        make_batch(model, ([clip], f"<video>\nWhat is at <{letter}:{value}>?", "red"))
        for value in (0.50, 0.51)
    )
    changed = (model.embed(one) != model.embed(other)).any(dim=-1)
    assert changed.sum() == 1
    assert one.axis[changed].item() == "tyx".index(letter)
    assert model(one)["ce"] != model(other)["ce"]


def test_padding_and_neighbours_shift_no_coordinate(
    make_model: Model, make_clip: Clip, make_batch: Batches
) -> None:
    model = make_model()
    talks = [
        ([make_clip(1, frames=2)], QUESTION, ANSWER),
        ([make_clip(2, frames=7)], f"Many words, and <x:0.7>, come here. {QUESTION}", ANSWER),
        ([], *SHORT),
    ]
    together = model(make_batch(model, *talks))
    alone = [model(make_batch(model, talk)) for talk in talks]
    for name in ("ce", "coordinate_ce", "ar", "ar_copy", "ar_count"):
        total = sum(out[name] for out in alone)
        torch.testing.assert_close(together[name], total, rtol=1e-5, atol=1e-4)
    assert together["coordinate_ce"] > 0


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("tied", [True, False])
def test_the_language_loss_is_that_of_a_slow_loop(
    make_llm: Llm,
    make_model: Model,
    make_clip: Clip,
    make_batch: Batches,
    preset: str,
    tied: bool,
) -> None:
    llm = make_llm(tied=tied)
    model = make_model(llm, num_temporal_tokens=30, num_spatial_tokens=20, lape_preset=preset)
    batch = make_batch(model, ([make_clip()], QUESTION, ANSWER), ([], *SHORT))
    hidden = double(model.hidden_states(batch)).reshape(2, -1, 32)
    head = double(llm.get_output_embeddings().weight)
    tables = [double(table) for table in model.lape.output_tables]
    end = model.tokenizer.convert_tokens_to_ids("<|im_end|>")
    start = model.tokenizer.convert_tokens_to_ids("<|im_start|>")
    total = coordinates = 0.0
    kept = 0
    for row in range(2):
        ids = batch.input_ids[row, : batch.lengths[row]].tolist()
        # the answer: after the last <|im_start|>assistant\n, up to and with <|im_end|>
        opening = len(ids) - 1 - ids[::-1].index(start)
        first = opening + 1 + len(model.tokenizer("assistant\n").input_ids)
        last = max(k for k, id_ in enumerate(ids) if id_ == end)
        for k in range(first, last + 1):
            state = hidden[row, k - 1]
            text = head @ state
            text[[i for i in model.lape.tokens.all_ids if i < len(text)]] = -np.inf
            anchors = [table @ state for table in tables]
            every = np.concatenate([text, *anchors])
            log_z = every.max() + np.log(np.exp(every - every.max()).sum())
            axis = int(batch.axis[row, k])
            if axis < 0:
                total += log_z - text[ids[k]]
            else:
                soft = hats if preset == "st" else bell
                target = soft(float(batch.coord[row, k]), len(tables[axis]))
                total += log_z - target @ anchors[axis]
                coordinates += log_z - target @ anchors[axis]
            kept += 1
    assert kept == len(batch.labels)
    out = model(batch)
    assert out["ce"].item() == pytest.approx(total, rel=1e-5)
    assert out["coordinate_ce"].item() == pytest.approx(coordinates, rel=1e-5)


def gradients(model: VLM, loss: Tensor) -> dict[str, Tensor]:
    """Return every parameter's gradient, zero where the loss does not reach it."""
    model.zero_grad()
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    return {
        name: torch.zeros_like(p) if found[name] is None else found[name].clone()
        for name, p in model.named_parameters()
    }


def assert_same_gradients(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    scale = max(grad.abs().max().item() for grad in one.values())
    for name, grad in one.items():
        torch.testing.assert_close(grad, two[name], rtol=1e-6, atol=1e-6 * scale, msg=name)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("head_rows", [1024, 4])
def test_without_lape_the_language_loss_is_that_of_transformers_on_all_logits(
    make_llm: Llm,
    make_model: Model,
    make_clip: Clip,
    make_batch: Batches,
    monkeypatch: pytest.MonkeyPatch,
    tied: bool,
    head_rows: int,
) -> None:
    monkeypatch.setattr("model.lape.head.HEAD_ROWS", head_rows)
    model = make_model(make_llm(tied=tied), enable_lape=False, loss_weight=0)
    batch = make_batch(model, ([make_clip()], QUESTION, ANSWER), ([], *SHORT))
    labels = torch.full_like(batch.input_ids, -100).flatten()
    labels[batch.predict_index + 1] = batch.labels
    theirs = model.llm(
        inputs_embeds=model.embed(batch),
        attention_mask=model.attention_mask(batch),
        position_ids=batch.position_ids,
        labels=labels.view_as(batch.input_ids),
        num_items_in_batch=1,  # a sum
    ).loss
    expected = gradients(model, theirs)
    ours = model(batch)["ce"]
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    assert_same_gradients(expected, gradients(model, ours))


@pytest.mark.parametrize("preset", PRESETS)
def test_the_language_loss_in_chunks_is_that_in_one(
    make_model: Model,
    make_clip: Clip,
    make_batch: Batches,
    monkeypatch: pytest.MonkeyPatch,
    preset: str,
) -> None:
    model = make_model(lape_preset=preset)
    batch = make_batch(model, ([make_clip()], QUESTION, ANSWER), ([], *SHORT))
    whole = model(batch)
    expected = gradients(model, whole["ce"])
    monkeypatch.setattr("model.lape.head.HEAD_ROWS", 5)
    assert len(batch.labels) % 5, "the last chunk should be a short one"
    chunked = model(batch)
    for name in ("ce", "coordinate_ce"):
        assert chunked[name].item() == pytest.approx(whole[name].item(), rel=1e-6)
    assert_same_gradients(expected, gradients(model, chunked["ce"]))


def test_lape_off_leaves_tokenizer_and_logits_as_they_are(
    make_llm: Llm,
    make_tokenizer: Callable[[], Any],
    make_model: Model,
    make_clip: Clip,
    make_batch: Batches,
) -> None:
    llm = make_llm()
    model = make_model(llm, enable_lape=False)
    assert model.lape is None
    assert not any("lape" in name for name in model.state_dict())
    assert model.tokenizer.get_vocab() == make_tokenizer().get_vocab()
    batch = make_batch(model, ([], "Where at <x:0.5>?", "at <y:0.25>"), ([], *SHORT))
    padding = torch.arange(batch.input_ids.shape[1]) < batch.lengths[:, None]
    theirs = llm(
        input_ids=batch.input_ids, attention_mask=padding.long(), position_ids=batch.position_ids
    ).logits
    ours = model.logits(model.hidden_states(batch)).view_as(theirs)
    torch.testing.assert_close(ours[padding], theirs[padding], rtol=1e-5, atol=1e-5)
    # with the very mask, and with frames put in by hand, to the bit
    batch = make_batch(model, ([make_clip()], QUESTION, ANSWER))
    embeds = llm.get_input_embeddings()(batch.input_ids)[0]
    for group in batch.groups:
        cells = model.projector(group.features.float()) + model.visual.stream[group.stream]
        embeds[group.token_index.flatten()] = cells.flatten(0, 2)
        embeds[group.end_index] = model.visual.frame_end
    theirs = llm(
        inputs_embeds=embeds[None],
        attention_mask=model.attention_mask(batch),
        position_ids=batch.position_ids,
    ).logits
    assert torch.equal(model.logits(model.hidden_states(batch)), theirs[0])


def test_autocast_leaves_coordinates_in_full_precision(
    make_model: Model, make_clip: Clip, make_batch: Batches
) -> None:
    model = make_model(num_temporal_tokens=150, num_spatial_tokens=150)
    batch = make_batch(model, ([make_clip()], QUESTION, ANSWER))
    assert batch.coord.dtype == batch.label_coord.dtype == torch.float32
    assert all(group.time.dtype == torch.float32 for group in batch.groups)
    plain = model.embed(batch)
    with torch.autocast("cpu", torch.bfloat16):
        cast = model.embed(batch)
    at_coordinates = batch.axis >= 0
    assert at_coordinates.sum() == 7
    assert torch.equal(plain[at_coordinates], cast[at_coordinates])


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("prompt", [True, False])
def test_a_batch_without_frames_or_coordinates_gives_zero_not_missing_gradients(
    make_model: Model, make_batch: Batches, preset: str, prompt: bool
) -> None:
    model = make_model(lape_preset=preset)
    talk = ([], "What is it?") if prompt else ([], "What is it?", "red")
    out = model(make_batch(model, talk, prompt=prompt))
    assert out["ar_count"].sum() == 0
    (out["ce"] + out["ar"].sum()).backward()
    for part, parameters in model.parts().items():
        for parameter in parameters:
            assert parameter.grad is not None, part
            assert parameter.grad.isfinite().all(), part
    still = [*model.projector.parameters(), *model.lape.input_tables, *model.visual.parameters()]
    if preset == "plus":
        still.append(model.lape.gamma)
    assert all(parameter.grad.eq(0).all() for parameter in still)
    # every supervised token's partition function holds all anchors
    moved = [bool(table.grad.abs().sum() > 0) for table in model.lape.output_tables]
    assert moved == [not prompt] * 3


@pytest.mark.parametrize(
    "settings",
    [{}, {"enable_lape": False}, {"loss_weight": 0}, {"lape_preset": "st", "predictor": "xattn"}],
)
def test_each_trainable_parameter_is_in_just_one_part(
    make_model: Model, settings: dict[str, Any]
) -> None:
    model = make_model(**settings)
    for frozen in list(model.llm.parameters())[:3]:
        frozen.requires_grad_(False)
    parts = model.parts()
    ids = [id(p) for part in parts.values() for p in part]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(p) for p in model.parameters() if p.requires_grad}
    expected = {"llm", "projector", "visual"}
    expected |= {"lape"} if settings.get("enable_lape", True) else set()
    expected |= {"frame_causal"} if settings.get("loss_weight", 1) else set()
    assert set(parts) == expected
    if "lape" in parts:
        assert len(parts["lape"]) == (6 if settings.get("lape_preset") == "st" else 7)


def test_gamma_starts_where_positions_are_a_tenth_of_the_features(
    make_model: Model, make_clip: Clip, make_batch: Batches
) -> None:
    model = make_model()
    batch = make_batch(
        model, ([make_clip(1)], QUESTION, ANSWER), ([make_clip(2)], QUESTION, ANSWER)
    )

    def measured() -> float:
        inside, added = [], []
        gamma = model.lape.gamma.detach().clone()
        for group in batch.groups:
            with torch.no_grad():
                whole = model.frame_tokens(group)
                model.lape.gamma.zero_()
                bare = model.frame_tokens(group)
                model.lape.gamma.copy_(gamma)
                inside.append((bare - model.visual.stream[group.stream]).flatten())
                added.append((whole - bare).flatten())
        rms = [torch.cat(values).square().mean().sqrt().item() for values in (added, inside)]
        return rms[0] / rms[1]

    before = measured()
    assert model.calibrate(batch) == pytest.approx(before, rel=1e-4)
    assert measured() == pytest.approx(0.1, rel=1e-3)
    assert len(set(model.lape.gamma.tolist())) == 1
    strong = make_model(lape_share=0.5)
    assert strong.calibrate(batch) == pytest.approx(before, rel=1e-4)
    torch.testing.assert_close(strong.lape.gamma, 5 * model.lape.gamma)
    fixed = make_model(lape_preset="st")
    assert fixed.calibrate(batch) == pytest.approx(before, rel=1e-4)
    assert fixed.lape.gamma.tolist() == [1.0] * 3
    assert not fixed.lape.gamma.requires_grad
    assert math.isnan(model.calibrate(make_batch(model, ([], *SHORT))))
    assert math.isnan(make_model(enable_lape=False).calibrate(batch))


SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "other": {
        "lape_preset": "st",
        "predictor": "xattn",
        "num_temporal_tokens": 20,
        "num_spatial_tokens": 30,
        "mm_projector_type": "linear",
        "frame_attention": "token",
    },
    "bare": {"enable_lape": False, "loss_weight": 0.0},
}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_comes_back_to_the_bit(
    make_llm: Llm,
    make_model: Model,
    make_clip: Clip,
    make_batch: Batches,
    tmp_path: Path,
    settings: str,
    tied: bool,
) -> None:
    model = make_model(make_llm(tied=tied), **SETTINGS[settings])
    with torch.no_grad():
        for parameter in model.parameters():  # nothing is left as it was made
            parameter.add_(0.01 * torch.randn_like(parameter))
    model.save(tmp_path)
    again = VLM.load(tmp_path).eval()
    assert again.config == model.config
    assert (again.tower, again.tower_width, again.features) == ("none", 12, {"pool": "average"})
    assert again.tokenizer.get_vocab() == model.tokenizer.get_vocab()
    ours, theirs = model.state_dict(), again.state_dict()
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    talk = ([make_clip()], QUESTION, ANSWER)
    out, out_again = model(make_batch(model, talk)), again(make_batch(again, talk))
    assert set(out) == set(out_again)
    assert all(torch.equal(out[name], out_again[name]) for name in out)


def test_a_model_with_an_adapter_comes_back_to_the_bit(
    make_llm: Llm, make_model: Model, make_clip: Clip, make_batch: Batches, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = make_model(peft.get_peft_model(make_llm(), lora)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.save(tmp_path)
    again = VLM.load(tmp_path).eval()
    talk = ([make_clip()], QUESTION, ANSWER)
    out, out_again = model(make_batch(model, talk)), again(make_batch(again, talk))
    assert all(torch.equal(out[name], out_again[name]) for name in out)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in again.named_parameters() if p.requires_grad} == trainable


def edit(path: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def saved(make_model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    make_model().save(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


@pytest.mark.parametrize(
    ("file", "tensor"),
    [
        ("projector.safetensors", "2.bias"),
        ("visual.safetensors", "frame_end"),
        ("lape/tables.safetensors", "output_tables.1"),
        ("frame_causal.safetensors", "stream.weight"),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused_by_name(
    folder: Path, file: str, tensor: str
) -> None:
    path = folder / file
    original = load_file(path)

    shape = tuple(original[tensor].shape)
    cut = (1, *shape[1:])

    def missing(tensors: dict[str, Tensor]) -> None:
        del tensors[tensor]

    def renamed(tensors: dict[str, Tensor]) -> None:
        tensors["new_name"] = tensors.pop(tensor)

    def reshaped(tensors: dict[str, Tensor]) -> None:
        tensors[tensor] = tensors[tensor][:1].clone()

    for change, complaints in (
        (missing, [f"{tensor} is missing"]),
        (renamed, [f"{tensor} is missing", "new_name is not in this model"]),
        (reshaped, [f"{tensor} is {cut}, the config asks for {shape}"]),
    ):
        save_file(original, path)
        edit(path, change)
        with pytest.raises(UserError, match=f"{file}: ") as caught:
            VLM.load(folder)
        assert all(complaint in str(caught.value) for complaint in complaints)
    save_file({}, path)
    with pytest.raises(UserError, match=f"{tensor} is missing"):
        VLM.load(folder)
    path.unlink()
    with pytest.raises(UserError, match=f"{file}: missing.*copied in part"):
        VLM.load(folder)


def test_a_weight_missing_from_the_llm_is_refused_by_name(folder: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    edit(folder / "llm" / "model.safetensors", lambda tensors: tensors.pop(name))  # type: ignore[arg-type,return-value]
    with pytest.raises(UserError, match=f"llm: weights are missing: {name}"):
        VLM.load(folder)


def test_edited_token_ids_are_refused(folder: Path) -> None:
    path = folder / "lape" / "tokens.json"
    tokens = json.loads(path.read_text())
    tokens["first"][1] += 1
    path.write_text(json.dumps(tokens))
    with pytest.raises(UserError, match=r"lape.*do not match the tokenizer's"):
        VLM.load(folder)
    path.unlink()
    with pytest.raises(UserError, match=r"tokens.json: missing"):
        VLM.load(folder)


def test_a_tokenizer_without_the_anchors_is_refused(
    folder: Path, make_tokenizer: Callable[[], Any]
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["one more"])
    tokenizer.save_pretrained(folder / "llm")
    with pytest.raises(UserError, match="do not match the tokenizer's"):
        VLM.load(folder)


def test_a_folder_that_is_no_model_is_refused_with_a_way_out(
    folder: Path, make_model: Model, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"no trained model here \(config.json is missing\)"):
        VLM.load(tmp_path)
    path = folder / "config.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps(facts | {"format": 4}))
    with pytest.raises(UserError, match=r"format 3 \(got 4\).*--model takes"):
        VLM.load(folder)
    path.write_text(json.dumps(facts | {"format": 1}))
    for read in (VLM.load, make_model().adopt):
        with pytest.raises(
            UserError, match=r"of format 1.*does not take the seconds.*stage_path: .*llm"
        ):
            read(folder)
    path.write_text(json.dumps(facts | {"model": facts["model"] | {"newer": 1}}))
    with pytest.raises(UserError, match=r"unknown model settings \['newer'\]"):
        VLM.load(folder)


LAPE = {"enable_lape": True, "lape_positions": True}


@pytest.mark.parametrize(
    ("model", "pool", "lacking"),
    [
        ({}, "average", ""),
        (LAPE, "average", ""),
        ({}, "bilinear", ""),
        (LAPE | {"lape_positions": False}, "bilinear", ""),
        (LAPE, "bilinear", "positions of its bilinear cells"),
        (LAPE | {"pool_after_projector": True}, "average", "positions of its bilinear cells"),
        ({"mm_projector_type": "mlp_downsample"}, "average", "row by row"),
        ({"mm_projector_type": "mlp_downsample", "frame_positions": "mrope"}, "average", ""),
        ({"mm_projector_type": "mlp_downsample_2x2_fix"}, "average", ""),
    ],
)
def test_a_model_of_an_older_format_is_read_where_it_is_computed_as_it_was(
    model: dict[str, object], pool: str, lacking: str, tmp_path: Path
) -> None:
    facts = {"model": asdict(VLMConfig(enable_lape=False)) | model, "features": {"pool": pool}}
    for made in (2, 3):
        (tmp_path / "config.json").write_text(json.dumps(facts | {"format": made}))
        if made == 2 and lacking:
            with pytest.raises(UserError, match=lacking):
                read_model_config(tmp_path)
        else:
            assert read_model_config(tmp_path)["format"] == made


def test_a_new_model_adopts_what_fits_of_a_saved_one(
    folder: Path, saved: Path, make_model: Model
) -> None:
    (folder / "frame_causal.safetensors").unlink()
    model, source = make_model(seed=7), VLM.load(saved)
    lines = model.adopt(folder)
    files = ["projector", "visual", "lape/tables", "frame_causal"]
    assert [line.split(":")[0] for line in lines] == [f"{file}.safetensors" for file in files]
    assert "new" in lines[-1]
    for part in ("projector", "visual", "lape"):
        ours, theirs = getattr(model, part).state_dict(), getattr(source, part).state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    with pytest.raises(UserError, match="LAPE preset plus, asked st"):
        make_model(lape_preset="st").adopt(saved)
    with pytest.raises(UserError, match=r"input_tables.0 is \(100, 32\), the config asks for \(50"):
        make_model(num_temporal_tokens=50).adopt(saved)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("mm_projector_type", "mlp3x"),
        ("frame_sampling_strategy", "two_stream"),
        ("frame_attention", "full"),
        ("predictor", "mlp"),
        ("lape_preset", "minus"),
    ],
)
def test_an_unknown_setting_is_refused_with_the_ones_there_are(setting: str, value: str) -> None:
    with pytest.raises(UserError, match=rf"{setting} must be one of .*, got '{value}'"):
        VLMConfig(**{setting: value})


def test_an_llm_without_missing_weights_loads(folder: Path) -> None:
    assert load_llm(folder / "llm").config.vocab_size == 512


def test_features_of_another_grid_are_refused(
    make_model: Model, make_clip: Clip, make_batch: Batches
) -> None:
    clip = make_clip(patch_grid=(5, 7))
    clip.features[4] = clip.features[4][:, :, :1]
    with pytest.raises(UserError, match=r"features \(2, 2, 1, 12\) do not fit \(2, 2, 2\)"):
        make_batch(make_model(), ([clip], QUESTION, ANSWER))


def test_a_batch_moves_to_a_device_whole(
    make_model: Model, make_clip: Clip, make_batch: Batches
) -> None:
    batch = to_device(
        make_batch(make_model(), ([make_clip()], QUESTION, ANSWER)), torch.device("meta")
    )
    assert batch.input_ids.device.type == batch.groups[1].time.device.type == "meta"
    assert batch.transitions[0].copy.device.type == "meta"
    assert batch.record_ids == ("record-0",)
