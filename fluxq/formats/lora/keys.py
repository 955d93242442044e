"""Tables of how training programs name the tensors of a LoRA, and of keys that mark LoRAs for other models.

A key is a prefix, a module's path in the original (BFL) or diffusers' layout, with dots or underscores, and a suffix
that shows which of the adapter's tensors it is. A dialect is a prefix, a layout and a separator. Files of every program
are read by looking up a key's base in all dialects at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import NamedTuple

from fluxq.model.config import FluxConfig

from ..checkpoint.keys import module_split
from ..checkpoint.shapes import flux_shapes
from .algebra import Rows


class Dialect(NamedTuple):
    """Bases are prefix + path; paths are `original` (BFL) or diffusers', with dots replaced by `separator`."""

    name: str
    prefix: str
    original: bool
    separator: str


DIALECTS = (
    Dialect("kohya", "lora_unet_", True, "_"),
    Dialect("comfy", "diffusion_model.", True, "."),
    Dialect("original", "", True, "."),  # OneTrainer's ORIGINAL
    Dialect("peft", "base_model.model.", True, "."),  # fal's Kontext trainer
    Dialect("diffusers", "transformer.", False, "."),  # also ai-toolkit
    Dialect("peft", "base_model.model.", False, "."),
    Dialect("diffsynth", "", False, "."),
    Dialect("onetrainer", "lora_transformer_", False, "_"),  # its legacy files
    Dialect("lycoris", "lycoris_", False, "_"),  # SimpleTuner
)

# x-flux: attention only; in a double block, 1 is the image stream and 2 the text stream.
XLABS = {
    "double_blocks.{}.processor.qkv_lora1": "double_blocks.{}.img_attn.qkv",
    "double_blocks.{}.processor.proj_lora1": "double_blocks.{}.img_attn.proj",
    "double_blocks.{}.processor.qkv_lora2": "double_blocks.{}.txt_attn.qkv",
    "double_blocks.{}.processor.proj_lora2": "double_blocks.{}.txt_attn.proj",
    "single_blocks.{}.processor.qkv_lora": "single_blocks.{}.linear1",
    "single_blocks.{}.processor.proj_lora": "single_blocks.{}.linear2",
}

ROLES = {
    "down": r"\.(lora_down\.weight|lora_A(\.[^.]+)??(\.weight)?|lora(_linear_layer)?\.down\.weight|down\.weight)",
    "up": r"\.(lora_up\.weight|lora_B(\.[^.]+)??(\.weight)?|lora(_linear_layer)?\.up\.weight|up\.weight)",
    "alpha": r"\.alpha",
}
SPELLINGS = {"A/B": r"\.lora_[AB]\b", "down/up": r"\.lora_(down|up)\."}

CLIP_KEYS = (
    r"(lora_te1?_text_model_|text_encoder\.text_model\.|text_encoder\.|text_encoders\.clip_l\.transformer\.text_model\.)"
    r"encoder[._]layers[._](\d+)[._](self_attn[._][qkv]_proj|self_attn[._]out_proj|mlp[._]fc[12])"
)
CLIP_REST = r"(lora_te1?_|text_encoder\.|text_encoders\.clip_l\.(transformer\.)?)text_projection"
T5_KEYS = r"(lora_te[23]_|text_encoder_2\.|text_encoders\.t5xxl\.transformer\.)"
PEFT_TEXT = r"base_model\.model\.((text_model\.)?encoder\.layers|encoder\.block)\."  # a text encoder, saved by itself
EMBEDDINGS = r"bundle_emb\."  # OneTrainer's textual inversions

