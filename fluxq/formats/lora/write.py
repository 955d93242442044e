"""Write LoRA files in the form that each program reads correctly, as found by testing the programs.

kohya      lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight, .lora_up.weight, .alpha: the original model's fused
           modules. The default, because ComfyUI, Forge, sd-scripts and diffusers all read it.
diffusers  transformer.transformer_blocks.0.attn.to_q.lora_A.weight, .lora_B.weight: fused modules are split, alpha /
           rank is folded into lora_B, and lower ranks are padded with zeros to one rank. There are no alpha tensors and
           no adapter metadata: some programs ignore one of them, others refuse a file with both.
comfy      diffusion_model.double_blocks.0.img_attn.qkv.lora_down.weight, .lora_up.weight, .alpha. Never lora_A with an
           alpha: diffusers would silently apply nothing.
peft       a folder for PeftModel and load_adapter: diffusers' tensors under base_model.model., and their settings.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fluxq.model.config import FluxConfig

from ..atomic import atomic_folder
from ..checkpoint.files import DTYPE_NAMES, refuse, write_safetensors
from .algebra import Adapter, padded, split
from .keys import split_rows
from .metadata import sshs_hashes
from .peft import PEFT_FILES, PEFT_METADATA

WRITTEN_DIALECTS = ("kohya", "diffusers", "comfy", "peft")
Adapters = Mapping[str, Adapter]


def save_lora(
    path: str | Path,
    adapters: Adapters,
    config: FluxConfig,
    dialect: str = "kohya",
    dtype: torch.dtype = torch.bfloat16,
    metadata: Mapping[str, str] | None = None,
    clip: Adapters | None = None,
) -> None:
    """Write a LoRA file: `adapters` by BFL module, `clip` by CLIP-L module, `metadata` plus the sshs_* hashes.

    alpha is always stored in fp32. For "peft", `path` is a new folder, and `clip` is not written. Raises WrongRequest,
    and writes nothing, if the path cannot be written or if a number is out of the range of `dtype`.
    """
    clip = clip or {}
    metadata = {key: value for key, value in (metadata or {}).items() if key != PEFT_METADATA}
    if dialect == "peft":
        tensors = _split(adapters, config, "base_model.model.", dtype)
    elif dialect == "diffusers":
        tensors = _split(adapters, config, "transformer.", dtype)
        tensors |= _one_rank({f"text_encoder.text_model.{module}": a for module, a in clip.items()}, dtype)
    elif dialect == "kohya":
        named = {f"lora_unet_{module.replace('.', '_')}": a for module, a in adapters.items()}
        named |= {f"lora_te1_text_model_{module.replace('.', '_')}": a for module, a in clip.items()}
        tensors = _with_alpha(named, dtype)
    else:
        named = {f"diffusion_model.{module}": a for module, a in adapters.items()}
        named |= {f"text_encoders.clip_l.transformer.text_model.{module}": a for module, a in clip.items()}
        tensors = _with_alpha(named, dtype)
    if overflow := next((key for key, tensor in tensors.items() if not tensor.isfinite().all()), None):
        what = f"was not written, because {overflow} has numbers out of the range of {DTYPE_NAMES[dtype]}"
        refuse(path, what, "choose a type with a wider range")
    if dialect == "peft":
        return _save_folder(Path(path), tensors, metadata)
    write_safetensors(path, tensors, metadata | sshs_hashes(tensors, metadata))


def _with_alpha(named: Adapters, dtype: torch.dtype) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, adapter in named.items():
        adapter = adapter.to(dtype)
        tensors[f"{name}.lora_down.weight"] = adapter.down
        tensors[f"{name}.lora_up.weight"] = adapter.up
        tensors[f"{name}.alpha"] = torch.tensor(adapter.alpha, dtype=torch.float32)  # bf16 would round 10.3 to 10.3125
    return tensors


def _split(adapters: Adapters, config: FluxConfig, prefix: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of all modules in diffusers' layout."""
    parts: dict[str, Adapter] = {}
    for module, adapter in adapters.items():
        parts |= split(adapter, split_rows(module, config))
    return _one_rank({f"{prefix}{name}": part for name, part in parts.items()}, dtype)


def _one_rank(named: Adapters, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of `named`, all padded to the highest rank, with alpha / rank folded into lora_B."""
    rank = max((adapter.rank for adapter in named.values()), default=0)
    tensors: dict[str, Tensor] = {}
    for name, adapter in named.items():
        adapter = padded(adapter, rank).folded().to(dtype)
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = adapter.down, adapter.up
    return tensors


def _save_folder(folder: Path, tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write the folder of a PEFT adapter, completely or not at all."""
    if folder.exists():
        refuse(folder, "already exists", "name a new folder")
    downs = [key for key in tensors if key.endswith(".lora_A.weight")]
    modules = [key.removeprefix("base_model.model.").removesuffix(".lora_A.weight") for key in downs]
    rank = tensors[downs[0]].shape[0]
    settings = {
        "peft_type": "LORA",
        "task_type": None,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": modules,  # whole paths: "proj_out" alone would also be the last layer's
        "inference_mode": True,
    }
    with atomic_folder(folder) as temporary:
        metadata = {**metadata, "format": "pt"}
        write_safetensors(temporary / PEFT_FILES[0], tensors, metadata | sshs_hashes(tensors, metadata))
        (temporary / PEFT_FILES[1]).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
