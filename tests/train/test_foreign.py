"""Lines pasted from other trainers: each name is answered with what it is here, or why it is not."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
from transformers import TrainingArguments

from train.settings.config import TrainConfig, parse
from train.settings.foreign import ENVIRONMENT, FOREIGN, HERE, unknown

SETTINGS = {field.name: field for field in fields(TrainConfig)}
SCRIPTS = {
    "transformers": " ".join(field.name for field in fields(TrainingArguments)),
    "LLaVA-NeXT": """
        model_name_or_path model_class_name mm_tunable_parts version freeze_backbone
        tune_mm_mlp_adapter tune_mm_vision_resampler vision_tower vision_tower_pretrained
        unfreeze_mm_vision_tower unfreeze_language_model mm_vision_select_layer
        pretrain_mm_mlp_adapter mm_projector_type mm_use_im_start_end mm_use_im_patch_token
        mm_patch_merge_type mm_vision_select_feature mm_resampler_type mm_mask_drop_mode
        mm_mask_drop_ratio mm_spatial_pool_stride mm_spatial_pool_mode mm_spatial_pool_out_channels
        mm_perceiver_depth mm_qformer_latents rope_scaling_factor rope_scaling_type mm_newline_position
        data_path lazy_preprocess is_multimodal early_mix_text image_folder image_aspect_ratio
        image_grid_pinpoints image_crop_resolution image_split_resolution video_folder video_fps
        frames_upbound add_time_instruction force_sample cache_dir freeze_mm_mlp_adapter
        freeze_mm_vision_resampler mpt_attn_impl model_max_length double_quant quant_type bits
        lora_enable lora_r lora_alpha lora_dropout lora_weight_path lora_bias mm_projector_lr
        mm_vision_tower_lr group_by_varlen group_by_modality_length group_by_modality_length_auto
        auto_find_batch_size verbose_logging attn_implementation evaluation_strategy
        torch_compile_backend dataloader_drop_last""",
    "VILA": """
        data_mixture eval_data_mixture vflan_no_system_prompt downsample_video num_video_frames fps
        mm_projector vision_resolution interpolate_mode drop_path_rate mlp_path s2 s2_scales
        s2_max_split_size tune_vision_tower tune_language_model tune_mm_projector model_dtype use_dora
        lora_llm lora_vt dpo longvila_sampler dpo_beta total_time_limit pre_terminate_time
        seq_parallel_size seq_parallel_ring_size seq_parallel_ring_type debug_e2e num_time_tokens
        time_token_format soft_ce_std max_tiles video_max_tiles lape_init_strategy lape_warmup_steps
        lape_lr_multiplier spatial_pos_weight temporal_pos_weight""",
    "lmms-engine": """
        trainer_type dataset_config dataset_type dataset_format dataset_path datasets processor_config
        processor_name processor_type packing packing_strategy packing_length model_config
        load_from_pretrained_path attn_implementation trainer_args eval_strategy group_by_length
        freeze_modules use_liger_kernel use_rmpad fsdp2 fsdp_config sp_ulysses_degree
        print_batch_input_steps use_muon video_backend video_sampling_strategy video_max_pixels
        video_max_frames frame_num filter_overlong extra_kwargs autoregressive_config
        output_hidden_states""",
}


def problems(argv: list[str], capsys: pytest.CaptureFixture[str], **environ: str) -> list[str]:
    """Return the lines that a refused command line prints."""
    with pytest.raises(SystemExit) as stop:
        parse(argv, environ)
    assert stop.value.code == 2
    return [line.removeprefix("error: ") for line in capsys.readouterr().err.splitlines()]


@pytest.fixture
def good(tmp_path: Path) -> list[str]:
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm" / "config.json").write_text("{}")
    (tmp_path / "records.jsonl").write_text("")
    return [
        *("--stage_path", str(tmp_path / "llm")),
        *("--data_path", str(tmp_path / "records.jsonl")),
        *("--output_dir", str(tmp_path / "out")),
    ]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_name_of_a_script_is_a_setting_or_has_its_sentence(script: str) -> None:
    names = SCRIPTS[script].split()
    assert len(names) > 30
    assert not [n for n in names if n not in SETTINGS and "unknown" in unknown(n, SETTINGS)]


def test_no_name_is_answered_twice_and_every_answer_names_what_there_is() -> None:
    assert not SETTINGS.keys() & {*HERE, *FOREIGN}
    assert not HERE.keys() & FOREIGN.keys()
    assert set(HERE.values()) <= SETTINGS.keys()
    written = {
        word for text in FOREIGN.values() for word in re.findall(r"\b[a-z]+_[a-z_]+\b", text)
    }
    assert written - {"fsdp2_8gpu", "config_file"} <= SETTINGS.keys()
    assert all("leave it out" in text or len(text) > 30 for text in FOREIGN.values())


LINES = [
    ("fp16: true", "fp16: not offered: losses are summed in fp32, and bf16 needs no scaling"),
    ("output_hidden_states: true", "always so: the frame loss reads the last hidden states"),
    ("dataloader_num_workers: 4", "here it is prefetch (steps whose batches are prepared ahead)"),
    ("dataloader_pin_memory: true", "done where there is a GPU; leave it out"),
    ("deepspeed: scripts/zero3.json", "of DeepSpeed or FSDP 1, which are not supported"),
    ("fsdp_config:\n  min_num_params: 1", "of DeepSpeed or FSDP 1, which are not supported"),
    ("datasets:\n- path: a\n  data_type: json", "here it is data_config (YAML of named datasets"),
    ("warmup_steps: 100", "here it is warmup_ratio (share of the steps with rising rate)"),
    ("lr: 1e-4", "here it is learning_rate"),
    ("Learning-Rate: 1e-4", "unknown setting; did you mean learning_rate?"),
    ("dataloader_num_worker: 1", "did you mean dataloader_num_workers? here it is prefetch"),
    ("no_bf16: true", "did you mean bf16: false?"),
    ("zzz: 1", "zzz: unknown setting (see --help)"),
]


@pytest.mark.parametrize(("text", "expected"), LINES)
def test_a_line_of_another_trainer_is_answered_by_name(
    good: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, expected: str
) -> None:
    (tmp_path / "x.yaml").write_text(f"# above\n{text}\n")
    (line,) = problems([*good, "--config", str(tmp_path / "x.yaml")], capsys)
    assert line.startswith(f"{tmp_path / 'x.yaml'}:2 ")
    assert expected in line


FLAGS = [
    (["--fp16"], "--fp16: not offered: losses"),
    (["--lora_enable", "True"], "--lora_enable: here it is tune_llm (the trained part of the LLM)"),
    (["--report_to", "wandb", "tensorboard"], "--report_to: here it is wandb (mirror metrics"),
    (["--dataloader-num-workers=16"], "--dataloader_num_workers: here it is prefetch"),
    (["--deepspeed", "zero3.json"], "--deepspeed: of DeepSpeed or FSDP 1"),
]


@pytest.mark.parametrize(("extra", "expected"), FLAGS)
def test_a_flag_of_another_trainer_is_answered_by_name(
    good: list[str], capsys: pytest.CaptureFixture[str], extra: list[str], expected: str
) -> None:
    (line,) = problems([*good, *extra], capsys)
    assert line.startswith(expected)


def test_nested_keys_are_told_to_stand_flat_and_are_checked_where_they_stand(
    good: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.yaml").write_text(
        "seed: 1\n"
        "autoregressive_config:\n"
        "  slow_frame_ratio: 0.25\n"
        "  loss_wieght: 0.1\n"
        "  max_frames_num: many\n"
        "trainer_args:\n"
        "  bf16: true\n"
        "  seed: 2\n"
    )
    yaml = tmp_path / "x.yaml"
    nested = "settings stand flat here: move its lines to the left"
    assert problems([*good, "--config", str(yaml)], capsys) == [
        f"{yaml}:2 autoregressive_config: {nested}",
        f"{yaml}:6 trainer_args: {nested}",
        f"{yaml}:8 seed: already set in line 1",
        f"{yaml}:4 loss_wieght: unknown setting; did you mean loss_weight?",
        f"{yaml}:5 max_frames_num must be a positive integer, got 'many'",
    ]


def test_the_scripts_variables_are_obeyed_or_named(
    good: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    environ = {"GRADIENT_ACCUMULATION_STEPS": "3", "PER_DEVICE_TRAIN_BATCH_SIZE": "5"}
    config = parse(good, environ)
    assert (config.gradient_accumulation_steps, config.per_device_train_batch_size) == (3, 5)
    assert parse([*good, "--gradient_accumulation_steps", "2"], environ) == parse(
        good, environ | {"GRADIENT_ACCUMULATION_STEPS": "2"}
    )
    assert problems(good, capsys, GLOBAL_TRAIN_BATCH_SIZE="32") == [
        "GLOBAL_TRAIN_BATCH_SIZE: rows of a step are processes x per_device_train_batch_size x "
        "gradient_accumulation_steps; set those, and unset it"
    ]
    for name in ("NUM_SPATIAL_TOKEN", "num_temporal_tokens", "ENABLE_LAPES", "NUM_SPACIAL_TOKENS"):
        (line,) = problems(good, capsys, **{name: "60"})
        assert line.startswith(f"{name}: unknown variable; did you mean ")


@pytest.mark.parametrize("name", ENVIRONMENT)
def test_a_variable_that_is_set_to_nothing_is_unset(name: str, good: list[str]) -> None:
    assert parse(good, {name: ""}) == parse(good, {})


@pytest.mark.parametrize("word", ["on", "yes", "true", "True", "1", "ON", "Yes"])
def test_true_and_false_are_written_as_people_write_them(
    word: str, good: list[str], tmp_path: Path
) -> None:
    opposite = {"on": "off", "yes": "no", "true": "false", "1": "0"}[word.lower()]
    (tmp_path / "x.yaml").write_text(f"bf16: {word}\ntf32: {opposite}\n")
    config = parse([*good, "--config", str(tmp_path / "x.yaml")], {"ENABLE_LAPE": opposite})
    assert (config.bf16, config.tf32, config.enable_lape) == (True, False, False)
    assert parse([*good, "--enable_lape", word], {"ENABLE_LAPE": opposite}).enable_lape
