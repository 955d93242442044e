"""What a checkpoint holds, told from its keys and shapes alone, before any tensor is read.

For each of the four models: `*_keys` gives the names that the model uses, mapped to the file's own keys (prefixes of
all-in-one files stripped, aliases resolved, the other models of such a file left out), and `*_config` the sizes, once
every tensor has been found to be one of `shapes`. The same rules read the full-size files and the bundled toy. Whatever
does not fit is refused by the name of what it is. The other spelling, diffusers', is in `keys`.
"""

import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from fluxq.formats.files import listed, printable, refuse
from fluxq.formats.keys import autoencoder_diffusers_shapes, flux_diffusers_shapes
from fluxq.formats.shapes import autoencoder_shapes, flux_shapes
from fluxq.formats.shapes import clip_shapes as clip_shapes
from fluxq.formats.shapes import t5_shapes as t5_shapes
from fluxq.model.config import AutoEncoderConfig, FluxConfig

Shapes = Mapping[str, tuple[int, ...]]

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

# What may lie beside a model that has a prefix: the other models of an all-in-one file, and CLIP's picture side.
NEIGHBOURS = re.compile(
    r"(model|diffusion_model|vae|text_encoders|first_stage_model|cond_stage_model|conditioner"
    r"|vision_model|visual_projection|text_projection|logit_scale)(\.|$)"
)

