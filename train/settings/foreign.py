"""Settings of other trainers: the setting here of the same meaning, or why there is none.

A line copied from a script of transformers, LLaVA-NeXT, VILA or lmms-engine is refused with an answer.
train/MIGRATING.md has this list, and tables of three scripts that say the same; a test compares it with
the trainers' own.
"""

import difflib
from collections.abc import Collection, Mapping
from dataclasses import Field
from typing import Any

RENAMED = {
    "stage_path": """model_name_or_path model_path pretrained_model_name_or_path model_name base_model
        load_from_pretrained_path load_from_config model""",
    "data_config": "dataset_path data_yaml datasets dataset_config_path data_recipe",
    "data_path": "train_file dataset dataset_name train_data json_path annotation_path",
    "eval_path": "eval_data_path validation_file eval_data_mixture eval_dataset_path val_data_path",
    "media_dir": "image_folder video_folder data_folder media_folder image_dir video_dir",
    "output_dir": "output output_path save_dir out_dir checkpoint_dir",
    "mm_projector_type": "mm_projector projector_type",
    "frame_sampling_strategy": "frame_strategy slow_fast_strategy",
    "mm_spatial_pool_stride": "slow_stride spatial_pool_stride",
    "frame_marks": "mm_newline_position",
    "max_frames_num": "frames_upbound num_video_frames max_frames frame_num num_frames video_max_frames",
    "max_tokens": """model_max_length max_length max_seq_length max_seq_len cutoff_len
        tokenizer_model_max_length""",
    "pack_tokens": "packing packing_length packing_strategy pack_length use_rmpad sample_packing",
    "attn": "attn_implementation mpt_attn_impl flash_attn use_flash_attn use_flash_attention_2",
    "tune_llm": """tune_language_model lora_enable use_lora lora_llm freeze_backbone mm_tunable_parts
        freeze_modules unfreeze_language_model""",
    "lora_r": "lora_rank",
    "projector_lr": "mm_projector_lr merger_lr mm_vision_resampler_lr",
    "lape_lr": "lape_lr_multiplier",
    "learning_rate": "lr base_lr llm_lr",
    "adam_beta2": "beta2",
    "max_grad_norm": "grad_clip gradient_clip_val clip_grad",
    "warmup_ratio": "warmup_steps",
    "num_train_epochs": "epochs num_epochs max_epochs",
    "per_device_train_batch_size": """batch_size train_batch_size micro_batch_size
        per_gpu_train_batch_size""",
    "gradient_accumulation_steps": "accumulate_grad_batches accumulation_steps grad_accum",
    "gradient_checkpointing": "activation_checkpointing",
    "compile": "torch_compile",
    "bf16": "model_dtype torch_dtype dtype mixed_precision",
    "prefetch": "dataloader_num_workers num_workers dataloader_prefetch_factor",
    "eval_steps": "evaluation_strategy eval_strategy do_eval",
    "save_steps": "save_strategy",
    "logging_steps": "logging_strategy logging_first_step",
    "resume": "resume_from_checkpoint",
    "wandb": "report_to use_wandb",
    "reduce": "full_determinism",
    "enable_lape": "use_lape",
    "loss_weight": "ar_loss_weight autoregressive_loss_weight",
}
"""Setting here -> its names elsewhere."""