# LoRAs for other models, recognized by a key that FLUX.1's never have; the first match decides.
OTHER_MODELS = {
    # sd-scripts uses Stability's block names for XL, diffusers' for 1.x and 2.x
    r"lora_te2_text_model_|(input|output|middle)_blocks?[._]|(down|up|mid)_blocks?[._].*transformer_blocks[._][1-9]": (
        "Stable Diffusion XL"
    ),
    r"(down|up|mid)_blocks?[._]\d?.*(attentions|resnets|proj_in|transformer_blocks)": "Stable Diffusion 1.x or 2.x",
    r"joint_blocks[._]\d|transformer_blocks[._]\d+[._]attn2[._]": "Stable Diffusion 3",
    r"distilled_guidance_layer": "Chroma",
    r"(double|single)_stream_modulation|to_qkv_mlp_proj|ff(_context)?[._]linear_in": "FLUX.2",
    r"individual_token_refiner|double_blocks\.\d+\.(img|txt)_attn_": "HunyuanVideo",
    r"transformer_blocks[._]\d+[._](img|txt)_(mlp|mod)[._]": "Qwen-Image",
    r"(^|[._])blocks[._]\d+[._](self_attn|cross_attn|ffn)[._]": "Wan",
    r"(^|[._])layers[._]\d+[._](attention|feed_forward)[._]": "Lumina or Z-Image",
}
OTHER_ARCHITECTURES = {
    "chroma": "Chroma",
    "flux-2": "FLUX.2",
    "flux2": "FLUX.2",
    "stable-diffusion-xl": "Stable Diffusion XL",
    "sdxl": "Stable Diffusion XL",
    "stable-diffusion-v": "Stable Diffusion 1.x or 2.x",
    "stable-diffusion-3": "Stable Diffusion 3",
}


class KeyTarget(NamedTuple):
    """What a base refers to: these rows of a BFL module, in a file of `dialect`."""

    dialect: str
    module: str
    rows: Rows


@lru_cache(maxsize=4)
def places(config: FluxConfig) -> Mapping[str, KeyTarget]:
    """Base of a LoRA's key -> its place, in every dialect, for a transformer of these sizes."""
    table: dict[str, KeyTarget] = {}
    for module, out in matrices(config).items():
        pieces = split_rows(module, config)
        for dialect in DIALECTS:
            named = {module: ((0, out),)} if dialect.original else pieces
            for path, rows in named.items():
                table[dialect.prefix + path.replace(".", dialect.separator)] = KeyTarget(dialect.name, module, rows)
        if module.endswith(".linear1"):  # ComfyUI's name for the rows of q, k and v alone
            table[f"diffusion_model.{module}_qkv"] = KeyTarget("comfy", module, ((0, 3 * config.hidden_size),))
    for blocks, count in (("double", config.depth), ("single", config.depth_single_blocks)):
        for base, module in XLABS.items():
            if base.startswith(blocks):
                for index in range(count):
                    path = module.format(index)
                    rows = 3 * config.hidden_size if path.endswith("linear1") else matrices(config)[path]
                    table[base.format(index)] = KeyTarget("xlabs", path, ((0, rows),))
    return table


@lru_cache(maxsize=4)
def matrices(config: FluxConfig) -> Mapping[str, int]:
    """BFL module -> its number of rows, for all modules with a matrix."""
    return {key.removesuffix(".weight"): shape[0] for key, shape in flux_shapes(config).items() if len(shape) == 2}


def split_rows(module: str, config: FluxConfig) -> dict[str, Rows]:
    """diffusers module -> the rows of the BFL `module` that make it up, in its order."""
    rows: dict[str, Rows] = {}
    for name, start, end in module_split(module, config):
        rows[name] = (*rows.get(name, ()), (start, end))
    return rows


def role(key: str) -> tuple[str, str] | None:
    """(base, "down" | "up" | "alpha") of a LoRA's key; None for any other key."""
    for name, pattern in ROLES.items():
        if match := re.search(f"{pattern}$", key):
            return key[: match.start()], name
    return None


def clip_module(base: str) -> str | None:
    """The CLIP-L module that `base` names, spelled as in transformers 5; None for any other base."""
    match = re.fullmatch(CLIP_KEYS, base)
    if match is None:
        return None
    inner = re.sub(r"^(self_attn|mlp)_", r"\1.", match[3])
    return f"encoder.layers.{match[2]}.{inner}"


def other_model(keys: Iterable[str], metadata: Mapping[str, str]) -> str | None:
    """The model, other than FLUX.1, that a LoRA with these keys and metadata was made for; None if there is none."""
    if model := _first(OTHER_MODELS, keys):
        return model
    declared = " ".join(metadata.get(k, "") for k in ("modelspec.architecture", "ss_base_model_version")).lower()
    return next((name for word, name in OTHER_ARCHITECTURES.items() if word in declared), None)


def _first(table: Mapping[str, str], keys: Iterable[str]) -> str | None:
    """The name of the first pattern in `table` that matches any key."""
    keys = list(keys)
    return next((name for pattern, name in table.items() if any(re.search(pattern, key) for key in keys)), None)
