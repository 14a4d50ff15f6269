"""lmms-engine from a bank; Qwen2.5-VL, with its hf_trainer.

torchrun --nproc_per_node N train/recipes/lmms_bank.py config_yaml=run.yaml

The YAML is one of lmms-engine's, of which the dataset and its processor are these:

trainer_type: hf_trainer
dataset_config:
  dataset_type: framebank
  processor_config:
    processor_type: framebank
    processor_name: CHECKPOINT
    extra_kwargs: {bank: BANK, media_dir: ""}

Records are its own, too: a `video_url` names a file, which is a clip of the bank.
"""

import os
from collections.abc import Mapping
from typing import Any

import torch
from lmms_engine.datasets.collator import VisionCollator
from lmms_engine.datasets.naive import VisionSFTDataset
from lmms_engine.datasets.processor import Qwen2_5_VLDataProcessor
from lmms_engine.launch import cli
from lmms_engine.mapping_func import register_dataset, register_processor
from lmms_engine.train import TrainRunner
from lmms_engine.utils.train_utils import TrainUtilities
from transformers import AutoConfig

from shards.errors import UserError
from train.bank_vlm.processor import bank_processor, refuse_decoding
from train.bank_vlm.tower import use_bank

NAME = "framebank"
MODEL = "qwen2_5_vl"
OF_DECODING = (
    "fps",
    "frame_num",
    "video_backend",
    "video_max_frames",
    "video_max_pixels",
    "video_min_pixels",
    "video_sampling_strategy",
)
"""What of a dataset's settings says how lmms-engine reads videos."""
UNTRIED = ("use_liger_kernel", "use_rmpad", "use_muon")
"""Settings of a trainer that put other code into the model or the optimizer."""


@register_processor(NAME)
class BankDataProcessor(Qwen2_5_VLDataProcessor):
    """Makes tokens as lmms-engine does, and takes videos by their names."""

    def _build_processor(self) -> Any:
        given: Mapping[str, Any] = self.config.extra_kwargs
        if not given.get("bank"):
            where = "dataset_config.processor_config.extra_kwargs"
            raise UserError("no bank is named", where=where, fix="add bank: BANK")
        config = AutoConfig.from_pretrained(self.config.processor_name)
        # the data processor above is that of Qwen2.5-VL; those of other models were not tried
        if config.model_type != MODEL:
            raise UserError("not a model of this recipe", got=config.model_type, expected=MODEL)
        plain = super()._build_processor()
        media_dir = given.get("media_dir", "")
        return bank_processor(plain, given["bank"], model_config=config, media_dir=media_dir)


class BankCollator(VisionCollator):
    """Says which tokens are a video's: without it transformers 5 places them one after the other."""

    def __call__(self, instances: Any) -> Any:
        batch = super().__call__(instances)
        ids = batch["input_ids"]
        # 2: transformers' number for the tokens of a video, 1 for those of an image
        batch["mm_token_type_ids"] = 2 * (ids == self.processor.video_token_id).to(ids)
        return batch


@register_dataset(NAME)
class BankDataset(VisionSFTDataset):
    """Records whose videos are clips of the bank."""

    def _build_from_config(self) -> None:
        fields = type(self.config).model_fields
        # a setting that has no effect is refused: who gives it expects other frames
        given = [n for n in OF_DECODING if getattr(self.config, n) != fields[n].default]
        refuse_decoding(given, where="dataset_config")
        super()._build_from_config()

    def load_from_json(self, data: Any, data_folder: str | None = None) -> dict[str, Any]:
        parts = [part for message in data["messages"] for part in message["content"]]
        media = [part for part in parts if part["type"] != "text"]
        if others := {part["type"] for part in media} - {"video_url"}:
            raise UserError("only videos come from the bank", got=", ".join(sorted(others)))
        # joined as lmms-engine joins them for opening a file
        names = [os.path.join(data_folder or "", part["video_url"]["url"]) for part in media]
        made: dict[str, Any] = self.processor.process(
            images=None,
            hf_messages=TrainUtilities.convert_open_to_hf(data["messages"]),
            videos=names or None,
            # the bank's frames as they are: lmms-engine would have chosen them before the processor
            do_sample_frames=False,
        )
        # seconds of a unit of frames, from the bank's own times: M-RoPE counts by them
        if facts := made.pop("video_metadata", None):
            step = self.processor.processor.video_processor.temporal_patch_size
            made["second_per_grid_ts"] = torch.tensor([step / one.sampled_fps for one in facts])
        return made

    def get_collator(self) -> BankCollator:
        return BankCollator(self.processor)


class BankRunner(TrainRunner):
    """What is otherwise in a run: the model has no tower."""

    def __init__(self, config: Any) -> None:
        arguments = config.trainer_args
        if config.trainer_type != "hf_trainer":
            what = "a trainer that has not been tried with a bank"
            raise UserError(what, got=config.trainer_type, expected="hf_trainer")
        if asked := [name for name in UNTRIED if getattr(arguments, name)]:
            raise UserError("has not been tried with a bank", got=", ".join(asked))
        if not hasattr(
            arguments, "only_save_mm_adapter"
        ):  # which 0.1.4 asks for at the end of a run
            arguments.only_save_mm_adapter = False
        super().__init__(config)

    def _build_train_dataset(self) -> Any:
        dataset = super()._build_train_dataset()
        if not isinstance(dataset, BankDataset):
            raise UserError("not the dataset of this recipe", expected=NAME, where="dataset_type")
        if not isinstance(dataset.processor, BankDataProcessor):
            raise UserError(
                "not the processor of this recipe", expected=NAME, where="processor_type"
            )
        # here, as the model is made before the dataset that knows the bank
        use_bank(self.model, dataset.processor.processor.source.bank)
        return dataset


cli.TrainRunner = BankRunner  # of runners there is no registry

if __name__ == "__main__":
    cli.main()
