"""The whole model: banked features and text -> LLM -> language loss and frame-causal loss.

    model = VLM.assemble(config, llm, tokenizer, width=1152, features=..., tower="google/siglip-...")
    losses = model(batch)                 # sums and counts; the caller divides by global counts
    model.save("runs/a"); VLM.load("runs/a")

A saved model is one folder: `llm/` (Hugging Face form, with the tokenizer), `projector.safetensors`,
`visual.safetensors`, `lape/`, `frame_causal.safetensors`, `config.json`.
"""

import copy
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.batch import Batch, FrameGroup
from model.config import FORMAT, POOLED, VLMConfig, read_model_config
from model.family import deepstack
from model.family.head import decoder_of, own_head, seen_embeddings, seen_head
from model.family.limits import load_tokenizer
from model.family.masks import batch_masks, step_masks
from model.family.mrope import MRope, install
from model.family.windows import reaches, takes_positions, text_config
from model.frame_causal import FrameCausal
from model.grid import pool
from model.lape.head import LanguageHead
from model.lape.tables import Lape
from model.lape.tokens import AXES, LAPE_AXES, LapeTokens
from model.llm import (
    LlmBase,
    load_llm,
    load_weights,
    read_base,
    read_json,
    save_llm,
    save_weights,
    write_json,
)
from model.projector import ChannelNorm, build_projector
from shards.errors import UserError

Json = dict[str, Any]


