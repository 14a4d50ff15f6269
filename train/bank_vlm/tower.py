"""Put a bank in the place of a model's vision tower.

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint)
    plain = AutoProcessor.from_pretrained(checkpoint)
    processor = bank_processor(plain, "bank", model_config=model.config)
    use_bank(model, "bank")

From then on `pixel_values_videos` (and `pixel_values` of Qwen's images) are banked features, which
`bank_processor` makes: fields that every collator, device move and wrapper passes on. The tower's
weights are in a temporary file until the model is saved, which makes an ordinary, whole checkpoint.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from model.family.qwen_vl import deepstack_of
from model.llm import tower_digest
from shards import Bank
from shards.errors import UserError
from train.bank_vlm.kinds import Kind, bank_problem, find_kind
from train.bank_vlm.pairs import join

Model = TypeVar("Model", bound=nn.Module)


def use_bank(model: Model, bank: "str | Path | Bank") -> Model:
    """Free the tower of a video model of transformers; return the model, which now reads features.

    UserError where the bank does not hold what this very tower gives: another layer, other weights.
    """
    opened = bank if isinstance(bank, Bank) else Bank.open(bank)
    config: Any = model.config
    kind = find_kind(config.model_type)
    inner: Any = getattr(model, "model", None)
    tower = getattr(inner, kind.tower, None)
    if tower is None:
        raise UserError(
            "has no tower where its class has one",
            where=type(model).__name__,
            fix="call use_bank on the model itself, before PEFT or DDP wraps it",
        )
    # a second time its weights would be taken for those of the tower
    if isinstance(tower, BankedTower):
        raise UserError("its tower was taken out before", where=type(model).__name__)
    if problem := bank_problem(kind, config.to_dict(), opened.config):
        raise UserError(problem, where=opened.where)
    # in fp32, as encode digests them: a model in bfloat16 has the digest of its rounded weights
    weights = {name: value.float() for name, value in tower.state_dict().items()}
    digest = tower_digest(tower.config.to_dict(), weights)
    if digest != opened.config.tower_digest:
        raise UserError(
            "made by a tower of other weights than the model's",
            got=opened.config.tower_digest[:12],
            expected=digest[:12],
            where=opened.where,
            fix=f"save the model's with model.model.{kind.tower}.save_pretrained(FOLDER), add its "
            "preprocessor_config.json, and encode with --tower FOLDER; a model that was loaded in "
            "another type than its checkpoint's has other weights, too",
        )
    banked = BankedTower(kind, tower, config)
    join(banked, config, opened)
    # -- the tower's memory is free from here on
    setattr(inner, kind.tower, banked)
    return model


class BankedTower(nn.Module):
    """Gives the features that it is given. Saved, it is the tower that it stands for."""

    def __init__(self, kind: Kind, tower: Any, config: Any) -> None:
        super().__init__()
        self.kind, self.config = kind, tower.config
        self.weights = _Weights(tower.state_dict())
        # of the model's type and on its device, as the tower was; not saved
        self.register_buffer("like", torch.empty(0, dtype=tower.dtype), persistent=False)
        self.like: Tensor
        self.train(tower.training)
        if kind.is_merged:
            # the model reads this off its tower, to divide features between media
            self.spatial_merge_size = tower.spatial_merge_size
            self.layers = len(deepstack_of(config.to_dict())) + 1
        else:
            # "default": the model drops the tower's first token, which for CLIP is the class token
            self.has_cls = config.vision_feature_select_strategy == "default"
            side = tower.config.image_size // tower.config.patch_size
            self.features = (side, side, tower.config.hidden_size)

    @property
    def dtype(self) -> torch.dtype:
        return self.like.dtype

    @property
    def device(self) -> torch.device:
        return self.like.device

    def forward(
        self, features: Tensor, grid_thw: Tensor | None = None, **_: Any
    ) -> BaseModelOutputWithPooling:
        """Return features as the tower's outputs hold them.

        features: of a merging tower `(tokens, layers width)` of all media, grid_thw: their patches,
        `(media, 3)`; of another `(frames, rows, cols, width)`.
        """
        given = tuple(features.shape)
        # as the tower's last layer would give them, whatever type the bank has
        features = features.to(self.like)
        if self.kind.is_merged:
            assert grid_thw is not None
            tokens = int(grid_thw.prod(dim=1).sum()) // self.spatial_merge_size**2
            if given[0] != tokens:
                raise _not_features(given, f"{tokens} tokens of their grids")
            # the bank's layer `merged` holds DeepStack's layers first, the merged tokens last
            *earlier, merged = features.chunk(self.layers, dim=-1)
            out = BaseModelOutputWithPooling(last_hidden_state=merged, pooler_output=merged)
            if earlier:
                out["deepstack_features"] = earlier
            return out
        if given[1:] != self.features:
            raise _not_features(given, f"(frames, {', '.join(map(str, self.features))})")
        cells = features.flatten(1, 2)
        if self.has_cls:  # which the model leaves out
            cells = torch.cat([torch.zeros_like(cells[:, :1]), cells], dim=1)
        layers = self.config.num_hidden_layers + 1
        # the model picks a layer by its number in its config: any gives the banked one
        return BaseModelOutputWithPooling(last_hidden_state=cells, hidden_states=(cells,) * layers)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        # asked for by save_pretrained and by state_dict: a checkpoint is whole,
        # though memory holds no tower
        destination.update({prefix + name: value for name, value in self.weights.read().items()})

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Take nothing: the tower was frozen, and its weights stay in their file."""


class _Weights:
    """Tensors in a temporary file that lives as long as this object or one of its copies does."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="framebank-tower-")
        self.path = Path(self.folder.name) / "tower.safetensors"
        # safetensors refuses tensors that are views into others
        save_file({name: value.contiguous() for name, value in tensors.items()}, self.path)

    def read(self) -> dict[str, Tensor]:
        with safe_open(self.path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def __deepcopy__(self, _: Any) -> "_Weights":
        # weights do not change: a copied model (an average, a reference) shares the file
        return self


def _not_features(got: tuple[int, ...], expected: str) -> UserError:
    return UserError(
        "the model's tower was taken out, and this is not what its bank holds",
        got=f"values of shape {got}",
        expected=expected,
        fix="make inputs with bank_processor; pictures of LLaVA, which are cut into crops, no bank holds",
    )