ELSEWHERE = {
    "no setting of a run: the tower's features are banked; it is of `preprocess encode`": """
        vision_tower mm_vision_tower vision_tower_pretrained mm_vision_select_layer vision_resolution
        fps video_fps video_backend video_decode_backend video_sampling_strategy downsample_video
        video_max_pixels video_min_pixels min_pixels max_pixels image_processor max_num_pixels""",
    "the tower is frozen: its features are banked; leave it out": """
        tune_vision_tower unfreeze_mm_vision_tower mm_vision_tower_lr vision_tower_lr lora_vt
        drop_path_rate""",
    "patches alone are banked, without CLS; leave it out": "mm_vision_select_feature",
    "the projector is always trained, by projector_lr; leave it out": """
        tune_mm_projector tune_mm_mlp_adapter freeze_mm_mlp_adapter""",
    "a learned vector closes each frame, there are no such tokens; leave it out": """
        mm_use_im_start_end mm_use_im_patch_token mm_patch_merge_type
        faster_token_stride add_faster_video""",
    "frames are banked as one view each, as the tower's processor cuts them; leave it out": """
        image_aspect_ratio image_grid_pinpoints image_crop_resolution image_split_resolution
        max_tiles min_tiles video_max_tiles s2 s2_scales s2_max_split_size s2_resize_output_to_scale_idx
        dynamic_s2""",
    "pooling is done when a bank is made, `preprocess encode --pool`; leave it out": """
        mm_spatial_pool_mode mm_spatial_pool_out_channels mm_resampler_type interpolate_mode""",
    "the tokenizer's chat template decides, or chat_template names one of ours; leave it out": """
        version conv_template conversation_template vflan_no_system_prompt system_prompt
        truncation_side""",
    "frames have their times by frame_time: text, or LAPE; leave it out": """
        add_time_instruction force_sample num_time_tokens time_token_format soft_ce_std""",
    "not offered: losses are summed in fp32, and bf16 needs no scaling; use bf16: true": """
        fp16 fp16_full_eval bf16_full_eval fp16_opt_level half_precision_backend fp16_backend""",
    "always so: the frame loss reads the last hidden states; leave it out": "output_hidden_states",
    "done where there is a GPU; leave it out": """
        dataloader_pin_memory dataloader_persistent_workers""",
    "nothing to set: a run is a plan, which fixes what every step reads; leave it out": """
        dataloader_drop_last dataloader_in_order dataloader_multiprocessing_context data_seed shuffle
        group_by_length group_by_modality_length group_by_varlen group_by_modality_length_auto
        train_sampling_strategy length_column_name longvila_sampler ignore_data_skip
        remove_unused_columns label_names lazy_preprocess is_multimodal early_mix_text filter_overlong
        split_batches auto_find_batch_size average_tokens_across_devices dataset_format dataset_type
        eval_do_concat_batches""",
    "the rate is always a warm-up, then a cosine; leave it out": """
        lr_scheduler_type lr_scheduler lr_scheduler_kwargs scheduler min_lr min_lr_ratio""",
    "the optimizer is always AdamW, with beta1 0.9 and epsilon 1e-8; leave it out": """
        optim optimizer optim_args optim_target_modules adam_beta1 adam_epsilon adafactor use_muon
        beta1 learning_rate_scheduler""",
    "not offered: answers are learned by plain cross-entropy; leave it out": """
        label_smoothing_factor neftune_noise_alpha dpo dpo_beta dpo_alpha gamma precompute_ref_log_probs
        loss_function use_liger_kernel liger_kernel_config use_liger""",
    "of DeepSpeed or FSDP 1, which are not supported: accelerate launch --config_file "
    "train/presets/fsdp2_8gpu.yaml shares a model by FSDP2": """
        deepspeed deepspeed_config fsdp fsdp_config fsdp2 sharded_ddp zero_stage parallelism_config
        fsdp_transformer_layer_cls_to_wrap""",
    "not offered: the projector is an MLP over cells; leave it out": """
        tune_mm_vision_resampler freeze_mm_vision_resampler mm_perceiver_depth mm_perceiver_latents
        mm_perceiver_latents_fast mm_perceiver_ff_mult mm_perceiver_pretrained mm_qformer_depth
        mm_qformer_latents mm_qformer_pretrained mm_mask_drop_mode mm_mask_drop_skip_percentage
        mm_mask_drop_ratio mm_mask_drop_ratio_upper mm_mask_drop_ratio_lower""",
    "positions are the LLM's own; leave it out": """
        rope_scaling_factor rope_scaling_type use_pos_skipping pos_skipping_range""",
    "the LLM and its tokenizer are those of stage_path; leave it out": """
        model_class_name processor_name processor_type tokenizer tokenizer_name delay_load""",
    "not offered: a row is read by one device; leave it out": """
        enable_ring_attention
        seq_parallel_size seq_parallel_ring_size seq_parallel_ring_type sp_ulysses_degree
        sequence_parallel_size tp_degree ep_degree""",
    "accelerate launch or torchrun decides about processes and devices; leave it out": """
        local_rank use_cpu no_cuda ddp_backend ddp_timeout ddp_find_unused_parameters
        ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph accelerator_config num_processes
        nproc_per_node n_gpu gpus devices num_gpus world_size place_model_on_device""",
    "weights are read whole, in bf16 or fp32; leave it out": """
        bits double_quant quant_type load_in_4bit load_in_8bit use_qlora quantization
        low_cpu_mem_usage""",
    "LoRA is of all linear layers of the LLM, by lora_r and lora_alpha, and of its experts unless "
    "lora_experts: false; leave it out": """
        lora_dropout lora_bias lora_weight_path lora_target_modules lora_modules use_dora""",
    "an earlier stage's parts are taken of stage_path: its projector and tables too; leave it out": """
        pretrain_mm_mlp_adapter mlp_path pretrained_lape load_lape load_lora_path""",
    "tune_llm, stage_path and the data make a stage; leave it out": "stage",
    "the whole micro-batch is tried before step 1, and memory is kept; leave it out": """
        torch_empty_cache_steps use_cache skip_memory_metrics""",
    "compile: true takes torch's own choice; leave it out": """
        torch_compile_backend torch_compile_mode""",
    "gradient_checkpointing says it all: none, full, or every N-th layer; leave it out": """
        gradient_checkpointing_kwargs activation_checkpointing_kwargs""",
    "a line every logging_steps, all metrics in metrics.jsonl, curves in logs/; leave it out": """
        log_on_each_node logging_nan_inf_filter log_level log_level_replica disable_tqdm logging_dir
        include_num_input_tokens_seen include_tokens_per_second include_for_metrics verbose_logging
        print_batch_input_steps trackio_space_id trackio_bucket_id trackio_static_space_id""",
    "W&B's own variables say it: WANDB_PROJECT, WANDB_NAME, WANDB_ENTITY; set them, and wandb: true": """
        run_name wandb_run_name wandb_project project entity""",
    "the held-out loss has the micro-batches of training, every eval_steps; leave it out": """
        eval_delay per_device_eval_batch_size prediction_loss_only eval_on_start
        eval_use_gather_object eval_accumulation_steps batch_eval_metrics eval_batch_size""",
    "the best checkpoint is also kept, the model is that of the last step; leave it out": """
        load_best_model_at_end metric_for_best_model greater_is_better""",
    "checkpoints are whole, one for all processes; a signal saves; leave it out": """
        save_only_model save_on_each_node enable_jit_checkpoint save_safetensors
        restore_callback_states_from_checkpoint overwrite_output_dir total_time_limit
        pre_terminate_time""",
    "not offered: `python -m train.export` writes a folder that can be published": """
        push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision""",
    "train/run.py trains; leave it out (train/evaluate.py scores)": "do_train do_predict",
    "Hub downloads go where HF_HOME says; leave it out": "cache_dir",
    "code that comes with a model is not run; leave it out": "trust_remote_code",
    "not offered; leave it out": """
        debug debug_e2e jit_mode_eval torchdynamo ray_scope monkey_patch_kwargs tpu_num_cores
        trainer_type past_index""",
    "smooth codes of position, at the scale of the LLM's rows, begin the tables; leave it out": """
        lape_init_strategy""",
    "learned: gamma of each axis; leave it out": "spatial_pos_weight temporal_pos_weight",
    "rows of a step are processes x per_device_train_batch_size x gradient_accumulation_steps; set "
    "those": "global_train_batch_size global_batch_size max_per_device_train_batch_size",
}
"""Message -> the names elsewhere that it answers."""

