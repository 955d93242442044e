"""Recognize a checkpoint from its keys alone, before any tensor is read.

`kind` names what the file is, `adapter_kind` what an adapter is, `models_in` lists which of the four models the file is
meant to hold, and `without_prefix` selects one model's keys: it strips the prefix of an all-in-one file and leaves the
file's other models out. A file that does not fit is refused, and the message names what it is. Model sizes:
fluxq/formats/checkpoint/sizes.py.
"""

import re
from collections.abc import Iterable, Sequence
from functools import cache, lru_cache
from pathlib import Path

from fluxq.model.config import AutoEncoderConfig, FluxConfig

from .files import listed, printable, refuse
from .keys import autoencoder_diffusers_shapes, flux_diffusers_shapes
from .shapes import autoencoder_shapes, clip_shapes, flux_shapes, t5_shapes

FLUX = "a FLUX.1 transformer"
AUTOENCODER = "a FLUX.1 autoencoder"
CLIP = "a CLIP text encoder"
T5 = "a T5 text encoder"
LORA = "a LoRA"
DIFFUSERS_FLUX = "a FLUX.1 transformer in diffusers' layout"
OPENCLIP = "a CLIP text encoder in OpenCLIP's layout"
PART = "a part of"
DIFFUSERS_OTHER = "a model in diffusers' layout (an autoencoder or a UNet)"

EXAMPLES = {
    FLUX: "flux1-dev.safetensors or flux1-schnell.safetensors",
    AUTOENCODER: "ae.safetensors",
    CLIP: "clip_l.safetensors",
    T5: "t5xxl_fp16.safetensors",
}

FLUX_PREFIXES = ("", "model.diffusion_model.", "diffusion_model.", "model.")
AUTOENCODER_PREFIXES = ("", "vae.")
CLIP_PREFIXES = ("", "text_model.", "text_encoders.clip_l.transformer.text_model.", "text_encoders.clip_l.transformer.")
T5_PREFIXES = ("", "text_encoders.t5xxl.transformer.")

# The keys, under one of the prefixes, that show that a file is meant to hold the model, in either layout.
MARKERS = {
    FLUX: (FLUX_PREFIXES, r"(double|single)_blocks\.\d|single_transformer_blocks\.\d"),
    AUTOENCODER: (AUTOENCODER_PREFIXES, r"decoder\.up(_blocks)?\.\d"),
    CLIP: (CLIP_PREFIXES, r"embeddings\.position_embedding\.|transformer\.resblocks\.\d"),
    T5: (T5_PREFIXES, r"encoder\.block\.\d"),
}

# Keys allowed next to a model that has a prefix: the other models of an all-in-one file, and CLIP's image encoder.
NEIGHBORS = re.compile(
    r"(model|diffusion_model|vae|text_encoders|first_stage_model|cond_stage_model|conditioner"
    r"|vision_model|visual_projection|text_projection|logit_scale)(\.|$)"
)

# Adapters that are not plain LoRAs, recognized by a key that only they have. LyCORIS, PEFT and ComfyUI name them.
OTHER_ADAPTERS = {
    r"\.lokr_(w[12]|t2)": "a LoKr (LyCORIS)",
    r"\.hada_(w[12]|t[12])": "a LoHa (LyCORIS)",
    r"\.(dora_scale|lora_magnitude_vector)\b": "a DoRA",
    r"\.boft_[Rs]\b": "a BOFT",
    r"\.(oft_blocks|oft_diag|oft_[RrSs])\b": "an OFT or BOFT",
    r"\.(on_input|ia3_l)\b": "an (IA)^3",
    r"\.[ab][12]\.weight$": "a GLoRA (LyCORIS)",
    r"\.(lora_E|ranknum)\b": "an AdaLoRA",
    r"\.vera_(lambda_[bd]|[AB])\b": "a VeRA",
    r"\.(fourierft_spectrum|hra_u|bone_block|randlora_|vblora_)": "a FourierFT, HRA, Bone, RandLora or VB-LoRA (PEFT)",
    r"\.lora_mid\.": "a LoCon with a third factor",
    r"\.lora_B(\.\w+)?\.bias$": "a LoRA that also changes biases, as BFL's control LoRAs (Canny, Depth) do",
    r"\.(set_weight|reshape_weight)$": "an adapter that replaces whole tensors (.set_weight)",
    r"\.(diff|diff_b|w_norm|b_norm)$": "an adapter that also changes whole tensors (.diff, .diff_b, norms)",
}

