"""Every key of an ai-toolkit job that trains a LoRA of FLUX.1: its default there, and what becomes of it here.

Read in ostris/ai-toolkit at 27a03a91f23eb1b757d5ec2e80ee3e129cfcc350 (toolkit/config_modules.py and what uses it).
A row is one of three things: `to` names the settings that it becomes, `ignored` says why it is not needed here,
`refused` says why a job that sets it to more than its default cannot be imported. job.py does what `to` says.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """A key, with the section that it is in: "train.lr". Those of a dataset are called like "datasets.num_repeats"."""

    name: str
    default: Any = None
    to: str = ""
    ignored: str = ""
    refused: str = ""

    def is_default(self, value: Any) -> bool:
        """Whether `value` asks for no more than leaving the key out, as null does, and false where it is not true."""
        return value is None or value == self.default or (self.default is not True and value in (False, "", [], {}))


def rows(section: str, names: str, default: Any = None, **about: str) -> list[Row]:
    """A row for each of the names in `section`, "" for the process itself."""
    return [Row(f"{section}.{name}".lstrip("."), default, **about) for name in names.split()]


LOGS = "the losses are in log.jsonl and loss.png of the run"
CACHED = "images and captions are always encoded ahead and kept"
ALONE = "text encoders are loaded alone, before the transformer"
FITS = "fluxq chooses what fits into the GPU's memory; --vram limits it"
BF16 = "fluxq computes in bf16, with LoRA weights in fp32"
KERNELS = "fluxq has kernels of its own, with fused attention"
KNOWN = "fluxq knows a model by its file"
FLOW = "FLUX.1 is trained and sampled along straight lines, in Euler steps"
MICRO_STEPS = (
    "with it ai-toolkit counts train.steps and all other steps before they are accumulated; write "
    "gradient_accumulation instead, and divide the steps by it"
)
NO_CONVOLUTIONS = "FLUX.1 has no convolutions"
UPLOAD = "fluxq uploads nothing"
ANOTHER = "fluxq trains LoRAs of FLUX.1 and nothing else"
NO_CONTROL = "fluxq trains without control images"
NO_NOISE = "fluxq does not change noise, latents or targets in that way"
NO_LOSS = "fluxq has no such loss"
VIDEO = "it is for videos and sound"
FIRST = "previews begin after some steps; fluxq sample shows what the model draws without a LoRA"
SHARED = "previews differ only in prompt and seed; use fluxq sample for others"
LINEAR = "fluxq does not weigh noise levels by its curve; timestep_type: sigmoid trains more at the same ones"

TABLE: tuple[Row, ...] = (
    *rows("", "name", to="output.name"),
    *rows("", "training_folder", "output", to="output.out"),
    *rows("", "trigger_word", to="data.trigger"),
    *rows("", "training_seed", to="training.seed"),
    *rows("", "type", to="training"),
    *rows("", "device", ignored="CUDA_VISIBLE_DEVICES chooses the GPU"),
    *rows("", "performance_log_every sqlite_db_path log_dir torch_profiler", ignored=LOGS),
    *rows("logging", "log_every verbose use_wandb use_ui_logger project_name run_name", ignored=LOGS),
    *rows("", "guidance embedding decorator adapter do_lorm first_sample slider", refused=ANOTHER),
    # Model
    *rows("model", "name_or_path", to="model.models"),
    *rows("model", "vae_path", to="model.ae"),
    *rows("model", "te_name_or_path", ignored="for FLUX.1 ai-toolkit takes T5 from the model's own folder"),
    *rows("model", "lora_path", to="model.base_loras"),
    *rows("model", "attn_masking", False, to="model.text_mask"),
    *rows("model", "quantize", False, to="model.format"),
    *rows("model", "qtype", "qfloat8", to="model.format"),
    *rows("model", "is_flux arch", ignored=KNOWN),
    *rows("model", "dtype vae_dtype te_dtype", ignored=BF16),
    *rows("model", "quantize_te qtype_te te_device vae_device text_encoder_bits", ignored=ALONE),
    *rows("model", "low_vram auto_memory layer_offloading layer_offloading_transformer_percent", ignored=FITS),
    *rows("model", "layer_offloading_text_encoder_percent quantize_kwargs", ignored=FITS),
    *rows("model", "compile block_compile compile_mode compile_fullgraph compile_dynamic", ignored=KERNELS),
    *rows("model", "cache_size_limit", ignored=KERNELS),
    *rows("model", "split_model_over_gpus", refused="fluxq trains on one GPU"),
    *rows("model", "split_model_other_module_param_count_scale", ignored="it is for split_model_over_gpus"),
    *rows(
        "model",
        "assistant_lora_path",
        refused="fluxq has no LoRA that is there only in training; merge the adapter with model.lora_path",
    ),
    *rows("model", "extras_name_or_path inference_lora_path unconditional_lora_path unet_path", refused=KNOWN),
    *rows("model", "is_v2 is_v3 is_xl is_pixart is_pixart_sigma is_auraflow is_lumina2 is_ssd", refused=ANOTHER),
    *rows("model", "is_vega is_v_pred use_flux_cfg refiner_name_or_path in_context", refused=ANOTHER),
    *rows("model", "accuracy_recovery_adapter model_kwargs model_paths", refused=ANOTHER),
    # Network
    *rows("network", "type", "lora", to="lora.targets"),
    *rows("network", "linear rank", 4, to="lora.rank, lora.alpha"),
    *rows("network", "linear_alpha alpha", ignored="ai-toolkit's LoRAs of FLUX.1 have alpha = rank, whatever it says"),
    *rows("network", "conv conv_alpha", ignored=NO_CONVOLUTIONS),
    *rows("network", "dropout", to="lora.inner_dropout"),
    *rows("network", "network_kwargs.only_if_contains network_kwargs.ignore_if_contains", to="lora.targets"),
    *rows("network", "pretrained_lora_path", to="lora.from_lora"),
    *rows("network", "transformer_only", True, refused="only the blocks of the transformer are trained"),
    *rows("network", "lokr_full_rank lokr_factor old_lokr_format split_multistage_loras", ignored="it is for LoKr"),
    *rows("network", "layer_offloading", ignored=FITS),
    *rows("network", "lorm all_layers", refused=ANOTHER),
    # Datasets
    *rows("datasets", "folder_path dataset_path", to="data.folders.path"),
    *rows("datasets", "resolution", 512, to="data.folders.resolution"),
    *rows("datasets", "num_repeats", 1, to="data.folders.repeats"),
    *rows("datasets", "trigger_word", to="data.folders.trigger"),
    *rows("datasets", "default_caption", to="data.folders.class_tokens"),
    *rows("datasets", "caption_ext caption_type", "txt", ignored="captions are read from .txt and .caption files"),
    *rows("datasets", "caption_dropout_rate", 0.0, to="data.folders.caption_dropout"),
    *rows("datasets", "shuffle_tokens", False, to="data.folders.shuffle_tags"),
    *rows("datasets", "keep_tokens", 0, to="data.folders.keep_tokens"),
    *rows("datasets", "token_dropout_rate", 0.0, to="data.folders.tag_dropout"),
    *rows("datasets", "flip_x", False, to="data.folders.flip"),
    *rows("datasets", "random_crop", False, to="data.folders.random_crop"),
    *rows("datasets", "batch_size", to="data.folders.batch"),
    *rows("datasets", "is_reg", False, to="data.folders.regularization"),
    *rows("datasets", "mask_path alpha_mask", to="data.folders.masks"),
    *rows("datasets", "mask_min_value", 0.0, to="data.folders.mask_outside"),
    *rows("datasets", "bucket_tolerance", 64, to="data.step"),
    *rows("datasets", "cache_latents cache_latents_to_disk cache_tensors_to_disk", ignored=CACHED),
    *rows("datasets", "cache_text_embeddings load_image_when_caching_latents num_workers", ignored=CACHED),
    *rows("datasets", "prefetch_factor cache_latents_num_workers fast_image_size debug", ignored=CACHED),
    *rows("datasets", "num_frames", 1, refused=VIDEO),
    *rows("datasets", "do_i2v do_audio auto_frame_count", refused=VIDEO),
    *rows("datasets", "shrink_video_to_frames fps trim_auto_frame_count_tail", ignored=VIDEO),
    *rows("datasets", "audio_preserve_pitch audio_normalize", ignored=VIDEO),
    *rows("datasets", "type", "image", refused=ANOTHER),
    *rows("datasets", "buckets", True, refused="images keep their shape; set it to true"),
    *rows("datasets", "scale network_weight loss_multiplier", 1.0, refused=NO_LOSS),
    *rows(
        "datasets",
        "random_scale flip_y augments augmentations standardize_images square_crop invert_mask",
        refused=NO_NOISE,
    ),
    *rows("datasets", "shuffle_augmentations replay_transforms", ignored="it is for augmentations"),
    *rows("datasets", "prior_reg use_short_captions random_triggers replacements extra_values", refused=NO_LOSS),
    *rows("datasets", "random_triggers_max", 1, ignored="it is for random_triggers"),
    *rows("datasets", "control_path control_path_1 control_path_2 control_path_3 controls", refused=NO_CONTROL),
    *rows("datasets", "inpaint_path unconditional_path clip_image_path control_from_same_folder", refused=NO_CONTROL),
    *rows("datasets", "num_controls_from_same_folder control_transparent_color", ignored="it is for control images"),
    *rows("datasets", "full_size_control_images guidance_type", ignored="it is for control images"),
    # Training
    *rows("train", "steps", 1000, to="training.steps"),
    *rows("train", "batch_size", 1, to="training.batch"),
    *rows("train", "gradient_accumulation", 1, to="training.accumulate"),
    *rows("train", "gradient_accumulation_steps", 1, refused=MICRO_STEPS),
    *rows("train", "lr unet_lr", 1e-6, to="training.learning_rate"),
    *rows("train", "optimizer", "adamw", to="training.optimizer"),
    *rows("train", "optimizer_params", to="training.optimizer_args, training.weight_decay"),
    *rows("train", "lr_scheduler", "constant", to="training.schedule"),
    *rows("train", "lr_scheduler_params", to="training.warmup, training.schedule_floor"),
    *rows("train", "max_grad_norm", 1.0, to="training.clip"),
    *rows("train", "loss_type", "mse", to="training.loss"),
    *rows("train", "timestep_type", "sigmoid", to="training.timesteps"),
    *rows("train", "content_or_style", "balanced", refused="fluxq draws no noise levels by cubes; keep balanced"),
    *rows("train", "linear_timesteps linear_timesteps2", refused=LINEAR),
    *rows("train", "next_sample_timesteps", ignored="it is for timestep_type: next_sample"),
    *rows("train", "min_denoising_steps max_denoising_steps", to="training.min_timestep, training.max_timestep"),
    *rows("train", "num_train_timesteps", 1000, refused="noise levels are drawn without steps"),
    *rows("train", "cfg_scale", 1.0, to="training.guidance"),
    *rows("train", "reg_weight", 1.0, to="data.folders.prior_weight"),
    *rows("train", "prompt_dropout_prob", 0.0, to="data.caption_dropout"),
    *rows("train", "ema_config.use_ema ema_config.ema_decay", to="lora.ema"),
    *rows("train", "ema_config.param_multiplier", 1.0, refused="fluxq's average is a plain one"),
    *rows("train", "ema_config.use_feedback", refused="fluxq's average is a plain one"),
    *rows("train", "diff_output_preservation diff_output_preservation_class", to="training.preserve_class"),
    *rows("train", "diff_output_preservation_multiplier", 1.0, to="training.preserve_weight"),
    *rows("train", "train_text_encoder", refused="ai-toolkit cannot train text encoders with FLUX.1; set it to false"),
    *rows(
        "train", "text_encoder_lr refiner_lr embedding_lr adapter_lr train_refiner", ignored="nothing else is trained"
    ),
    *rows("train", "train_unet", True, refused="the transformer is always trained"),
    *rows("train", "disable_sampling", False, to="samples.every"),
    *rows("train", "skip_first_sample force_first_sample", ignored=FIRST),
    *rows("train", "gradient_checkpointing do_paramiter_swapping paramiter_swapping_factor", ignored=FITS),
    *rows("train", "unload_text_encoder cache_text_embeddings", ignored=ALONE),
    *rows("train", "dtype", ignored=BF16),
    *rows("train", "xformers sdp attention_backend", ignored=KERNELS),
    *rows("train", "noise_scheduler", "flowmatch", ignored=FLOW),
    *rows("train", "switch_boundary_every", ignored="it is for models in stages"),
    *rows("train", "negative_prompt max_negative_prompts unconditional_prompt", ignored="it is for other models"),
    *rows("train", "start_step", refused="a run goes on where it stopped, with fluxq train --resume"),
    *rows("train", "bypass_guidance_embedding", refused="FLUX.1-dev is trained with its guidance; set it to false"),
    *rows("train", "train_turbo do_cfg do_random_cfg free_u adapter_assist_name_or_path", refused=ANOTHER),
    *rows("train", "noise_offset weight_jitter do_signal_correction_noise do_batch_noise_correction", refused=NO_NOISE),
    *rows("train", "random_noise_multiplier random_noise_shift do_signal_amplification", 0.0, refused=NO_NOISE),
    *rows("train", "img_multiplier noise_multiplier target_noise_multiplier latent_multiplier", 1.0, refused=NO_NOISE),
    *rows("train", "noisy_latent_multiplier optimal_noise_pairing_samples pred_scaler", 1, refused=NO_NOISE),
    *rows("train", "adaptive_scaling_factor standardize_images standardize_latents", refused=NO_NOISE),
    *rows("train", "dynamic_noise_offset force_consistent_noise blended_blur_noise match_noise_norm", refused=NO_NOISE),
    *rows("train", "min_snr_gamma snr_gamma learnable_snr_gos inverted_mask_prior correct_pred_norm", refused=NO_LOSS),
    *rows("train", "blank_prompt_preservation do_prior_divergence do_guidance_loss max_loss", refused=NO_LOSS),
    *rows("train", "do_differential_guidance do_fft_loss t0_loss_target target_norm_std", refused=NO_LOSS),
    *rows("train", "do_blank_stabilization latent_feature_extractor_path", refused=NO_LOSS),
    *rows("train", "diffusion_feature_extractor_path prompt_saturation_chance", refused=NO_LOSS),
    *rows(
        "train", "short_and_long_captions single_item_batching merge_network_on_save validation_config", refused=NO_LOSS
    ),
    *rows("train", "loss_target", "noise", refused=NO_LOSS),
    *rows(
        "train",
        "blank_prompt_preservation_multiplier inverted_mask_prior_multiplier differential_guidance_scale "
        "guidance_loss_target guidance_loss_schedule do_guidance_loss_cfg_zero max_cfg_scale audio_loss_multiplier",
        ignored="it is for a loss that this job must not have",
    ),
    # Previews
    *rows("sample", "prompts samples", to="samples.prompts"),
    *rows("sample", "sample_every", 100, to="samples.every"),
    *rows("sample", "width", 512, to="samples.width"),
    *rows("sample", "height", 512, to="samples.height"),
    *rows("sample", "guidance_scale", 7, to="samples.guidance"),
    *rows("sample", "sample_steps", 20, to="samples.steps"),
    *rows("sample", "seed", 0, to="samples.seed"),
    *rows("sample", "walk_seed", ignored="each preview has the seed of the one before it plus 1"),
    *rows("sample", "neg", ignored="it has no effect on FLUX.1 in ai-toolkit either"),
    *rows("sample", "sampler", ignored=FLOW),
    *rows("sample", "sample_start_step", ignored=FIRST),
    *rows("sample", "format network_multiplier guidance_rescale adapter_conditioning_scale", ignored=SHARED),
    *rows("sample", "refiner_start_at extra_values num_frames fps do_cfg_norm", ignored=SHARED),
    # Saves
    *rows("save", "save_every", 1000, to="output.save_every"),
    *rows("save", "max_step_saves_to_keep", 5, to="output.keep"),
    *rows("save", "dtype", ignored="a LoRA is saved in bf16"),
    *rows("save", "save_format", ignored="LoRAs are always safetensors files"),
    *rows("save", "push_to_hub", refused=UPLOAD),
    *rows("save", "hf_repo_id hf_private", ignored=UPLOAD),
)
BY_NAME = {row.name: row for row in TABLE}


def markdown() -> str:
    """The table of docs/import.md."""
    lines = ["| key | default | here |", "| --- | --- | --- |"]
    for row in TABLE:
        default = "" if row.default is None else f"`{json.dumps(row.default)}`"
        to = ", ".join(f"`{key}`" for key in row.to.split(", "))
        here = f"ignored: {row.ignored}" if row.ignored else f"refused: {row.refused}" if row.refused else to
        lines.append(f"| `{row.name}` | {default} | {here} |")
    return "\n".join(lines)
