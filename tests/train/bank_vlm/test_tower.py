"""A video model of transformers whose tower is a bank computes, learns and is saved as it was.

The reference is the unchanged model, whose tower is made to give the same bank-rounded features.
"""

import copy
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from shards import Bank
from shards.errors import UserError
from tests.params import few
from tests.train.bank_vlm.worlds import (
    FIRST,
    IMAGE,
    LAST,
    MAKE,
    VIDEO,
    World,
    Worlds,
    make_videos,
    of_another_tower,
)
from train.bank_vlm.kinds import find_kind
from train.bank_vlm.pairs import join
from train.bank_vlm.source import Source
from train.bank_vlm.tower import use_bank


@pytest.fixture(scope="module")
def worlds(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Worlds:
    root = tmp_path_factory.mktemp("bank-vlm")
    make_videos(root)
    return Worlds(root, toy / "llm")


@contextmanager
def giving(model: Any, world: World, names: list[str]) -> Iterator[None]:
    """Let the tower of an unchanged model give the bank's features of some clips, call by call."""
    merged = world.kind.startswith("qwen")
    tower = model.model.visual if merged else model.model.vision_tower
    calls = iter(names)

    def hook(module: Any, args: Any, output: Any) -> Any:
        features = [world.features(name) for name in next(calls).split("+")]
        if merged:
            *earlier, last = torch.cat([part.flatten(0, 2) for part in features]).split(32, dim=-1)
            output.pooler_output = last
            if earlier:
                output.deepstack_features = earlier
            return output
        cells = torch.cat(features).flatten(1, 2)
        if world.kind == "llava_next_video":  # 99: of a token that the model has to leave out
            cells = torch.cat([torch.full_like(cells[:, :1], 99.0), cells], dim=1)
        output.hidden_states = (cells,) * 4
        return output

    handle = tower.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
    assert next(calls, None) is None, "the tower was not asked as often as it should"


def rows(world: World, pixels: bool) -> tuple[dict[str, Tensor], list[str]]:
    """Return a batch of text, a picture where the model's are banked, and two videos.

    pixels: for an unchanged model, whose tower wants some. The names are those of the clips that the
    tower is asked for, call by call.
    """
    merged = world.kind.startswith("qwen")
    torch.manual_seed(1)
    clips = {name: world.features(name) for name in ("a", "b", "still")}
    tokens = {name: part[..., 0].numel() for name, part in clips.items()}
    if world.kind == "llava_onevision":
        tokens = {name: len(part) * 9 + 1 for name, part in clips.items()}
    elif world.kind == "llava_next_video":
        tokens = {name: len(part) * 9 for name, part in clips.items()}
    media = [[], [("a", VIDEO)], [("b", VIDEO)]]
    if merged:
        media.append([("still", IMAGE), ("a", VIDEO)])
    lines = []
    for own in media:
        ids = torch.randint(0, 400, (5,)).tolist()
        for name, token in own:
            # Qwen3-VL has tags around each frame
            parts = len(clips[name]) if world.kind == "qwen3_vl" else 1
            one = [token] * (tokens[name] // parts)
            ids += [FIRST, *one, LAST] * parts if merged else one
        lines.append(ids + torch.randint(0, 400, (7,)).tolist())
    longest = max(map(len, lines))
    ids = torch.tensor([[0] * (longest - len(line)) + line for line in lines])
    mask = torch.tensor([[0] * (longest - len(line)) + [1] * len(line) for line in lines])
    labels = ids.masked_fill((mask == 0) | (ids >= LAST), -100)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    videos = [name for own in media for name, token in own if token == VIDEO]
    if merged:
        for field, names in (("", ["still"]), ("_videos", videos)):
            parts = [clips[name] for name in names]
            grid = [[len(p), 2 * p.shape[1], 2 * p.shape[2]] for p in parts]
            batch[f"{'video' if field else 'image'}_grid_thw"] = torch.tensor(grid)
            given = torch.cat([p.flatten(0, 2) for p in parts])
            patches = torch.zeros(4 * len(given), 3 * 2 * 4 * 4)
            batch[f"pixel_values{field}"] = patches if pixels else given
        kinds = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
        batch["mm_token_type_ids"] = kinds
        if world.kind == "qwen2_5_vl":
            batch["second_per_grid_ts"] = torch.tensor([0.5, 1.0, 0.5])
        return batch, ["still", "+".join(videos)]
    given = torch.stack([clips[name] for name in videos])
    shape = (*given.shape[:2], 3, 24, 24)
    batch["pixel_values_videos"] = torch.zeros(shape) if pixels else given
    return batch, ["+".join(videos)]


def step(model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return logits, loss and the gradients of all that is not the tower."""
    model.zero_grad()
    out = model(**batch)
    out.loss.backward()
    tower = ("visual.", "vision_tower.")
    grads = {
        name: weight.grad.clone()
        for name, weight in model.named_parameters()
        if weight.grad is not None and not name.removeprefix("model.").startswith(tower)
    }
    return out.logits.detach(), out.loss.detach(), grads


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", few(MAKE, 2))
def test_it_computes_learns_and_is_saved_as_the_unchanged_model(
    worlds: Worlds, kind: str, checkpointing: bool, tmp_path: Path
) -> None:
    world = worlds(kind)
    theirs, ours = world.model(), use_bank(world.model(), world.bank)
    assert sum(p.numel() for p in ours.parameters()) < sum(p.numel() for p in theirs.parameters())
    if checkpointing:
        for model in (theirs, ours):
            model.train()
            model.gradient_checkpointing_enable()
    (plain, calls), (banked, _) = rows(world, True), rows(world, False)
    for _ in range(3):
        with giving(theirs, world, calls):
            expected = step(theirs, plain)
        found = step(ours, banked)
        for one, other in zip(found[:2], expected[:2], strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
        assert found[2].keys() == expected[2].keys()
        for name, grad in expected[2].items():
            torch.testing.assert_close(found[2][name], grad, atol=1e-5, rtol=1e-5)
        for model in (theirs, ours):
            for weight in model.parameters():
                if weight.grad is not None:
                    weight.data -= 0.05 * weight.grad
    ours.save_pretrained(tmp_path / "saved")
    again, report = type(theirs).from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    fresh = world.model().state_dict()
    for name, value in again.state_dict().items():
        is_tower = ".visual." in name or ".vision_tower." in name
        expected_value = fresh[name] if is_tower else ours.state_dict()[name]
        assert torch.equal(value, expected_value), name
    with giving(again, world, calls):
        torch.testing.assert_close(again.eval()(**plain).logits, ours.eval()(**banked).logits)


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl", "llava_onevision"])
def test_a_checkpoint_of_its_training_is_taken_up_again(worlds: Worlds, kind: str) -> None:
    world = worlds(kind)
    ours = use_bank(world.model(), world.bank)
    moved = {n: v + 1 if v.is_floating_point() else v for n, v in ours.state_dict().items()}
    ours.load_state_dict(moved)
    state, fresh = ours.state_dict(), world.model().state_dict()
    assert state.keys() == fresh.keys()
    for name, value in state.items():
        is_tower = ".visual." in name or ".vision_tower." in name
        assert torch.equal(value, fresh[name] if is_tower else moved[name]), name
    assert torch.equal(
        next(iter(copy.deepcopy(ours).state_dict().values())), next(iter(state.values()))
    )


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_an_answer_is_generated_as_by_the_unchanged_model(worlds: Worlds, kind: str) -> None:
    world = worlds(kind)
    theirs, ours = world.model(), use_bank(world.model(), world.bank)
    (plain, calls), (banked, _) = rows(world, True), rows(world, False)
    for batch in (plain, banked):
        del batch["labels"]
    with giving(theirs, world, calls):
        expected = theirs.generate(**plain, max_new_tokens=6, do_sample=False)
    assert torch.equal(ours.generate(**banked, max_new_tokens=6, do_sample=False), expected)


def test_what_a_bank_does_not_hold_is_refused(worlds: Worlds) -> None:
    world, other = worlds("qwen2_5_vl"), worlds("llava_onevision")
    with pytest.raises(UserError, match="layer -1 of a tower, and the model takes merged tokens"):
        use_bank(world.model(), other.bank)
    with pytest.raises(
        UserError, match="it reads layer -1 of its tower, and the bank holds layer merged"
    ):
        use_bank(other.model(), world.bank)
    moved = world.model()
    next(moved.model.visual.parameters()).data += 1e-3
    with pytest.raises(UserError, match="of other weights than the model's"):
        use_bank(moved, world.bank)
    ours = use_bank(world.model(), world.bank)
    with pytest.raises(UserError, match="taken out before"):
        use_bank(ours, world.bank)
    wrapped = get_peft_model(world.model(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UserError, match="before PEFT or DDP wraps it"):
        use_bank(wrapped, world.bank)
    pixels, _ = rows(world, True)
    with pytest.raises(UserError, match="this is not what its bank holds"):
        ours(**pixels)
    pixels, _ = rows(other, True)
    with pytest.raises(UserError, match=r"not what its bank holds.*no bank holds"):
        use_bank(other.model(), other.bank)(**pixels)


@pytest.mark.parametrize("first", ["processor", "model"])
def test_a_processor_of_another_towers_bank_is_refused_whichever_comes_first(
    worlds: Worlds, tmp_path: Path, first: str
) -> None:
    world = worlds("qwen2_vl")
    other = of_another_tower(world.bank, tmp_path / "other")
    model, kind = world.model(), find_kind("qwen2_vl")

    def read(bank: Path) -> Source:
        """Return what a processor reads a bank through, joined as bank_processor does."""
        source = Source(Bank.open(bank), kind, Path(), "refuse", "")
        join(source, model.config, source.bank)
        return source

    twin = shutil.copytree(world.bank, tmp_path / "twin")  # other videos, perhaps
    if first == "processor":
        kept = [read(world.bank), read(other)]
        with pytest.raises(UserError, match="banks of different towers") as refusal:
            use_bank(model, twin)
        assert str(other) in str(refusal.value)
        del kept[1]
        use_bank(model, twin)
        return
    use_bank(model, world.bank)
    with pytest.raises(UserError, match="banks of different towers"):
        read(other)
    assert read(twin)
    assert use_bank(world.model(), world.bank), "another model of the same checkpoint"


def test_other_models_are_refused_by_name(worlds: Worlds) -> None:
    config = Qwen2Config(hidden_size=32, intermediate_size=8, num_hidden_layers=1, vocab_size=8)
    with pytest.raises(UserError, match="cannot stand in for the tower of qwen2"):
        use_bank(Qwen2ForCausalLM(config), worlds("qwen2_vl").bank)
    with pytest.raises(UserError, match="of qwen3_vl_moe: its experts"):
        find_kind("qwen3_vl_moe")
