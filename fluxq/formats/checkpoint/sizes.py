"""Read the sizes of each of the four models from a file's keys and shapes alone.

For each model, `*_keys` maps the names that the model uses to the file's keys and resolves aliases, and `*_config`
returns the sizes after checking that the tensors are exactly those of `shapes`. The same rules read the full-size files
and the bundled toy. diffusers' names are in `keys`.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fluxq.model.config import AutoEncoderConfig, FluxConfig

from .detect import AUTOENCODER, CLIP, FLUX, T5, without_prefix
from .files import listed, printable, refuse
from .shapes import autoencoder_shapes, flux_shapes

Shapes = Mapping[str, tuple[int, ...]]
INCOMPLETE = "if it is one shard of several, name the folder with all of them and their index; else download it again"


# --- the transformer ---


def flux_keys(keys: Iterable[str], source: str | Path = "the file") -> dict[str, str]:
    """Original name -> key in `source`, for every tensor of the transformer.

    ComfyUI writes `*_norm.weight` for `*_norm.scale`; a file with both is an error.
    """
    names: dict[str, str] = {}
    for name, key in without_prefix(keys, FLUX, source).items():
        name = re.sub(r"(\.norm\.(query|key)_norm)\.weight$", r"\1.scale", name)
        if name in names:
            refuse(source, f"has one tensor under two names ({key}, {names[name]})", "remove one of them")
        names[name] = key
    return names


def flux_config(shapes: Shapes, source: str | Path = "the file") -> FluxConfig:
    """The sizes of the transformer in a file with these shapes. Raises WrongRequest unless every tensor fits them."""
    own = {name: shapes[key] for name, key in flux_keys(shapes, source).items()}
    config = flux_sizes(own, source)
    compare(own, flux_shapes(config), FLUX, source)
    return config


def flux_sizes(own: Shapes, source: str | Path) -> FluxConfig:
    """The transformer's sizes, read from a few of `own`, shapes by original name; the others are not checked."""
    hidden, in_channels = _matrix(own, "img_in.weight", source)
    out_channels = _matrix(own, "final_layer.linear.weight", source)[0]
    if in_channels != out_channels:
        kind = {2 * out_channels: " like Canny or Depth", 6 * out_channels: " like Fill"}.get(in_channels, "")
        refuse(source, f"has {in_channels} input channels{kind}, not {out_channels}", "use dev, schnell or Krea")
    head_dim = _shape(own, "double_blocks.0.img_attn.norm.query_norm.scale", 1, source)[0]
    if head_dim < 32 or head_dim & (head_dim - 1) or hidden % head_dim:  # the kernel of RoPE needs a power of two
        what = f"has heads of width {head_dim} at hidden size {hidden}, not a power of 2 from 32 that divides it"
        refuse(source, what, "use dev, schnell or Krea")
    if not any(name.startswith("single_blocks.") for name in own):
        refuse(source, "has no single_blocks", INCOMPLETE)
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
    """ "dev" for a model with a guidance input, "schnell" for one without."""
    return "dev" if config.guidance_embed else "schnell"


# --- the autoencoder ---


def autoencoder_keys(keys: Iterable[str], source: str | Path = "the file") -> dict[str, str]:
    """Name in ae.safetensors -> key in `source`, for every tensor of the autoencoder."""
    return without_prefix(keys, AUTOENCODER, source)


def autoencoder_config(shapes: Shapes, source: str | Path = "the file") -> AutoEncoderConfig:
    """The sizes of the autoencoder in a file with these shapes. Raises WrongRequest unless every tensor fits them.

    Shapes do not show the norms' groups, so these are ch / 4 (32 for ae.safetensors), nor scale_factor, shift_factor
    and resolution, so these are FLUX.1's.
    """
    own = {name: shapes[key] for name, key in autoencoder_keys(shapes, source).items()}
    config = autoencoder_sizes(own, source)
    compare(own, autoencoder_shapes(config), AUTOENCODER, source)
    return config