# The first pattern that matches any key decides, so special cases come before the models they resemble.
KINDS = {
    r"\.(qweight|wscales)$": "a nunchaku (SVDQuant) file",
    **OTHER_ADAPTERS,
    r"^(lora|lycoris)_|^base_model\.model\.|\.lora_(A|B|up|down)\b|[._]lora\d?\.(up|down)\.": LORA,
    r"^(clip_[lg]|t5xxl|emb_params)$|^(bundle_emb|string_to_param)\.": "a textual inversion (a word for prompts)",
    r"(^|\.)distilled_guidance_layer\.": "Chroma (a different model from FLUX.1)",
    r"(^|\.)(double_stream_modulation|single_stream_modulation)": "FLUX.2 (a different model from FLUX.1)",
    r"\.weight(\._data|\._scale|_qdata)$": "a file quantized by quanto or torchao",
    r"(^|\.)(controlnet_blocks|controlnet_x_embedder|input_hint_block)\.": "a ControlNet",
    r"(^|[._])ip_adapter[._]|^image_proj\.": "an IP-Adapter",
    r"^redux_(up|down)\.": "FLUX.1 Redux (which turns images into prompts)",
    r"^pulid_": "PuLID (which puts a face into images)",
    r"(^|\.)txt_in\.individual_token_refiner\.": "HunyuanVideo (a different model from FLUX.1)",
    r"(^|\.)(double_blocks|single_blocks)\.\d": FLUX,
    r"(^|\.)single_transformer_blocks\.\d": DIFFUSERS_FLUX,
    r"(^|\.)(input_blocks|label_emb|time_embedding)\.": "a Stable Diffusion model (1.x, 2.x or XL)",
    r"(^|\.)joint_blocks\.\d": "Stable Diffusion 3",
    r"(^|\.)transformer_blocks\.\d+\.(img|txt)_mod\.": "Qwen-Image (a different model from FLUX.1)",
    r"(^|\.)blocks\.\d+\.cross_attn\.": "a video model such as Wan",
    r"(^|\.)cap_embedder\.": "Lumina 2 or Z-Image (different models from FLUX.1)",
    r"(^|\.)(quant_conv|post_quant_conv)\.": "the autoencoder of another model (Stable Diffusion or FLUX.2)",
    r"(^|\.)(mid_block|down_blocks|up_blocks)\.": DIFFUSERS_OTHER,
    r"(^|\.)decoder\.up\.\d": AUTOENCODER,
    r"encoder\.block\.[1-9]\d*\.layer\.0\.SelfAttention\.relative_attention_bias": "UMT5 (a different model from T5)",
    r"\.SelfAttention\.|\.DenseReluDense\.": T5,
    r"(^|\.)resblocks\.\d": OPENCLIP,
    r"(^|\.)(?<!vision_model\.)embeddings\.position_embedding\.": CLIP,
    r"(^|\.)vision_model\.": "an image encoder (SigLIP or CLIP's)",
    r"^(encoder|decoder)\.(layers\.)?\d+\.": "a tiny autoencoder for previews (TAESD)",
    r"^blk\.\d+\.attn_|^(model\.)?layers\.\d+\.(self_attn|mlp)\.": "a language model",
}


def models_in(keys: Iterable[str]) -> list[str]:
    """Which of the four models a file with these keys is meant to hold, complete or not; none for a LoRA."""
    keys = tuple(keys)
    return [] if adapter_kind(keys) else [wanted for wanted in MARKERS if _prefixes(keys, wanted)]


def kind(keys: Iterable[str]) -> str:
    """What a file with these keys is, as a phrase for messages."""
    return _kind(tuple(keys))


@lru_cache(maxsize=16)  # a run looks at the same few headers dozens of times
def _kind(keys: tuple[str, ...]) -> str:
    for pattern, name in KINDS.items():
        if any(re.search(pattern, key) for key in keys):
            return name
    return _nearest(keys) if keys else "empty (it has no tensors)"


