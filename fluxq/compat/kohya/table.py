"""Every option of sd-scripts' flux_train_network.py: its type and default there, and what becomes of it here.

A row is one of three things: `to` names the settings that it becomes, `ignored` says why it is not needed here,
`refused` says why a run that asks for it cannot start. What is ignored or refused counts only where it differs from the
default. mapping.py does what `to` says.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FLAG = bool
"""The kind of an option that takes no value."""


@dataclass(frozen=True)
class Row:
    """One option. kind: what makes a value of its text. many: it takes any number of values."""

    name: str
    kind: Any
    default: Any = None
    to: str = ""
    ignored: str = ""
    refused: str = ""
    choices: tuple[str | int, ...] = ()
    many: bool = False


def rows(names: str, kind: Any, default: Any = None, choices: str = "", **about: Any) -> list[Row]:
    """A row for each of the names."""
    default, allowed = False if kind is FLAG else default, tuple(kind(choice) for choice in choices.split())
    return [Row(name, kind, default, choices=allowed, **about) for name in names.split()]


def steps_or_share(text: str) -> int | float:
    """Steps, or below 1 and with % a share of them. Raises ArgumentTypeError, whose message argparse prints."""
    try:
        if text.endswith("%"):
            return float(text[:-1]) / 100
        return int(text) if float(text) >= 1 else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither whole steps nor a share below 1 nor a percentage"
        ) from None


INERT = "it has no effect on FLUX.1 in sd-scripts either"
CHROMA = "Chroma is another model; fluxq trains FLUX.1"
NEAR = "tokenizers are found near the text encoders; model.clip_tokenizer and model.t5_tokenizer name others"
LOADS = "files are read in parts, never whole, into RAM"
FITS = "fluxq recomputes or keeps what fits into the GPU's memory"
ATTENTION = "attention is always fused"
KERNELS = "fluxq has kernels of its own"
VAE = "images are encoded in bf16, in bands that fit"
CACHED = "images and captions are always encoded ahead and kept"
WORKERS = "nothing is decoded while training, so no workers are needed"
ONLY_TEXT = "fluxq trains CLIP-L only together with the transformer"
COMMENT = "other programs need what a LoRA says of itself"
THUMBNAIL = "no picture is put into the file"
CUSTOM = "fluxq has no schedules of other packages"
TIMESCALE = "fluxq's inverse_sqrt has the warm-up's steps as its time scale"
INITIAL = "a run goes on where it stopped, with fluxq train --resume"
SAFE = "fluxq writes only safetensors"
BF16 = "fluxq computes in bf16, with LoRA weights in fp32"
PRECISION = "a LoRA is saved in bf16"
STATE = "the state is saved with every LoRA, and the last is kept"
RESUME = "a state of sd-scripts cannot be continued; start from its LoRA with --network_weights"
UPLOAD = "fluxq uploads nothing"
UPLOADS = "it is for uploads, and fluxq uploads nothing"
FIRST = "previews begin after some steps; fluxq sample shows what the model draws without a LoRA"
LOGS = "the losses are in log.jsonl and loss.png of the run"
BY_CONTENT = "the images to hold out are chosen by what is in them, not by a seed"
ALL_HELD_OUT = "every held-out image is measured"
SECONDARY = "fluxq has no second separator of tags"
FACES = "fluxq does not crop around faces"
TOKEN_WARMUP = "fluxq does not add tags step by step"
UNUSED_WARMUP = "it is for --token_warmup_step"
INTERPOLATION = "fluxq resizes as sd-scripts does by default"
CLASS = "datasets that are Python classes cannot be read"
DEBUG = "it shows images in place of training; fluxq check --crops does that"
WEIGHTED = "sd-scripts cannot do it for FLUX.1 either"
OUTPUT_CONFIG = "it writes a file in place of training; --write-config does that"
ONE_GPU = "fluxq trains on one GPU, without DeepSpeed"
NO_DEEPSPEED = "it is for --deepspeed"
ONE = "it is for several GPUs"

TABLE: tuple[Row, ...] = (
    # Model
    *rows("pretrained_model_name_or_path", str, to="model.flux"),
    *rows("clip_l", str, to="model.clip_l"),
    *rows("t5xxl", str, to="model.t5xxl"),
    *rows("ae", str, to="model.ae"),
    *rows("t5xxl_max_token_length", int, to="model.t5_length"),
    *rows("apply_t5_attn_mask", FLAG, to="model.text_mask"),
    *rows("model_type", str, "flux", refused=CHROMA, choices="flux chroma"),
    *rows("tokenizer_cache_dir", str, ignored=NEAR),
    *rows("disable_mmap_load_safetensors lowram highvram", FLAG, ignored=LOADS),
    *rows("vae controlnet_model_name_or_path", str, ignored=INERT),
    *rows(
        "v2 v_parameterization noise_offset_random_strength scale_v_pred_loss_like_noise_pred "
        "debiased_estimation_loss zero_terminal_snr fused_backward_pass",
        FLAG,
        ignored=INERT,
    ),
    *rows("clip_skip min_timestep max_timestep multires_noise_iterations", int, ignored=INERT),
    *rows("max_token_length", int, ignored=INERT, choices="150 225"),
    *rows("noise_offset adaptive_noise_scale min_snr_gamma v_pred_like_loss", float, ignored=INERT),
    *rows("multires_noise_discount", float, 0.3, ignored=INERT),
    *rows(
        "sample_sampler",
        str,
        "ddim",
        "ddim pndm lms euler euler_a heun dpm_2 dpm_2_a dpmsolver dpmsolver++ dpmsingle "
        "k_lms k_euler k_euler_a k_dpm_2 k_dpm_2_a",
        ignored=INERT,
    ),
    # Flow and loss
    *rows("guidance_scale", float, 3.5, to="training.guidance"),
    *rows("timestep_sampling", str, "sigma", to="training.timesteps", choices="sigma uniform sigmoid shift flux_shift"),
    *rows("sigmoid_scale", float, 1.0, to="training.sigmoid_scale"),
    *rows("discrete_flow_shift", float, 3.0, to="training.shift"),
    *rows("model_prediction_type", str, "sigma_scaled", to="training.prediction", choices="raw additive sigma_scaled"),
    *rows(
        "weighting_scheme",
        str,
        "uniform",
        to="training.weighting, training.timesteps",
        choices="sigma_sqrt logit_normal mode cosmap none uniform",
    ),
    *rows("logit_mean", float, 0.0, to="training.logit_mean"),
    *rows("logit_std", float, 1.0, to="training.logit_std"),
    *rows("mode_scale", float, 1.29, to="training.mode_scale"),
    *rows("huber_c", float, 0.1, to="training.huber_c"),
    *rows("huber_schedule", str, "snr", to="training.huber_schedule", choices="constant exponential snr"),
    *rows("huber_scale", float, 1.0, to="training.huber_scale"),
    *rows("loss_type", str, "l2", to="training.loss", choices="l1 l2 huber smooth_l1"),
    *rows("prior_loss_weight", float, 1.0, to="prior_weight of regularization folders"),
    *rows("masked_loss alpha_mask", FLAG, to="masks of folders"),
    *rows("conditioning_data_dir", str, to="masks of folders"),
    *rows("ip_noise_gamma", float, to="training.input_noise"),
    *rows("ip_noise_gamma_random_strength", FLAG, to="training.input_noise_random"),
    # Memory and precision
    *rows("fp8_base fp8_base_unet", FLAG, to="model.format"),
    *rows("blocks_to_swap", int, to="memory.blocks_to_swap"),
    *rows("split_mode", FLAG, to="memory.blocks_to_swap"),
    *rows("gradient_checkpointing cpu_offload_checkpointing", FLAG, ignored=FITS),
    *rows("mixed_precision", str, "no", ignored=BF16, choices="no fp16 bf16"),
    *rows("full_fp16 full_bf16", FLAG, ignored=BF16),
    *rows("sdpa xformers mem_eff_attn", FLAG, ignored=ATTENTION),
    *rows("torch_compile", FLAG, ignored=KERNELS),
    *rows(
        "dynamo_backend",
        str,
        "inductor",
        ignored=KERNELS,
        choices="eager aot_eager inductor aot_ts_nvfuser nvprims_nvfuser cudagraphs ofi fx2trt onnxrt tensort ipex tvm",
    ),
    *rows("no_half_vae", FLAG, ignored=VAE),
    *rows("vae_batch_size", int, 1, ignored=VAE),
    # Caches and loading of data
    *rows(
        "cache_latents cache_latents_to_disk cache_text_encoder_outputs cache_text_encoder_outputs_to_disk "
        "skip_cache_check cache_info",
        FLAG,
        ignored=CACHED,
    ),
    *rows("text_encoder_batch_size", int, ignored=CACHED),
    *rows("max_data_loader_n_workers", int, 8, ignored=WORKERS),
    *rows("persistent_data_loader_workers", FLAG, ignored=WORKERS),
    # Network
    *rows("network_module", str, to="lora.targets"),
    *rows("network_args", str, to="lora.targets, lora.ranks, lora.plus_ratio, lora.rank_dropout", many=True),
    *rows("network_dim", int, to="lora.rank"),
    *rows("dim_from_weights", FLAG, to="lora.from_lora"),
    *rows("network_alpha", float, 1, to="lora.alpha"),
    *rows("network_dropout", float, to="lora.inner_dropout"),
    *rows("scale_weight_norms", float, to="lora.max_norm"),
    *rows("network_train_unet_only", FLAG, to="lora.text_encoder"),
    *rows("network_train_text_encoder_only", FLAG, refused=ONLY_TEXT),
    *rows("network_weights", str, to="lora.from_lora"),
    *rows("base_weights", str, to="model.base_loras", many=True),
    *rows("base_weights_multiplier", float, to="model.base_loras", many=True),
    *rows("learning_rate", float, 2e-06, to="training.learning_rate"),
    *rows("unet_lr", float, to="training.learning_rate"),
    *rows("text_encoder_lr", float, to="training.text_learning_rate", many=True),
    # Metadata
    *rows(
        "training_comment metadata_title metadata_author metadata_description metadata_license metadata_tags "
        "metadata_usage_hint metadata_merged_from metadata_trigger_phrase metadata_preprocessor "
        "metadata_is_negative_embedding",
        str,
        to="output.metadata",
    ),
    *rows("metadata_thumbnail", str, ignored=THUMBNAIL),
    *rows("no_metadata", FLAG, ignored=COMMENT),
    # Optimizer, schedule, length
    *rows("optimizer_type", str, "", to="training.optimizer"),
    *rows("use_8bit_adam use_lion_optimizer", FLAG, to="training.optimizer"),
    *rows("optimizer_args", str, to="training.optimizer_args", many=True),
    *rows("max_grad_norm", float, 1.0, to="training.clip"),
    *rows("lr_scheduler", str, "constant", to="training.schedule"),
    *rows("lr_scheduler_type", str, "", refused=CUSTOM),
    *rows("lr_scheduler_args", str, refused=CUSTOM, many=True),
    *rows("lr_warmup_steps", steps_or_share, 0, to="training.warmup"),
    *rows("lr_decay_steps", steps_or_share, 0, to="training.schedule_decay"),
    *rows("lr_scheduler_num_cycles", int, 1, to="training.schedule_cycles"),
    *rows("lr_scheduler_power", float, 1, to="training.schedule_power"),
    *rows("lr_scheduler_timescale", int, refused=TIMESCALE),
    *rows("lr_scheduler_min_lr_ratio", float, to="training.schedule_floor"),
    *rows("max_train_steps", int, 1600, to="training.steps"),
    *rows("max_train_epochs", int, to="training.epochs"),
    *rows("train_batch_size", int, 1, to="training.batch"),
    *rows("gradient_accumulation_steps", int, 1, to="training.accumulate"),
    *rows("seed", int, to="training.seed"),
    *rows("initial_epoch initial_step", int, refused=INITIAL),
    *rows("skip_until_initial_step", FLAG, refused=INITIAL),
    # Saving
    *rows("output_dir", str, to="output.out"),
    *rows("output_name", str, to="output.name"),
    *rows("save_model_as", str, "safetensors", refused=SAFE, choices="ckpt pt safetensors"),
    *rows("save_precision", str, ignored=PRECISION, choices="float fp16 bf16"),
    *rows("save_every_n_epochs save_n_epoch_ratio", int, to="output.save_every_epochs, output.numbering"),
    *rows("save_every_n_steps", int, to="output.save_every"),
    *rows("save_last_n_epochs save_last_n_steps", int, to="output.keep"),
    *rows("save_state save_state_on_train_end", FLAG, ignored=STATE),
    *rows("save_last_n_epochs_state save_last_n_steps_state", int, ignored=STATE),
    *rows("resume", str, refused=RESUME),
    *rows("huggingface_repo_id", str, refused=UPLOAD),
    *rows("save_state_to_huggingface resume_from_huggingface", FLAG, refused=UPLOAD),
    *rows(
        "huggingface_repo_type huggingface_path_in_repo huggingface_token huggingface_repo_visibility",
        str,
        ignored=UPLOADS,
    ),
    *rows("async_upload", FLAG, ignored=UPLOADS),
    # Previews, logs, validation
    *rows("sample_every_n_steps sample_every_n_epochs", int, to="samples.every, samples.every_epochs"),
    *rows("sample_at_first", FLAG, ignored=FIRST),
    *rows("sample_prompts", str, to="samples.prompts"),
    *rows(
        "logging_dir log_prefix log_tracker_name log_tracker_config wandb_run_name wandb_api_key console_log_file",
        str,
        ignored=LOGS,
    ),
    *rows("log_with", str, ignored=LOGS, choices="tensorboard wandb all"),
    *rows("log_config console_log_simple", FLAG, ignored=LOGS),
    *rows("console_log_level", str, ignored=LOGS, choices="DEBUG INFO WARNING ERROR CRITICAL"),
    *rows("validation_split", float, 0.0, to="data.validation_split"),
    *rows("validation_seed", int, ignored=BY_CONTENT),
    *rows("validate_every_n_steps validate_every_n_epochs", int, to="training.validate_every"),
    *rows("max_validation_steps", int, ignored=ALL_HELD_OUT),
    # Images and captions
    *rows("train_data_dir reg_data_dir in_json", str, to="data.folders"),
    *rows("dataset_config", Path, to="data"),
    *rows("resolution", str, to="data.resolution"),
    *rows("shuffle_caption", FLAG, to="data.shuffle_tags"),
    *rows("caption_separator", str, ",", to="data.caption_separator"),
    *rows("caption_extension", str, ".caption", to="the caption files of folders"),
    *rows("caption_extention", str, to="the caption files of folders"),
    *rows("keep_tokens", int, 0, to="data.keep_tokens"),
    *rows("keep_tokens_separator", str, "", to="data.keep_tokens_separator"),
    *rows("enable_wildcard", FLAG, to="data.wildcards"),
    *rows("caption_prefix", str, to="data.caption_prefix"),
    *rows("caption_suffix", str, to="data.caption_suffix"),
    *rows("color_aug", FLAG, to="data.color_augment"),
    *rows("flip_aug", FLAG, to="data.flip"),
    *rows("random_crop", FLAG, to="data.random_crop"),
    *rows("enable_bucket", FLAG, to="data.step, data.min_side, data.max_side"),
    *rows("min_bucket_reso", int, 256, to="data.min_side"),
    *rows("max_bucket_reso", int, 1024, to="data.max_side"),
    *rows("bucket_reso_steps", int, 64, to="data.step"),
    *rows("bucket_no_upscale", FLAG, to="data.upscale"),
    *rows("caption_dropout_rate", float, 0.0, to="data.caption_dropout"),
    *rows("caption_dropout_every_n_epochs", int, 0, to="data.caption_dropout_epochs"),
    *rows("caption_tag_dropout_rate", float, 0.0, to="data.tag_dropout"),
    *rows("dataset_repeats", int, 1, to="repeats of folders"),
    *rows("secondary_separator", str, refused=SECONDARY),
    *rows("face_crop_aug_range", str, refused=FACES),
    *rows("token_warmup_step", float, 0, refused=TOKEN_WARMUP),
    *rows("token_warmup_min", int, 1, ignored=UNUSED_WARMUP),
    *rows(
        "resize_interpolation", str, refused=INTERPOLATION, choices="lanczos nearest bilinear linear bicubic cubic area"
    ),
    *rows("dataset_class", str, refused=CLASS),
    *rows("debug_dataset", FLAG, refused=DEBUG),
    *rows("weighted_captions", FLAG, refused=WEIGHTED),
    # The command itself
    *rows("config_file", str, to="these options"),
    *rows("output_config", FLAG, refused=OUTPUT_CONFIG),
    *rows("deepspeed", FLAG, refused=ONE_GPU),
    *rows("zero_stage", int, 2, ignored=NO_DEEPSPEED, choices="0 1 2 3"),
    *rows("offload_optimizer_device offload_param_device", str, ignored=NO_DEEPSPEED, choices="cpu nvme"),
    *rows("offload_optimizer_nvme_path offload_param_nvme_path", str, ignored=NO_DEEPSPEED),
    *rows("zero3_init_flag zero3_save_16bit_model fp16_master_weights_and_gradients", FLAG, ignored=NO_DEEPSPEED),
    *rows("ddp_timeout", int, ignored=ONE),
    *rows("ddp_gradient_as_bucket_view ddp_static_graph", FLAG, ignored=ONE),
)
BY_NAME = {row.name: row for row in TABLE}


def markdown() -> str:
    """The table for docs/kohya.md."""
    lines = ["| option | default | here |", "| --- | --- | --- |"]
    for row in TABLE:
        here = f"`{row.to}`" if "." in row.to else row.to
        here = here or (f"ignored: {row.ignored}" if row.ignored else f"refused: {row.refused}")
        default = "" if row.default is None or row.default is False else f"`{row.default!r}`"
        lines.append(f"| `--{row.name}` | {default} | {here} |")
    return "\n".join(lines)