def autoencoder_sizes(own: Shapes, source: str | Path) -> AutoEncoderConfig:
    """The autoencoder's sizes, read from a few of `own`, shapes by original name; the others are not checked."""
    ch, in_channels, *_ = _shape(own, "encoder.conv_in.weight", 4, source)
    widths = [
        _shape(own, f"encoder.down.{level}.block.0.conv1.weight", 4, source)[0]
        for level in range(_count(own, r"encoder\.down\.(\d{1,3})\."))
    ]
    if ch % 4 or any(width % ch for width in widths):
        what = f"has levels of {widths} channels, which are not multiples of its first {ch}"
        refuse(source, what, "use ae.safetensors")
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
    """Name in transformers 5 (without the `text_model.` prefix) -> key in `source`, for CLIP's text model.

    The image encoder and position_ids, which is not a weight, are left out.
    """
    names = without_prefix(keys, CLIP, source)
    return {
        name: key for name, key in names.items() if not re.search(r"^(text_projection|logit_scale|vision)|ids$", name)
    }


def clip_config(shapes: Shapes, source: str | Path = "the file") -> dict[str, Any]:
    """Arguments of transformers.CLIPTextConfig for a file with these shapes; heads are 64 wide, as in all of OpenAI's.

    With eos_token_id 2, transformers pools at the highest id, which is the end token in every CLIP vocabulary.
    """
    own = {name: shapes[key] for name, key in clip_keys(shapes, source).items()}
    vocabulary, width = _matrix(own, "embeddings.token_embedding.weight", source)
    if width % 64:
        refuse(source, f"has width {width}, not a multiple of the head width 64", "use clip_l.safetensors")
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
    """Name -> key in `source`, for T5's encoder; the embedding occurs once, as `shared.weight`.

    ComfyUI's CLIPSave adds a `logit_scale`, which does not belong to T5.
    """
    names = without_prefix(keys, T5, source)
    names.pop("logit_scale", None)
    tied = names.pop("encoder.embed_tokens.weight", None)
    return names if tied is None else {"shared.weight": tied} | names


def t5_config(shapes: Shapes, source: str | Path = "the file") -> dict[str, Any]:
    """Arguments of transformers.T5Config for the encoder (T5 1.1: gated GELU) in a file with these shapes."""
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


def compare(own: Shapes, wanted: Shapes, what: str, source: str | Path) -> None:
    """Raise WrongRequest, with the keys that differ, unless `own` are exactly the `wanted` shapes."""
    problems = listed(
        missing=[name for name in wanted if name not in own],
        unexpected=[printable(name) for name in own if name not in wanted],
        wrong_shape=[
            f"{name} is {own[name]}, not {shape}" for name, shape in wanted.items() if own.get(name, shape) != shape
        ],
    )
    if problems:
        is_part = own.items() <= wanted.items()
        remedy = INCOMPLETE if is_part else "download it again"
        refuse(source, f"is {what}, but its {len(wanted):,} tensors do not fit: {problems}", remedy)


def _shape(shapes: Shapes, name: str, dimensions: int, source: str | Path) -> tuple[int, ...]:
    """The shape of `name`. Raises WrongRequest if it is missing, has a 0, or has another number of dimensions."""
    if name not in shapes:
        refuse(source, f"has no tensor {name}", INCOMPLETE)
    if len(shapes[name]) != dimensions or 0 in shapes[name]:
        what = f"has {name} of shape {shapes[name]}, not {dimensions} nonzero dimensions"
        refuse(source, what, "use the original file")
    return shapes[name]


def _matrix(shapes: Shapes, name: str, source: str | Path) -> tuple[int, ...]:
    return _shape(shapes, name, 2, source)


def _count(names: Iterable[str], pattern: str) -> int:
    """One more than the highest index that `pattern` captures."""
    return max((int(match[1]) + 1 for name in names if (match := re.match(pattern, name))), default=0)