def adapter_kind(keys: Iterable[str]) -> str | None:
    """What an adapter with these keys is: LORA, if it is a plain one, or another kind; None if it is not an adapter."""
    found = kind(keys)
    return found if found == LORA or found in OTHER_ADAPTERS.values() else None


def without_prefix(keys: Iterable[str], wanted: str, source: str | Path) -> dict[str, str]:
    """Stripped name -> key, for all keys under the prefix of the model `wanted`.

    Raises WrongRequest if the model occurs under no known prefix or under several, or if the keys are not `wanted`.
    """
    keys = tuple(keys)
    present = _prefixes(keys, wanted)
    if len(present) > 1:
        refuse(source, f"holds {wanted} twice, under the prefixes {' and '.join(map(repr, present))}", "remove one")
    prefix = present[0] if present else ""
    names = {key.removeprefix(prefix): key for key in keys if key.startswith(prefix)}
    if (actual := kind(names)) != wanted:
        refuse(source, f"is {actual}, not {wanted}", f"use {EXAMPLES[wanted]}")
    if not present:
        refuse(source, f"is {wanted} under an unknown prefix ({printable(keys[0])})", f"use {EXAMPLES[wanted]}")
    strange = [printable(key) for key in keys if not key.startswith(prefix) and not NEIGHBORS.match(key)]
    if strange:
        refuse(source, f"is {wanted} with extra tensors: {listed(unexpected=strange)}", f"use {EXAMPLES[wanted]}")
    return names


@lru_cache(maxsize=64)
def _prefixes(keys: tuple[str, ...], wanted: str) -> list[str]:
    prefixes, marker = MARKERS[wanted]
    return [prefix for prefix in prefixes if any(re.match(f"{re.escape(prefix)}({marker})", key) for key in keys)]


def _nearest(keys: Sequence[str]) -> str:
    """What a file is that no pattern matches: a part of the model that shares the most names with `keys`, ignoring
    block numbers, or something else that is closest to it.
    """
    own = _by_unnumbered(keys)
    common, wanted = max(((len(own.keys() & names), wanted) for wanted, names in _templates().items()))
    if common == 0:
        return f"a model that fluxq does not know (its first key is {printable(keys[0])})"
    names = _templates()[wanted]
    missing = [name for unnumbered, name in names.items() if unnumbered not in own]
    strange = [printable(key) for unnumbered, key in own.items() if unnumbered not in names]
    if not strange:
        return f"{PART} {wanted}, without {listed(tensors=missing)}"
    return f"a model that fluxq does not know (closest to {wanted}: {listed(missing=missing, unexpected=strange)})"


@cache
def _templates() -> dict[str, dict[str, str]]:
    """For each model and layout: name without block numbers -> name, for every tensor of the public file."""
    flux, autoencoder = FluxConfig.dev(), AutoEncoderConfig()
    clip = {"vocab_size": 1, "hidden_size": 1, "intermediate_size": 1, "num_hidden_layers": 1}
    t5 = {"vocab_size": 1, "d_model": 1, "d_ff": 1, "d_kv": 1, "num_heads": 1, "num_layers": 1}
    shapes = {
        FLUX: flux_shapes(flux),
        DIFFUSERS_FLUX: flux_diffusers_shapes(flux),
        AUTOENCODER: autoencoder_shapes(autoencoder),
        f"{AUTOENCODER} in diffusers' layout": autoencoder_diffusers_shapes(autoencoder),
        CLIP: clip_shapes(clip | {"max_position_embeddings": 1}),
        T5: t5_shapes(t5 | {"relative_attention_num_buckets": 1}),
    }
    return {wanted: _by_unnumbered(own) for wanted, own in shapes.items()}


def _by_unnumbered(keys: Iterable[str]) -> dict[str, str]:
    """Name without block numbers -> the first of `keys` with that name."""
    names: dict[str, str] = {}
    for key in keys:
        names.setdefault(_unnumbered(key), key)
    return names


def _unnumbered(key: str) -> str:
    return re.sub(r"\.\d+\.", ".#.", key.removeprefix("text_model."))
