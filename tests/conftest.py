"""What several test files share: a small toy world, its bank, and banks of given arrays."""

import copy
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from torch import Tensor
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    logging,
)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
)

from model.batch import Batch
from model.cpu.threads import cpu_threads
from model.grid import pool
from model.vlm import VLM, VLMConfig
from preprocess.encode.run import EncodeOptions, encode
from preprocess.real_models import make_real_models
from preprocess.toy_models import save_llm
from preprocess.toyworld import make_toyworld
from shards.errors import UserError
from shards.format.codec import Codec, channel_rms
from shards.format.commits import shard_path
from shards.format.features import FeatureConfig, Sampling
from shards.format.manifest import TowerFacts
from shards.format.plan import ClipSource, Plan
from shards.format.quarantine import QuarantineEntry, Reason, update_quarantine
from shards.format.samples import SampleMeta, sample_key
from shards.read.bank import ClipInfo
from shards.write.finish import finish
from shards.write.shard import ShardWriter
from train.ask import FreshClip
from train.batches.chat import Chat
from train.batches.collate import collate, lay_out
from train.data.records import Turn
from train.settings.config import TrainConfig

logging.disable_progress_bar()
# how long an example takes is this machine's and its load's affair
settings.register_profile("framebank", deadline=None)
settings.load_profile("framebank")


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy world of 6 training and 3 test clips. Read it only."""
    out = tmp_path_factory.mktemp("toy") / "world"
    make_toyworld(out, train_clips=6, test_clips=3)
    return out


@pytest.fixture(scope="session")
def toy_options(toy: Path) -> EncodeOptions:
    """How `toy_bank` was made."""
    return EncodeOptions(tower=str(toy / "tower"), strides=(4, 8), sampling=Sampling(num_frames=8))


@pytest.fixture(scope="session")
def toy_bank(
    toy: Path, toy_options: EncodeOptions, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The bank of all nine clips, 8 frames each, strides 4 and 8. Read it only."""
    out = tmp_path_factory.mktemp("toy-bank") / "bank"
    summary = encode([str(toy / "videos")], out, toy_options)
    assert (summary.clips, summary.failures) == (9, [])
    return out


@pytest.fixture(scope="session")
def features() -> FeatureConfig:
    """A feature config of no tower in particular."""
    return FeatureConfig(
        tower_type="siglip_vision_model",
        tower_digest="00" * 16,
        layer=-2,
        processor={"height": 64, "width": 64, "crop": None, "mean": [0.5, 0.5, 0.5]},
        dtype="float16",
        tower_dtype="float32",
        attention="sdpa",
        sampling=Sampling(num_frames=8),
        strides=(4, 8),
        pool="average",
    )


@pytest.fixture(scope="session")
def make_meta() -> Callable[..., SampleMeta]:
    """A function that describes a clip of 8 frames per second; any field can be given."""

    def make(id_: str, arrays: Mapping[int, np.ndarray], **fields: Any) -> SampleMeta:
        frames = len(next(iter(arrays.values())))
        values = {
            "id": id_,
            "path": id_,
            "size": 1000,
            "digest": "ab" * 16,
            "start": 0.0,
            "end": frames / 8,
            "fps": 8.0,
            "frame_count": frames,
            "frame_index": list(range(frames)),
            "timestamps": [k / 8 for k in range(frames)],
            "display_size": (48, 64),
            "covered": (0.0, 0.125, 1.0, 0.875),
            "patch_grid": (8, 6),
            "cell_grids": {str(s): array.shape[1:3] for s, array in arrays.items()},
            "tower_width": next(iter(arrays.values())).shape[-1],
            "frames_per_unit": 1,
            "decoder": "decord",
            "flags": [],
        }
        return SampleMeta(**{**values, **fields})

    return make


