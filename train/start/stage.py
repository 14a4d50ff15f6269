"""The stage that a run starts from (`stage_path`), and the parts that are taken of it.

    a causal LLM                  a folder or Hub name that AutoModelForCausalLM loads
    a framebank run               its LLM and every part that this run has too
    a VILA / NVILA stage          folders llm/, mm_projector/, vision_tower/
    a LLaVA checkpoint            of transformers (LLaVA-OneVision, LLaVA-NeXT, -Video), or of LLaVA
                                  itself (`llava_qwen`): the LLM, the projector, LLaVA-ST's tables
    a Qwen2-VL, Qwen2.5-VL, Qwen3-VL checkpoint    the LLM; its tower's merged tokens are banked

Weights are read from safetensors only: a pickle can run code. Each part that is loaded, new or ignored
is reported in a line; a tensor of another shape is refused by name.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from model.config import ModelSettings, joined_cells
from model.family import qwen_vl
from model.family.limits import context_length
from shards.errors import UserError
from shards.format.features import FeatureConfig, differences
from shards.read.banks import joint
from train.settings.config import LlmSettings, TrainConfig
from train.start.pooled import deepstack_problem, tokens_problem
from train.start.stage_parts import load_parts, load_qwen
from train.start.templates import load_with_template

if TYPE_CHECKING:
    from model.llm import LlmBase
    from model.vlm import VLM, VLMConfig
    from train.data.dataset import Dataset

Settings = TypeVar("Settings", bound=ModelSettings)
AUTOMATIC = ("frame_positions", "frame_time", "media_tags")
"""Settings whose value `auto` means: as the stage was trained."""
Json = dict[str, Any]
Say = Callable[[str], None]


def kind_of(name: str) -> str:
    """Return the kind of a stage: run, vila, llava, qwen_vl or llm."""
    # -- by what only this kind has: a run's folder has a config.json as well
    if (Path(name) / "projector.safetensors").exists():
        return "run"
    config = read_config(name) or {}
    if "llm_cfg" in config or (Path(name) / "llm" / "config.json").exists():
        return "vila"
    if config.get("model_type") in qwen_vl.INNER:
        return "qwen_vl"
    return "llava" if str(config.get("model_type", "")).startswith("llava") else "llm"


def on_disk(name: str, *, weights: bool) -> Path:
    """Return the folder of a stage; one of the Hub is downloaded, with its weights if `weights`."""
    if Path(name).exists():
        return Path(name)
    from huggingface_hub import snapshot_download

    # never *.bin or *.pt: a pickle can run code when it is read
    patterns = ["*.json", "*.jinja", "*.txt", "*.model", *(["*.safetensors"] if weights else [])]
    return Path(snapshot_download(name, allow_patterns=patterns))


def llm_name(stage_path: str) -> str:
    """Return the place of the LLM's config and tokenizer: the stage's `llm/`, or the stage itself."""
    kind = kind_of(stage_path)
    if kind == "llm":
        return stage_path
    folder = on_disk(stage_path, weights=False)
    return str(folder if kind in ("llava", "qwen_vl") else folder / "llm")


def as_its_stage(settings: Settings) -> Settings:
    """Return settings with `auto` replaced by how the stage was trained: positions, times, tags."""
    automatic = [name for name in AUTOMATIC if getattr(settings, name) == "auto"]
    if not automatic:
        return settings
    found = {"frame_positions": "plain", "frame_time": "none", "media_tags": "none"}
    stage = settings.stage_path  # type: ignore[attr-defined]
    kind = kind_of(stage)
    if kind == "run":
        found |= (read_config(stage) or {}).get("model", {})
    # an LLM that was trained with M-RoPE misplaces frames without it
    elif qwen_vl.mrope_of(read_config(llm_name(stage)) or {}):
        found["frame_positions"] = "mrope"
        if kind == "qwen_vl" and has_tokens(stage, qwen_vl.MEDIA_TAGS.split(",")):
            found["media_tags"] = qwen_vl.MEDIA_TAGS
            if qwen_vl.writes_times(read_config(stage) or {}):
                found["frame_time"] = "seconds"
    values: Any = {name: found[name] for name in automatic}
    return replace(settings, **values)


def has_tokens(stage: str, tokens: Sequence[str]) -> bool:
    """Return whether a stage's tokenizer has some control tokens, by its files."""
    facts = [read_config(stage, file) or {} for file in ("tokenizer.json", "tokenizer_config.json")]
    added = [*facts[0].get("added_tokens", ()), *facts[1].get("added_tokens_decoder", {}).values()]
    return {token["content"] for token in added}.issuperset(tokens)