NESTS = (
    *(
        "autoregressive_config",
        "trainer_args",
        "dataset_config",
        "model_config",
        "processor_config",
    ),
    *("config", "extra_kwargs", "training_args", "training_arguments", "data_args", "model_args"),
)
"""Keys under which other trainers nest theirs."""

HERE = {name: ours for ours, names in RENAMED.items() for name in names.split()}
"""A name elsewhere -> the setting here."""
FOREIGN = {name: sentence for sentence, names in ELSEWHERE.items() for name in names.split()}
FOREIGN |= dict.fromkeys(NESTS, "settings stand flat here: move its lines to the left")
"""A name elsewhere that is no setting here -> why."""

ENVIRONMENT = {
    "ENABLE_LAPE": "enable_lape",
    "NUM_SPATIAL_TOKENS": "num_spatial_tokens",
    "NUM_TEMPORAL_TOKENS": "num_temporal_tokens",
    "GRADIENT_ACCUMULATION_STEPS": "gradient_accumulation_steps",
    "PER_DEVICE_TRAIN_BATCH_SIZE": "per_device_train_batch_size",
}
"""Environment variable of the LAPE script -> setting."""
NAMED = ("GLOBAL_TRAIN_BATCH_SIZE", "MAX_PER_DEVICE_TRAIN_BATCH_SIZE")
"""Variables of the LAPE script without a setting here."""
MISSPELT = ("ENABLE_LAPE", "NUM_SPATIAL_TOKENS", "NUM_TEMPORAL_TOKENS")
"""Variables whose near misses are typing errors, since no other program has similar ones."""


def is_foreign(name: str) -> bool:
    """Return whether a name is another trainer's setting."""
    return name in HERE or name in FOREIGN


def unknown(name: str, known: Mapping[str, Field[Any]]) -> str:
    """Return the message for an unknown setting: its name here, or why there is none."""
    if name in HERE:
        return f"here it is {HERE[name]} ({known[HERE[name]].metadata['help']})"
    if name in FOREIGN:
        return FOREIGN[name]
    # other trainers write one name with dashes, dots or capitals
    plain = name.strip().lower().replace("-", "_").replace(".", "_")
    negated = plain.removeprefix("no_")
    if negated != plain and negated in known:
        return f"unknown setting; did you mean {negated}: false?"
    # 0.6 is difflib's own cutoff; the foreign names are some hundreds, of which one is near anything
    close = _closest(plain, known, 0.6)
    other = _closest(plain, [*HERE, *FOREIGN], 0.8)
    # a slip in another trainer's name is answered as that name, not as the nearest of ours
    if other and (not close or _alike(plain, other) > _alike(plain, close)):
        return f"unknown setting; did you mean {other}? {unknown(other, known)}"
    return f"unknown setting; did you mean {close}?" if close else "unknown setting (see --help)"


def environment_problems(environ: Mapping[str, str]) -> list[str]:
    """Return a line for each misspelt or unsupported environment variable of a run."""
    problems = [
        f"{name}: {FOREIGN[name.lower()]}, and unset it" for name in NAMED if environ.get(name)
    ]
    for name in environ:
        close = _closest(name.upper(), MISSPELT, 0.9)
        if close and name not in ENVIRONMENT:
            problems.append(f"{name}: unknown variable; did you mean {close}? unset it otherwise")
    return problems


def _closest(name: str, names: Collection[str], cutoff: float) -> str:
    return next(iter(difflib.get_close_matches(name, names, n=1, cutoff=cutoff)), "")


def _alike(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()