@pytest.fixture(scope="session")
def make_bank(features: FeatureConfig, make_meta: Callable[..., SampleMeta]) -> Callable[..., Path]:
    """A function that writes a bank of given arrays, one shard for each mapping of clips."""

    def make(
        out: Path,
        *shards: Mapping[str, Mapping[int, np.ndarray]],
        config: FeatureConfig = features,
        quarantined: tuple[str, ...] = (),
        meta: Mapping[str, Any] | None = None,
        width: int = 64,
    ) -> Path:
        scales = {}
        if config.codec == "int8":
            every = [arrays for clips in shards for arrays in clips.values()]
            scales = {s: channel_rms(arrays[s] for arrays in every) for s in config.strides}
        codec = Codec(config.codec, config.dtype, scales)
        for unit, clips in enumerate(shards):
            writer = ShardWriter(shard_path(out, unit), unit, config.fingerprint, codec)
            for id_, arrays in clips.items():
                writer.write(sample_key(id_), make_meta(id_, arrays, **(meta or {})), arrays)
            writer.commit()
        units = [[ClipSource(id_, sample_key(id_), id_, id_) for id_ in clips] for clips in shards]
        calibration = {str(s): scale.tolist() for s, scale in scales.items()} or None
        finish(out, Plan(config, units, calibration=calibration), TowerFacts("unnamed", width))
        failures = [
            QuarantineEntry(id_, sample_key(id_), id_, "decode", Reason.DAMAGED, "damaged", 1, 0.0)
            for id_ in quarantined
        ]
        update_quarantine(out, [], failures)
        return out

    return make


# Models, clips and batches in memory, for tests/test_model_*.py.


@pytest.fixture(scope="session")
def make_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Any]:
    """A function that returns a fresh tokenizer: a model with LAPE adds tokens to the one it gets."""
    folder = tmp_path_factory.mktemp("tokenizer")
    save_llm(folder, ["When is the red circle visible? from 1.5 to 2.25", "at 0.5, 0.25"], seed=0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return lambda: copy.deepcopy(tokenizer)


@pytest.fixture(scope="session")
def make_llm() -> Callable[..., Any]:
    """A function that returns a random LLM of two layers."""

    def make(
        kind: str = "qwen2",
        *,
        rows: int = 512,
        tied: bool = True,
        attention: str = "sdpa",
        width: int = 32,
        seed: int = 0,
    ) -> Any:
        config_class, model_class = {
            "qwen2": (Qwen2Config, Qwen2ForCausalLM),
            "llama": (LlamaConfig, LlamaForCausalLM),
        }[kind]
        config = config_class(
            vocab_size=rows,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            tie_word_embeddings=tied,
            initializer_range=0.2,  # at 0.02 so small a network hardly looks at its input
            bos_token_id=None,
            eos_token_id=None,
        )
        config._attn_implementation = attention
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return model_class(config).eval()

    return make


@pytest.fixture(scope="session")
def make_model(
    make_llm: Callable[..., Any], make_tokenizer: Callable[[], Any]
) -> Callable[..., VLM]:
    """A function that assembles a model; settings are those that differ from strides 2 and 4."""

    def make(llm: Any = None, seed: int = 0, **settings: Any) -> VLM:
        config = VLMConfig(**({"slow_stride": 2, "fast_stride": 4} | settings))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = VLM.assemble(
                config,
                llm or make_llm(),
                make_tokenizer(),
                width=12,
                features={"pool": "average"},
                tower="none",
            )
        return model.eval()

    return make


@pytest.fixture(scope="session")
def make_clip() -> Callable[..., FreshClip]:
    """A function that returns a clip of random (or given) patches, one frame per second."""

    def make(
        seed: int = 0,
        frames: int = 5,
        patch_grid: tuple[int, int] = (5, 7),
        covered: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0),
        patches: np.ndarray | None = None,
    ) -> FreshClip:
        if patches is None:
            patches = np.random.default_rng(seed).normal(size=(frames, *patch_grid, 12))
        frames = len(patches)
        info = ClipInfo(
            id=f"clip-{seed}",
            start=0.0,
            end=float(frames),
            timestamps=np.arange(frames, dtype=np.float64),
            frame_index=np.arange(frames),
            display_size=(48, 64),
            patch_grid=(patches.shape[1], patches.shape[2]),
            covered=covered,
        )
        pooled = {s: pool(torch.from_numpy(patches), s).half().numpy() for s in (2, 4)}
        return FreshClip(info, pooled)

    return make


@pytest.fixture(scope="session")
def make_batch() -> Callable[..., Batch]:
    """A function that collates conversations, each (clips, user text, assistant text, ...)."""

    def make(model: VLM, *talks: tuple[Any, ...], prompt: bool = False) -> Batch:
        chat = Chat.of(model)
        rows = []
        for clips, *texts in talks:
            turns = [Turn(("user", "assistant")[k % 2], text) for k, text in enumerate(texts)]
            infos = [clip.info for clip in clips]
            turns += [Turn("assistant", "")] * prompt
            answer = len(turns) - 1 if prompt else None
            encoded = chat.encode(turns, [info.duration for info in infos], answer=answer)
            pool_mode = model.features["pool"]
            rows.append(lay_out(encoded, infos, model.config, pool_mode, stamp=chat.stamp))
        names = [f"record-{number}" for number in range(len(talks))]
        clips_of_rows = [talk[0] for talk in talks]
        return collate(rows, clips_of_rows, model.config, names, with_copy=True)

    return make