def bank_problem(settings: ModelSettings, dataset: "Dataset") -> str | None:
    """Return why these banks' features do not suit the projector and the stage; None if they do."""
    side = joined_cells(settings.mm_projector_type)
    strides = {dataset.slow_stride, dataset.fast_stride}
    features = dataset.banks.config.to_json()
    if problem := tokens_problem(settings, features, strides):
        return problem
    stage: str = settings.stage_path  # type: ignore[attr-defined]
    if problem := deepstack_problem(settings, deepstack_of(stage), features):
        return problem
    if side == 1:
        return None
    banked, pool = dataset.banks.strides, dataset.banks.config.pool
    name = f"mm_projector_type {settings.mm_projector_type}"
    if pool != "average":
        return (
            f"{name}: joins cells of the pool mode `average`, whose grids nest to the border; this "
            f"bank's is {pool}; use mlp2x_gelu, or encode with --pool average"
        )
    lacking = [s for s in sorted(strides) if s % side or s // side not in banked]
    if not lacking:
        return None
    if any(stride % side for stride in strides):
        fix = f"take an mm_spatial_pool_stride and fast_stride that are multiples of {side}"
    else:
        needed = sorted({*banked, *strides, *(stride // side for stride in strides)})
        fix = f"encode with --stride {','.join(map(str, needed))}"
    return (
        f"{name}: joins {side}x{side} cells into a token, so that tokens of stride {lacking[0]} take "
        f"cells of stride {lacking[0]}/{side}, and the bank holds the strides "
        f"{', '.join(map(str, banked))}; {fix}, or use mlp2x_gelu"
    )


def build(config: TrainConfig, dataset: "Dataset", say: Say) -> "VLM":
    """Return the new model of a run on these banks, with the parts that its stage has."""
    manifest = dataset.banks.manifest
    return assemble(
        config,
        config.seed,
        asdict(model_config(config, dataset)),
        manifest.tower_width,
        dataset.banks.config.to_json(),
        manifest.provenance.tower,
        say,
    )


def assemble(
    settings: LlmSettings,
    seed: int,
    facts: Json,
    width: int,
    features: Json,
    tower: str,
    say: Say,
) -> "VLM":
    """Return a model over the LLM of the stage path, with what fits of the stage's other parts.

    facts: the fields of `VLMConfig`. width, features, tower: of the banked features. say: called with a
    line for each part. Raises UserError where features or parts do not fit.
    """
    import torch

    from model.llm import load_llm
    from model.vlm import VLM, VLMConfig
    from train.start.prepare_llm import llm_dtype

    config = VLMConfig(**facts)
    if problem := tokens_problem(config, features, {config.slow_stride, config.fast_stride}):
        raise UserError(problem)
    if problem := deepstack_problem(config, deepstack_of(settings.stage_path), features):
        raise UserError(problem)
    # before the first new weight: projector, heads and adapters follow from the seed
    torch.manual_seed(seed)
    kind = kind_of(settings.stage_path)
    folder = (
        Path(settings.stage_path) if kind == "llm" else on_disk(settings.stage_path, weights=True)
    )
    llm_path = llm_name(settings.stage_path)
    llm = load_llm(llm_path, llm_dtype(settings))
    # a stage's adapter is trained on with lora, and becomes part of the weights otherwise
    if hasattr(llm, "peft_config") and settings.tune_llm != "lora":
        llm = llm.merge_and_unload()
    model = VLM.assemble(
        config,
        llm,
        load_with_template(
            llm_path, facts.get("chat_template", ""), llm.get_input_embeddings().num_embeddings
        ),
        width=width,
        features=features,
        tower=tower,
    )
    # so that a checkpoint of a frozen LLM names it and holds no copy
    model.base = llm_base(settings)
    lines = [f"LLM: {type(llm).__name__} from {llm_path}"]
    lines += frame_lines(config)
    if kind == "qwen_vl":
        lines += load_qwen(model, folder)
    elif kind == "run":
        refuse_other_tower(folder, model)
        lines += [*model.adopt(folder), *other_features(folder, model)]
    elif kind != "llm":
        lines += load_parts(model, kind, folder, read_config(str(folder)) or {})
    for line in lines:
        say(f"stage     {line}")
    return model


def frame_lines(config: "VLMConfig") -> list[str]:
    """Return a line for each special treatment of frames in the LLM: M-RoPE, DeepStack."""
    lines = []
    if config.frame_positions == "mrope":
        lines.append("positions: frames at their time, row and column (M-RoPE), text by its place")
    if config.deepstack:
        layers = f"{config.deepstack} layers of the tower"
        lines.append(f"DeepStack: {layers} are added at the LLM's first layers")
    return lines


def llm_base(settings: LlmSettings) -> "LlmBase | None":
    """Return the reference to an LLM that is not trained, which checkpoints hold in place of a copy."""
    from model.llm import base_of
    from train.start.prepare_llm import llm_dtype

    if settings.tune_llm == "full":
        return None
    path = llm_name(settings.stage_path)
    # a frozen LLM with its stage's adapter is neither the base nor the adapter:
    # the merged one is named so
    merged = settings.tune_llm == "frozen" and (Path(path) / "lora").exists()
    return base_of(path, llm_dtype(settings), merged=merged)


def model_config(settings: ModelSettings, dataset: "Dataset") -> Any:
    """Return the `VLMConfig` of a run: the settings that stay with its model."""
    from model.vlm import VLMConfig

    settings = as_its_stage(settings)
    facts = {field.name: getattr(settings, field.name) for field in fields(ModelSettings)}
    if settings.frame_positions == "mrope":
        stage = settings.stage_path  # type: ignore[attr-defined]
        mrope = qwen_vl.mrope_of(read_config(llm_name(stage)) or {})
        if mrope is None:
            raise UserError(
                "frame_positions mrope: its LLM was not trained with M-RoPE",
                where=stage,
                fix="set frame_positions: plain, or start from a Qwen-VL checkpoint",
            )
        facts["mrope_sections"] = ",".join(map(str, mrope.sections))
        facts["mrope_tokens_per_second"] = mrope.tokens_per_second
        facts["mrope_interleaved"] = mrope.interleaved
    if settings.mm_projector_type == "identity":
        facts["deepstack"] = len(deepstack_of(settings.stage_path))  # type: ignore[attr-defined]
    # resolved ones: 0 in the settings means those of this bank, and another bank has others
    facts |= {"slow_stride": dataset.slow_stride, "fast_stride": dataset.fast_stride}
    return VLMConfig(turns=dataset.turns, **facts)


def deepstack_of(stage_path: str) -> tuple[int, ...]:
    """Return the tower's layers whose features a stage's LLM adds at its first layers (DeepStack)."""
    return qwen_vl.deepstack_of(read_config(llm_name(stage_path)) or {})


def refuse_other_tower(folder: Path, model: "VLM") -> None:
    """Raise UserError where a run's projector does not fit the bank's features or the settings."""
    facts = read_config(str(folder)) or {}
    made, asked = facts["model"]["mm_projector_type"], model.config.mm_projector_type
    if made != asked:
        raise UserError(
            f"its projector is {made}, asked {asked}",
            where=folder,
            fix=f"set mm_projector_type: {made}, or start from its LLM alone: stage_path: {folder}/llm",
        )
    ours, theirs = model.features, facts["features"]
    # width alone would not tell: towers of one family share it
    differing = [name for name in ("tower_digest", "layer") if ours.get(name) != theirs.get(name)]
    if facts["tower_width"] != model.tower_width or differing:
        raise UserError(
            f"its projector takes features of width {facts['tower_width']} of layer "
            f"{theirs.get('layer')} of {facts['tower']}, the bank has width {model.tower_width} of "
            f"layer {ours.get('layer')} of {model.tower}"
            + (", another tower" if "tower_digest" in differing else ""),
            where=folder,
            fix="set bank to one that was made with its tower (preprocess encode --tower "
            f"{facts['tower']} --layer {theirs.get('layer')}), or start from its LLM alone: "
            f"stage_path: {folder}/llm",
        )


def other_features(folder: Path, model: "VLM") -> list[str]:
    """Return a line for each way in which the bank's features were made otherwise than a run's.

    The same tower on frames that were cropped otherwise, or pooled otherwise, gives features of the same
    shape: the run's parts fit, and have to learn them. Which strides are read is a setting of the run.
    """
    theirs = FeatureConfig.from_json((read_config(str(folder)) or {})["features"])
    ours = FeatureConfig.from_json(model.features)
    known = replace(theirs, strides=ours.strides)
    return [
        f"features: {line} ({folder}); its parts are tuned on others than the bank's"
        for line in differences(joint(ours), joint(known))
    ]


def read_config(name: str, file: str = "config.json") -> dict[str, Any] | None:
    """Return the config.json of a model folder or of a Hub model already on this machine, or None."""
    path: str | Path | object = Path(name) / file
    if not Path(name).is_dir():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            path = try_to_load_from_cache(name, file)
        except HFValidationError:  # a path, not a Hub name, and no such folder
            return None
    if not isinstance(path, str | Path) or not Path(path).is_file():
        return None
    return dict(json.loads(Path(path).read_text()))


def context_of(llm: str) -> int | None:
    """Return the most tokens of a row by an LLM's and its tokenizer's configs; None if they name none."""
    written = (read_config(llm) or {}, read_config(llm, "tokenizer_config.json") or {})
    return context_length(written[0], written[1].get("model_max_length"))