class VLM(nn.Module):
    """LLM, projector, frame tokens and, where the config has them, LAPE and the frame-causal head."""

    llm: Any
    """A transformers causal LM, or a PEFT model around one."""

    def __init__(
        self,
        config: VLMConfig,
        llm: Any,
        tokenizer: Any,
        *,
        width: int,
        features: Json,
        tower: str,
    ) -> None:
        super().__init__()
        llm_width = llm.get_input_embeddings().embedding_dim
        self.calibrated = True
        """Whether LAPE's gamma and the projector's norm are set; those of a fresh model are set from
        the run's first records with media."""
        self.base: LlmBase | None = None
        """What checkpoints hold in place of the LLM's weights, when these are not trained."""
        self.masked = True
        """Whether the LLM's layers take our masks; if not, only plain causal rows are correct."""
        self.config = config
        self.tokenizer = tokenizer
        self.tower_width = width
        self.features = features
        self.tower = tower
        self.llm = llm
        # what FSDP2 shards as one unit: the decoder layers
        self._no_split_modules = list(llm._no_split_modules or ())
        # with DeepStack only the last layer's channels go through the projector
        self.projector = build_projector(
            config.mm_projector_type, width // (config.deepstack + 1), llm_width
        )
        self.visual = VisualTokens(llm_width)
        if config.frame_marks == "none":
            self.visual.requires_grad_(False)  # no token takes these vectors
        if config.frame_positions == "mrope":
            sections = [int(n) for n in config.mrope_sections.split(",") if n]
            install(decoder_of(llm), sections, interleaved=config.mrope_interleaved)
        if config.deepstack:
            deepstack.install(decoder_of(llm), config.deepstack)
        self.frame_causal = (
            FrameCausal(llm_width, width, config.predictor) if config.loss_weight > 0 else None
        )
        self.llm_tokenizer = copy.deepcopy(tokenizer)
        """The LLM's own, without the coordinate tokens, for which the LLM has no rows: this is saved."""
        self.lape: Lape | None = None
        if config.enable_lape:
            tokens = LapeTokens.add_to(
                tokenizer,
                config.num_temporal_tokens,
                config.num_spatial_tokens,
                LAPE_AXES[config.lape_axes],
            )
            self.lape = Lape(llm_width, tokens, config.lape_preset, config.lape_sigma)

    @classmethod
    def assemble(cls, config: VLMConfig, llm: Any, tokenizer: Any, **facts: Any) -> "VLM":
        """Return a model with new projector, frame tokens, LAPE tables and frame head over an LLM."""
        model = cls(config, llm, tokenizer, **facts)
        model.calibrated = False
        embeddings = seen_embeddings(llm)
        with torch.no_grad():
            model.visual.initialise(embeddings)
            if model.lape is not None:
                model.lape.initialise(embeddings, seen_head(llm))
        return model

    def embed(self, batch: Batch) -> Tensor:
        """Return input embeddings: text rows, coordinates, projected frames; `(rows, length, width)`."""
        table = self.llm.get_input_embeddings()
        # ids of coordinate tokens may be beyond the table's rows; their embeddings are overwritten
        ids = batch.input_ids.where(batch.axis < 0, 0)
        embeds = table(ids).flatten(0, 1)  # rows * length, width
        if self.lape is not None:
            flat_axis, coord = batch.axis.flatten(), batch.coord.flatten()
            for axis in range(len(AXES)):
                index = torch.nonzero(flat_axis == axis).flatten()
                vectors = self.lape.embed(axis, coord[index])
                embeds = embeds.index_copy(0, index, vectors.to(embeds.dtype))
        for group in batch.groups:
            tokens = self.frame_tokens(group).flatten(0, 2).to(embeds.dtype)
            embeds = embeds.index_copy(0, group.token_index.flatten(), tokens)
            embeds = self._closed(embeds, group.end_index)
        if batch.newline_index is not None:
            embeds = self._closed(embeds, batch.newline_index)
        return embeds.view(*batch.input_ids.shape, -1)

    def _closed(self, embeds: Tensor, places: Tensor) -> Tensor:
        """Return embeddings with the closing vector at some flat places."""
        closing = self.visual.frame_end.expand(len(places), -1).to(embeds.dtype)
        return embeds.index_copy(0, places, closing)

    def projected(self, group: FrameGroup) -> Tensor:
        """Return the projector's tokens, one per cell: `(frames, cell_rows, cell_cols, width)`."""
        cells = group.projected.to(self.visual.frame_end.dtype)
        if self.config.deepstack:
            cells = cells.chunk(self.config.deepstack + 1, dim=-1)[-1]
        tokens: Tensor = self.projector(cells)
        if self.config.pool_after_projector:
            tokens = pool(tokens, POOLED, "bilinear").to(tokens.dtype)
        return tokens

    def frame_tokens(self, group: FrameGroup) -> Tensor:
        """Return projector(features) + stream + positions: `(frames, cell_rows, cell_cols, width)`."""
        tokens = self.projected(group)
        if self.config.frame_marks == "frames":
            tokens = tokens + self.visual.stream[group.stream]
        if self.lape is not None and self.config.lape_positions:
            tokens = tokens + self.lape.positions(
                group.grid, group.covered, group.time, group.timed
            )
        return tokens

    def added(self, batch: Batch) -> deepstack.Added | None:
        """Return DeepStack's features for the LLM's first layers; None without DeepStack or frames."""
        return deepstack.added(batch.groups, self.config.deepstack)

    def attention_mask(self, batch: Batch) -> Any:
        """Return the batch's mask in the form that the LLM's attention implementation reads."""
        layers = reaches(text_config(self.llm)) if self.masked else None
        if layers is None:
            assert batch.causal, "these layers take no masks: see model.family.conformance"
            return None
        implementation = self.llm.config._attn_implementation
        return batch_masks(layers, batch, implementation, self.visual.frame_end.dtype)

    def step_mask(self, seen: Tensor, keys: Tensor, query: Tensor, dtype: torch.dtype) -> Any:
        """Return the mask of one new token of each row, see `model.family.masks.step_masks`."""
        layers = reaches(text_config(self.llm))
        assert layers is not None
        implementation = self.llm.config._attn_implementation
        return step_masks(layers, seen, keys, query, implementation, dtype)

    def hidden_states(self, batch: Batch) -> Tensor:
        """Return the LLM's last hidden states after its final norm: `(rows * length, width)`."""
        mask = self.attention_mask(batch)
        positions = batch.position_ids, batch.rope
        return self.decode(self.embed(batch), mask, *positions, self.added(batch)).flatten(0, 1)

    def turning_by(self, rope: Tensor | None) -> AbstractContextManager[None]:
        """Return a context whose forward uses these M-RoPE positions: int64 `(3, rows, length)`."""
        if rope is None:
            return nullcontext()
        rotary = decoder_of(self.llm).rotary_emb
        assert isinstance(rotary, MRope)
        return rotary.at(rope)

    def decode(
        self,
        embeds: Tensor,
        mask: Any,
        positions: Tensor,
        rope: Tensor | None = None,
        added: deepstack.Added | None = None,
    ) -> Tensor:
        """Return the last hidden states of embedded rows, without a cache: `(rows, length, width)`."""
        decoder = decoder_of(self.llm)
        # recurrent decoders such as Mamba's take no positions
        known: dict[str, Any] = {"position_ids": positions} if takes_positions(decoder) else {}
        if self.llm.config._attn_implementation == "flex_attention":
            # its kernel for rows under 128 tokens, meant for decoding, has no form for grouped heads
            known["kernel_options"] = {"FORCE_USE_FLEX_ATTENTION": True}
        if added is not None:
            known["deepstack"] = added
        with self.turning_by(rope):
            states: Tensor = decoder(
                inputs_embeds=embeds, attention_mask=mask, use_cache=False, **known
            ).last_hidden_state
        return states

    @property
    def head(self) -> LanguageHead:
        """The LLM's head, with LAPE's anchors if LAPE is on."""
        return LanguageHead(own_head(self.llm), self.lape)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return fp32 logits `(n, rows of the head)`, followed by LAPE's anchors when it is on."""
        return self.head.logits(hidden)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the loss sums of a batch and their counts, for division by global counts.

        ce, coordinate_ce: sums over supervised tokens; token_ce: of each, without gradient. ar, the
        frame-causal loss (autoregressive over frames), and ar_copy, its baseline: `(4,)` sums over
        transitions by pair of streams; ar_count, ar_copy_count: how many.
        A batch without frames or supervised tokens still reaches every parameter, so that no rank
        waits for a gradient.
        """
        # The head runs on supervised rows only: with 48 of 1,536 tokens supervised and 50,000 columns
        # forward and backward took 0.46 s in place of 6.1 s, with the same gradients to the bit.
        hidden = self.hidden_states(batch)
        out = self.head.loss(
            hidden[batch.predict_index], batch.labels, batch.label_axis, batch.label_coord
        )
        if self.frame_causal is not None:
            frame = self.frame_causal(hidden, batch)
            out |= {"ar": frame.loss, "ar_copy": frame.copy}
            out |= {"ar_count": frame.count, "ar_copy_count": frame.copy_count}
        out["ce"] = out["ce"] + self._zero()
        return out

    def _zero(self) -> Tensor:
        """Return a zero that reaches every parameter outside the LLM: ranks wait for all gradients."""
        modules = [module for name, module in self.named_children() if name != "llm"]
        return torch.stack([p.sum() for m in modules for p in m.parameters()]).sum() * 0.0

    @torch.no_grad()
    def calibrate(self, batch: Batch) -> float:
        """Measure the projector's norm, if it has one, and set LAPE's gamma for a fresh model.

        gamma = `lape_share` / ratio, where ratio = RMS(positions at gamma 1) / RMS(projected features).
        Returns the ratio, NaN if not measured. Called once, with the same records on every rank.
        """
        if self.calibrated or not batch.groups:
            return float("nan")
        self.calibrated = True
        for norm in self.unmeasured():
            norm.measure([group.projected for group in batch.groups])
        if self.lape is None or not self.config.lape_positions:
            return float("nan")
        inside = positions = 0.0
        for group in batch.groups:
            tokens = self.projected(group)
            placed = self.lape.positions(group.grid, group.covered, group.time, group.timed)
            inside += tokens.float().square().mean(dim=-1).sum().item()
            positions += placed.square().mean(dim=-1).sum().item()
        ratio = (positions / inside) ** 0.5
        if self.lape.preset == "plus":
            self.lape.gamma.fill_(self.config.lape_share / ratio)
        return ratio

    def unmeasured(self) -> list[ChannelNorm]:
        """Return the projector's norms that have not been measured."""
        norms = (m for m in self.projector.modules() if isinstance(m, ChannelNorm))
        return [norm for norm in norms if not norm.measured]

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Return the trainable parameters by part, each in exactly one."""
        groups: dict[str, list[nn.Parameter]] = {
            name: [p for p in module.parameters() if p.requires_grad]
            for name, module in self.named_children()
        }
        found = [id(p) for group in groups.values() for p in group]
        everything = [id(p) for p in self.parameters() if p.requires_grad]
        assert sorted(found) == sorted(everything), "a parameter is in no group or in two"
        return {name: group for name, group in groups.items() if group}

    def vectors(self) -> list[nn.Parameter]:
        """Return vectors, and tables whose rows are looked up one by one: they take no weight decay."""
        tables: list[nn.Parameter] = list(self.visual.parameters())
        tables += self.lape.parameters() if self.lape is not None else []
        if self.frame_causal is not None:
            tables += self.frame_causal.stream.parameters()
        return tables + [p for p in self.parameters() if p.ndim < 2]

    def modules_on_disk(self) -> list[tuple[str, nn.Module]]:
        """Return (file, module) of each part of this model beside the LLM."""
        parts = (
            ("projector.safetensors", self.projector),
            ("visual.safetensors", self.visual),
            ("lape/tables.safetensors", self.lape),
            ("frame_causal.safetensors", self.frame_causal),
        )
        return [(file, module) for file, module in parts if module is not None]

    def save(self, folder: str | Path, *, whole: bool = True) -> None:
        """Write the model folder; unless `whole`, an LLM that is not trained is only referred to."""
        folder = Path(folder)
        save_llm(self.llm, folder / "llm", None if whole else self.base)
        for file, module in self.modules_on_disk():
            save_weights(module.state_dict(), folder / file)
        self.save_facts(folder)

    def save_facts(self, folder: Path) -> None:
        """Write what a model folder holds beside weights: tokenizer, coordinate tokens, settings."""
        self.llm_tokenizer.chat_template = self.tokenizer.chat_template
        self.llm_tokenizer.save_pretrained(folder / "llm")
        if self.lape is not None:
            write_json(folder / "lape" / "tokens.json", self.lape.tokens.to_json())
        facts = {"format": FORMAT, "model": asdict(self.config), "tower_width": self.tower_width}
        facts |= {"tower": self.tower, "features": self.features}
        write_json(folder / "config.json", facts)

    @classmethod
    def load(
        cls, folder: str | Path, dtype: torch.dtype = torch.float32, base: LlmBase | None = None
    ) -> "VLM":
        """Load a saved model; UserError names each part that is missing or does not fit.

        base: the present place of the LLM that a checkpoint only names, see `load_llm`.
        """
        folder = Path(folder)
        facts = read_model_config(folder)
        llm = load_llm(folder / "llm", dtype, base)
        model = cls(
            facts["model"],
            llm,
            load_tokenizer(folder / "llm", llm.get_input_embeddings().num_embeddings),
            width=facts["tower_width"],
            features=facts["features"],
            tower=facts["tower"],
        )
        model.base = base or read_base(folder / "llm")
        if model.lape is not None:
            model.lape.tokens.check(read_json(folder / "lape" / "tokens.json"), folder / "lape")
        for file, module in model.modules_on_disk():
            load_weights(module, folder / file)
        return model

    def adopt(self, folder: Path) -> list[str]:
        """Load a saved model's parts beside its LLM; return a line for each. One it lacks stays new."""
        saved = read_model_config(folder)["model"]
        lines = []
        for file, module in self.modules_on_disk():
            if not (folder / file).exists():
                lines.append(f"{file}: new, {folder} has none")
                continue
            if module is self.lape and saved.lape_preset != self.config.lape_preset:
                raise UserError(
                    f"{folder}: LAPE preset {saved.lape_preset}, asked {self.config.lape_preset}"
                )
            load_weights(module, folder / file)
            if module is self.lape:
                # a trained gamma is kept; one that still is 1 was never set: its run had no media
                self.calibrated = module.preset == "st" or bool((module.gamma != 1).any())
                self.calibrated &= not self.unmeasured()
            lines.append(f"{file}: from {folder}")
        return lines


class VisualTokens(nn.Module):
    """Learned vectors that mark frames in the LLM's input: one that closes each, one per stream."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.frame_end = nn.Parameter(torch.zeros(width))
        self.stream = nn.Parameter(torch.zeros(2, width))

    def initialise(self, embeddings: Tensor) -> None:
        """Draw the vectors, seeded, at the scale of the LLM's own input rows `(rows, width)`."""
        rows = embeddings.detach().float()
        mean = rows.mean(dim=0)
        spread = (rows - mean).square().mean().sqrt()
        generator = torch.Generator().manual_seed(0)
        self.frame_end.copy_(mean + spread * torch.randn(len(mean), generator=generator))
        # added to every token of a frame, so smaller than the closing vector, which is a whole token
        self.stream.copy_(0.1 * spread * torch.randn(2, len(mean), generator=generator))