@pytest.fixture(scope="session")
def window_index() -> Callable[..., Tensor]:
    """A function: transformers' own order of Qwen2.5-VL's blocks of patches, window by window."""
    try:
        from transformers.vision_utils import get_vision_window_index
    except ImportError:  # before 5.9 it was a method of the tower

        def by_method(sizes: Tensor, merge: int, window: int, patch: int) -> Tensor:
            values = {"window_size": window, "spatial_merge_size": merge, "patch_size": patch}
            tower = SimpleNamespace(**values, spatial_merge_unit=merge**2)
            order: Tensor = Qwen2_5_VisionTransformerPretrainedModel.get_window_index(tower, sizes)[
                0
            ]
            return order

        return by_method
    return lambda *args: get_vision_window_index(*args)[0]


# Training runs, for tests/test_train_*.py.


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """A function that calls a command and returns the one line with which it ends, and exit code 2."""

    def line_of(command: Callable[..., Any], *args: Any, **settings: Any) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            command(*args, **settings)
        assert stop.value.code == 2
        (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
        return line

    return line_of


@pytest.fixture(scope="session")
def run_settings(toy: Path, toy_bank: Path) -> dict[str, Any]:
    """A run of four steps on the toy bank; `output_dir` is left out."""
    return {
        "stage_path": toy / "llm",
        "bank": toy_bank,
        "data_path": toy / "train.jsonl",
        "num_temporal_tokens": 20,
        "num_spatial_tokens": 20,
        "max_frames_num": 6,
        "learning_rate": 1e-3,
        "max_steps": 4,
    }


@pytest.fixture(scope="session")
def as_flags() -> Callable[[Mapping[str, Any]], list[str]]:
    """A function that writes settings as a command line."""

    def flags(settings: Mapping[str, Any]) -> list[str]:
        words = []
        for name, value in settings.items():
            values = value if isinstance(value, list) else [value]
            shown = [str(v).lower() if isinstance(v, bool) else str(v) for v in values]
            words += [f"--{name}", *shown]
        return words

    return flags


@pytest.fixture
def quiet_thread() -> Iterator[None]:
    """One thread of torch, and nothing said by transformers: for many LLMs that are tiny and odd."""
    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    with cpu_threads(1), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.set_verbosity(level)


@pytest.fixture(scope="session")
def train_here(
    run_settings: dict[str, Any], as_flags: Callable[[Mapping[str, Any]], list[str]]
) -> Callable[..., Path]:
    """A function that trains in this process, with one thread; returns the output folder."""
    from accelerate.state import AcceleratorState

    from train.run import main

    def train(out: Path, **settings: Any) -> Path:
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            with cpu_threads(1):
                main(as_flags(run_settings | {"output_dir": out} | settings))
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
        return out

    return train


@pytest.fixture(scope="session")
def trained_run(train_here: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that has seen the toy clips often enough to answer in coordinates."""
    out = tmp_path_factory.mktemp("trained") / "out"
    return train_here(out, max_steps=40, per_device_train_batch_size=4, learning_rate=3e-3)


@pytest.fixture(scope="session")
def real_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `preprocess realmodels`; FRAMEBANK_MODELS names one that is kept."""
    for package in ("onnx", "gguf"):
        pytest.importorskip(package)
    out = Path(os.environ.get("FRAMEBANK_MODELS") or tmp_path_factory.mktemp("models"))
    try:
        make_real_models(out)
    except UserError as error:
        pytest.skip(str(error))
    return out


@pytest.fixture
def toy_config(
    toy: Path, toy_bank: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> TrainConfig:
    """A run over the toy world's training records, with a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return TrainConfig(
        stage_path=str(toy / "llm"),
        bank=[str(toy_bank)],
        data_path=[str(toy / "train.jsonl")],
        num_temporal_tokens=20,
        num_spatial_tokens=20,
        max_frames_num=7,
    )