# The first pattern that is found in any key names the file, so the special cases come before the models they resemble.
KINDS = {
    r"\.(qweight|wscales)$": "a nunchaku (SVDQuant) file",
    r"^(lora|lycoris)_|\.lora_(A|B|up|down)\b|[._]lora\d?\.(up|down)\.": LORA,
    r"(^|\.)distilled_guidance_layer\.": "Chroma, which is another model than FLUX.1",
    r"(^|\.)(double_stream_modulation|single_stream_modulation)": "FLUX.2, which is another model than FLUX.1",
    r"\.weight(\._data|\._scale|_qdata)$": "a file that quanto or torchao has quantised",
    r"(^|\.)(controlnet_blocks|controlnet_x_embedder|input_hint_block)\.": "a ControlNet",
    r"(^|[._])ip_adapter[._]|^image_proj\.": "an IP-Adapter",
    r"^redux_(up|down)\.": "FLUX.1 Redux, which makes prompts of pictures",
    r"^pulid_": "PuLID, which puts a face into pictures",
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

# --- the transformer ---


def flux_keys(keys: Iterable[str], source: str | Path = "the file") -> dict[str, str]:
    """The transformer's names, as the original file spells them, each with the key that it has in `source`.

    `*_norm.weight`, which ComfyUI writes, stands for `*_norm.scale`; both at once is an error.
    """
    found = _without_prefix(keys, FLUX, source)
    names: dict[str, str] = {}
    for name, key in found.items():
        name = re.sub(r"(\.norm\.(query|key)_norm)\.weight$", r"\1.scale", name)
        if name in names:
            refuse(source, f"has one tensor under two names ({key}, {names[name]})", "remove either")
        names[name] = key
    return names


def flux_config(shapes: Shapes, source: str | Path = "the file") -> FluxConfig:
    """The sizes of the transformer in a file of these shapes, every one of whose tensors has been found to fit them."""
    own = {name: shapes[key] for name, key in flux_keys(shapes, source).items()}
    config = flux_sizes(own, source)
    compare(own, flux_shapes(config), FLUX, source)
    return config


def flux_sizes(own: Shapes, source: str | Path) -> FluxConfig:
    """The sizes that the telling ones among `own`, shapes by the original's names, speak of."""
    hidden, in_channels = _matrix(own, "img_in.weight", source)
    out_channels = _matrix(own, "final_layer.linear.weight", source)[0]
    if in_channels != out_channels:
        kind = {2 * out_channels: " as of Canny or Depth", 6 * out_channels: " as of Fill"}.get(in_channels, "")
        refuse(source, f"has {in_channels} inputs{kind} where {out_channels} are wanted", "give dev, schnell or Krea")
    head_dim = _shape(own, "double_blocks.0.img_attn.norm.query_norm.scale", 1, source)[0]
    if head_dim % 32 or hidden % head_dim:
        refuse(source, f"has heads of {head_dim} in a width of {hidden}", "the head's width must be a multiple of 32")
    if not any(name.startswith("single_blocks.") for name in own):
        refuse(source, "lacks all of its single_blocks", "download it again")
    return FluxConfig(
        in_channels=in_channels,
        out_channels=out_channels,
        vec_in_dim=_matrix(own, "vector_in.in_layer.weight", source)[1],
        context_in_dim=_matrix(own, "txt_in.weight", source)[1],
        hidden_size=hidden,
        mlp_ratio=_matrix(own, "double_blocks.0.img_mlp.0.weight", source)[0] / hidden,
        num_heads=hidden // head_dim,
        depth=_count(own, r"double_blocks\.(\d{1,3})\."),
        depth_single_blocks=_count(own, r"single_blocks\.(\d{1,3})\."),
        axes_dim=(head_dim // 8, head_dim * 7 // 16, head_dim * 7 // 16),
        theta=10_000,
        qkv_bias="double_blocks.0.img_attn.qkv.bias" in own,
        guidance_embed=any(name.startswith("guidance_in.") for name in own),
    )


def variant(config: FluxConfig) -> str:
    """ "dev" for a model that is told the guidance, "schnell" for one that is not."""
    return "dev" if config.guidance_embed else "schnell"


# --- the autoencoder ---


def autoencoder_keys(keys: Iterable[str], source: str | Path = "the file") -> dict[str, str]:
    """The autoencoder's names, as ae.safetensors spells them, each with the key that it has in `source`."""
    return _without_prefix(keys, AUTOENCODER, source)


def autoencoder_config(shapes: Shapes, source: str | Path = "the file") -> AutoEncoderConfig:
    """The sizes of the autoencoder in a file of these shapes, every one of whose tensors has been found to fit them.

    Shapes do not tell the norms' groups (ch / 4 here, which is 32 for ae.safetensors) nor scale_factor, shift_factor
    and resolution, which are FLUX.1's.
    """
    own = {name: shapes[key] for name, key in autoencoder_keys(shapes, source).items()}
    config = autoencoder_sizes(own, source)
    compare(own, autoencoder_shapes(config), AUTOENCODER, source)
    return config


def autoencoder_sizes(own: Shapes, source: str | Path) -> AutoEncoderConfig:
    """The sizes that the telling ones among `own`, shapes by the original's names, speak of."""
    ch, in_channels, *_ = _shape(own, "encoder.conv_in.weight", 4, source)
    widths = [
        _shape(own, f"encoder.down.{level}.block.0.conv1.weight", 4, source)[0]
        for level in range(_count(own, r"encoder\.down\.(\d{1,3})\."))
    ]
    if ch % 4 or any(width % ch for width in widths):
        refuse(source, f"has levels of {widths} channels, no multiples of its first {ch}", "give ae.safetensors")
    return AutoEncoderConfig(
        in_channels=in_channels,
        ch=ch,
        out_ch=_shape(own, "decoder.conv_out.weight", 4, source)[0],
        ch_mult=tuple(width // ch for width in widths),
        num_res_blocks=_count(own, r"encoder\.down\.0\.block\.(\d{1,3})\."),
        z_channels=_shape(own, "decoder.conv_in.weight", 4, source)[1],
        groups=ch // 4,
    )


# --- the text encoders ---


def clip_keys(keys: Iterable[str], source: str | Path = "the file") -> dict[str, str]:
    """CLIP's names without the `text_model.` prefix, as transformers 5 has them, each with the key in `source`.

    What belongs to CLIP's picture side, and position_ids, which is no weight, are left out.
    """
    found = _without_prefix(keys, CLIP, source)
    return {
        name: key for name, key in found.items() if not re.search(r"^(text_projection|logit_scale|vision)|ids$", name)
    }


def clip_config(shapes: Shapes, source: str | Path = "the file") -> dict[str, Any]:
    """Arguments of transformers.CLIPTextConfig for a file of these shapes; heads are 64 wide, as in all of OpenAI's.

    eos_token_id 2 makes transformers pool at the highest id, which is the end token in every CLIP vocabulary.
    """
    own = {name: shapes[key] for name, key in clip_keys(shapes, source).items()}
    vocabulary, width = _matrix(own, "embeddings.token_embedding.weight", source)
    if width % 64:
        refuse(source, f"is {width} wide, which is no multiple of a head's 64", "give clip_l.safetensors")
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": _matrix(own, "encoder.layers.0.mlp.fc1.weight", source)[0],
        "num_hidden_layers": _count(own, r"encoder\.layers\.(\d{1,3})\."),
        "num_attention_heads": width // 64,
        "max_position_embeddings": _matrix(own, "embeddings.position_embedding.weight", source)[0],
        "projection_dim": width,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "eos_token_id": 2,
    }


def t5_keys(keys: Iterable[str], source: str | Path = "the file") -> dict[str, str]:
    """T5's encoder names, each with the key in `source`; the embedding once, as `shared.weight`.

    ComfyUI's CLIPSave leaves a `logit_scale` beside it, which is none of T5's.
    """
    found = _without_prefix(keys, T5, source)
    found.pop("logit_scale", None)
    tied = found.pop("encoder.embed_tokens.weight", None)
    return found if tied is None else {"shared.weight": tied} | found


def t5_config(shapes: Shapes, source: str | Path = "the file") -> dict[str, Any]:
    """Arguments of transformers.T5Config for the encoder (of the 1.1 kind: gated GELU) in a file of these shapes."""
    own = {name: shapes[key] for name, key in t5_keys(shapes, source).items()}
    vocabulary, width = _matrix(own, "shared.weight", source)
    attention = "encoder.block.0.layer.0.SelfAttention"
    buckets, heads = _matrix(own, f"{attention}.relative_attention_bias.weight", source)
    inner = _matrix(own, f"{attention}.q.weight", source)[0]
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": inner // heads,
        "d_ff": _matrix(own, "encoder.block.0.layer.1.DenseReluDense.wi_0.weight", source)[0],
        "num_layers": _count(own, r"encoder\.block\.(\d{1,3})\."),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": 128,
        "dropout_rate": 0.0,
        "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": False,
        "use_cache": False,
    }


# --- shared by all ---


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


def _without_prefix(keys: Iterable[str], wanted: str, source: str | Path) -> dict[str, str]:
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
    strange = [printable(key) for key in keys if not key.startswith(prefix) and not NEIGHBOURS.match(key)]
    if strange:
        refuse(source, f"is {wanted} with tensors beside it: {listed(unexpected=strange)}", f"give {EXAMPLES[wanted]}")
    return names


def _prefixes(keys: list[str], wanted: str) -> list[str]:
    prefixes, marker = MARKERS[wanted]
    return [prefix for prefix in prefixes if any(re.match(f"{re.escape(prefix)}({marker})", key) for key in keys)]


def _shape(shapes: Shapes, name: str, dimensions: int, source: str | Path) -> tuple[int, ...]:
    """A shape that is there, with that many dimensions, none of them 0."""
    if name not in shapes:
        refuse(source, f"lacks the tensor {name}", "download it again")
    if len(shapes[name]) != dimensions or 0 in shapes[name]:
        refuse(source, f"has {name} in shape {shapes[name]}, not in {dimensions} dimensions", "give the right file")
    return shapes[name]


def _matrix(shapes: Shapes, name: str, source: str | Path) -> tuple[int, ...]:
    return _shape(shapes, name, 2, source)


def _count(names: Iterable[str], pattern: str) -> int:
    """One more than the highest index that `pattern` captures."""
    return max((int(match[1]) + 1 for name in names if (match := re.match(pattern, name))), default=0)


def compare(own: Shapes, wanted: Shapes, what: str, source: str | Path) -> None:
    """Raises WrongRequest, naming keys, unless `own` are exactly the `wanted` shapes."""
    problems = listed(
        missing=[name for name in wanted if name not in own],
        unexpected=[printable(name) for name in own if name not in wanted],
        wrong_shape=[
            f"{name} is {own[name]}, not {shape}" for name, shape in wanted.items() if own.get(name, shape) != shape
        ],
    )
    if problems:
        refuse(source, f"is {what}, but of its {len(wanted):,} tensors {problems}", "download it again")
