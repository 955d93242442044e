"""What a checkpoint is, told from its keys alone, before any tensor is read.

`kind` says it in words, `meant` which of the four models it means to hold, and `without_prefix` which of its keys are
that model's: prefixes of all-in-one files are stripped, the other models of such a file left out. Whatever does not fit
is refused by the name of what it is. How large the models are: fluxq/formats/checkpoint/sizes.py.
"""

import re
from collections.abc import Iterable
from functools import cache
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

# What shows, under one of the prefixes, that a file means to hold the model, in either layout.
MARKERS = {
    FLUX: (FLUX_PREFIXES, r"(double|single)_blocks\.\d|single_transformer_blocks\.\d"),
    AUTOENCODER: (AUTOENCODER_PREFIXES, r"decoder\.up(_blocks)?\.\d"),
    CLIP: (CLIP_PREFIXES, r"embeddings\.position_embedding\.|transformer\.resblocks\.\d"),
    T5: (T5_PREFIXES, r"encoder\.block\.\d"),
}

# What may lie beside a model that has a prefix: the other models of an all-in-one file, and CLIP's image side.
NEIGHBORS = re.compile(
    r"(model|diffusion_model|vae|text_encoders|first_stage_model|cond_stage_model|conditioner"
    r"|vision_model|visual_projection|text_projection|logit_scale)(\.|$)"
)

# The first pattern that is found in any key names the file, so the special cases come before the models they resemble.
KINDS = {
    r"\.(qweight|wscales)$": "a nunchaku (SVDQuant) file",
    r"^(lora|lycoris)_|\.lora_(A|B|up|down)\b|[._]lora\d?\.(up|down)\.": LORA,
    r"(^|\.)distilled_guidance_layer\.": "Chroma, which is another model than FLUX.1",
    r"(^|\.)(double_stream_modulation|single_stream_modulation)": "FLUX.2, which is another model than FLUX.1",
    r"\.weight(\._data|\._scale|_qdata)$": "a file that quanto or torchao has quantized",
    r"(^|\.)(controlnet_blocks|controlnet_x_embedder|input_hint_block)\.": "a ControlNet",
    r"(^|[._])ip_adapter[._]|^image_proj\.": "an IP-Adapter",
    r"^redux_(up|down)\.": "FLUX.1 Redux, which makes prompts of images",
    r"^pulid_": "PuLID, which puts a face into images",
    r"(^|\.)txt_in\.individual_token_refiner\.": "HunyuanVideo, which is another model than FLUX.1",
    r"(^|\.)(double_blocks|single_blocks)\.\d": FLUX,
    r"(^|\.)single_transformer_blocks\.\d": DIFFUSERS_FLUX,
    r"(^|\.)(input_blocks|label_emb|time_embedding)\.": "a Stable Diffusion model (1.x, 2.x or XL)",
    r"(^|\.)joint_blocks\.\d": "Stable Diffusion 3",
    r"(^|\.)transformer_blocks\.\d+\.(img|txt)_mod\.": "Qwen-Image, which is another model than FLUX.1",
    r"(^|\.)blocks\.\d+\.cross_attn\.": "a video model such as Wan",
    r"(^|\.)cap_embedder\.": "Lumina 2 or Z-Image, which are other models than FLUX.1",
    r"(^|\.)(quant_conv|post_quant_conv)\.": "the autoencoder of another model (Stable Diffusion or FLUX.2)",
    r"(^|\.)(mid_block|down_blocks|up_blocks)\.": DIFFUSERS_OTHER,
    r"(^|\.)decoder\.up\.\d": AUTOENCODER,
    r"encoder\.block\.[1-9]\d*\.layer\.0\.SelfAttention\.relative_attention_bias": "UMT5, another model than T5",
    r"\.SelfAttention\.|\.DenseReluDense\.": T5,
    r"(^|\.)resblocks\.\d": OPENCLIP,
    r"(^|\.)embeddings\.position_embedding\.": CLIP,
    r"^(encoder|decoder)\.(layers\.)?\d+\.": "a tiny autoencoder (TAESD), made for previews",
    r"^blk\.\d+\.attn_": "a language model",
}


def meant(keys: Iterable[str]) -> list[str]:
    """Which of the four models a file with these keys means to hold, were they whole or not; none in a LoRA."""
    keys = list(keys)
    return [] if kind(keys) == LORA else [wanted for wanted in MARKERS if _prefixes(keys, wanted)]


def kind(keys: Iterable[str]) -> str:
    """What a file with these keys is, in words for a message."""
    keys = list(keys)
    for pattern, name in KINDS.items():
        if any(re.search(pattern, key) for key in keys):
            return name
    return f"no model that fluxq knows ({_nearest(keys)})" if keys else "empty: it has no tensors"


def without_prefix(keys: Iterable[str], wanted: str, source: str | Path) -> dict[str, str]:
    """Stripped name -> key, of all keys under the one prefix under which the marker of `wanted` occurs in any key.

    Raises WrongRequest if that is none or several, or if what is there is not `wanted`.
    """
    keys = list(keys)
    present = _prefixes(keys, wanted)
    if len(present) > 1:
        refuse(source, f"holds {wanted} twice, under the prefixes {' and '.join(map(repr, present))}", "keep one")
    prefix = present[0] if present else ""
    names = {key.removeprefix(prefix): key for key in keys if key.startswith(prefix)}
    found = kind(names)
    if found != wanted:
        refuse(source, f"is {found}, where {wanted} is wanted", f"give {EXAMPLES[wanted]}")
    if not present:
        refuse(source, f"is {wanted} under an unknown prefix ({printable(keys[0])})", f"give {EXAMPLES[wanted]}")
    strange = [printable(key) for key in keys if not key.startswith(prefix) and not NEIGHBORS.match(key)]
    if strange:
        refuse(source, f"is {wanted} with tensors beside it: {listed(unexpected=strange)}", f"give {EXAMPLES[wanted]}")
    return names


def _prefixes(keys: list[str], wanted: str) -> list[str]:
    prefixes, marker = MARKERS[wanted]
    return [prefix for prefix in prefixes if any(re.match(f"{re.escape(prefix)}({marker})", key) for key in keys)]


def _nearest(keys: list[str]) -> str:
    """Which model has the most names in common with `keys`, blocks' numbers aside, and the first that differ."""
    own = _by_unnumbered(keys)
    common, wanted = max(((len(own.keys() & names), wanted) for wanted, names in _templates().items()))
    if common == 0:
        return f"its first key is {printable(keys[0])}"
    names = _templates()[wanted]
    missing = [name for unnumbered, name in names.items() if unnumbered not in own]
    strange = [printable(key) for unnumbered, key in own.items() if unnumbered not in names]
    return f"nearest to {wanted}: {listed(missing=missing, unexpected=strange)}"


@cache
def _templates() -> dict[str, dict[str, str]]:
    """For each model and layout the names of the public file's tensors, by what they are without numbers."""
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
    """The first of `keys` that is each without its number."""
    found: dict[str, str] = {}
    for key in keys:
        found.setdefault(_unnumbered(key), key)
    return found


def _unnumbered(key: str) -> str:
    return re.sub(r"\.\d+\.", ".#.", key)
