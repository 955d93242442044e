"""What a checkpoint holds, told from its keys and shapes alone, before any tensor is read.

For each of the four models: `*_keys` gives the names that the model uses, mapped to the file's own keys (prefixes of
all-in-one files stripped, aliases resolved, the other models of such a file left out), and `*_config` the sizes. The
same rules read the full-size files and the bundled toy. Whatever does not fit is refused by the name of what it is.
"""

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fluxq.formats.files import listed, printable, refuse
from fluxq.model.config import AutoEncoderConfig, FluxConfig

Shapes = Mapping[str, tuple[int, ...]]

FLUX = "a FLUX.1 transformer"
AUTOENCODER = "a FLUX.1 autoencoder"
CLIP = "a CLIP text encoder"
T5 = "a T5 text encoder"

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

# What may lie beside a model that has a prefix: the other models of an all-in-one file, and CLIP's picture side.
NEIGHBOURS = re.compile(
    r"(model|diffusion_model|vae|text_encoders|first_stage_model|cond_stage_model|conditioner"
    r"|vision_model|visual_projection|text_projection|logit_scale)(\.|$)"
)

# Scales of 8-bit weights, and the marks of files that have them: no weights themselves.
SCALES = re.compile(r"(^|\.)(scale_weight|weight_scale|scale_input|input_scale|scaled_fp8|comfy_quant)$")

# The first pattern that is found in any key names the file, so the special cases come before the models they resemble.
KINDS = {
    r"\.(qweight|wscales)$": "a nunchaku (SVDQuant) file",
    r"^(lora|lycoris)_|\.lora_(A|B|up|down)\b|[._]lora\d?\.(up|down)\.": "a LoRA",
    r"(^|\.)distilled_guidance_layer\.": "Chroma, which is another model than FLUX.1",
    r"(^|\.)(double_stream_modulation|single_stream_modulation)": "FLUX.2, which is another model than FLUX.1",
    r"\.quant_state\.bitsandbytes__|\.absmax$|\.SCB$": "a file that bitsandbytes has quantised",
    r"(^|\.)scaled_fp8$|\.(scale_weight|weight_scale|comfy_quant)$": "a file of 8-bit weights with scales of their own",
    r"(^|\.)(double_blocks|single_blocks)\.\d": FLUX,
    r"(^|\.)single_transformer_blocks\.\d": "a FLUX.1 transformer in diffusers' layout",
    r"(^|\.)(input_blocks|label_emb|time_embedding)\.": "a Stable Diffusion model (1.x, 2.x or XL)",
    r"(^|\.)joint_blocks\.\d": "Stable Diffusion 3",
    r"(^|\.)(mid_block|down_blocks|up_blocks)\.": "a model in diffusers' layout (an autoencoder or a UNet)",
    r"(^|\.)(quant_conv|post_quant_conv)\.": "the autoencoder of another model (Stable Diffusion or FLUX.2)",
    r"(^|\.)decoder\.up\.\d": AUTOENCODER,
    r"\.SelfAttention\.|\.DenseReluDense\.": T5,
    r"\.resblocks\.\d": "a CLIP text encoder in OpenCLIP's layout",
    r"(^|\.)embeddings\.position_embedding\.": CLIP,
}

# --- the transformer ---


def flux_keys(keys: Iterable[str], source: str | Path = "the file") -> dict[str, str]:
    """The transformer's names, as the original file spells them, each with the key that it has in `source`.

    `*_norm.weight`, which ComfyUI writes, stands for `*_norm.scale`; both at once is an error.
    """
    found = _without_prefix(keys, FLUX_PREFIXES, r"(double|single)_blocks\.\d", FLUX, source)
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
    hidden, in_channels = _matrix(own, "img_in.weight", source)
    out_channels = _matrix(own, "final_layer.linear.weight", source)[0]
    if in_channels != out_channels:
        kind = {2 * out_channels: " as of Canny or Depth", 6 * out_channels: " as of Fill"}.get(in_channels, "")
        refuse(source, f"has {in_channels} inputs{kind} where {out_channels} are wanted", "give dev, schnell or Krea")
    head_dim = _shape(own, "double_blocks.0.img_attn.norm.query_norm.scale", 1, source)[0]
    if head_dim % 32 or hidden % head_dim:
        refuse(source, f"has heads of {head_dim} in a width of {hidden}", "the head's width must be a multiple of 32")
    config = FluxConfig(
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
    _compare(own, flux_shapes(config), FLUX, source)
    return config


def variant(config: FluxConfig) -> str:
    """ "dev" for a model that is told the guidance, "schnell" for one that is not."""
    return "dev" if config.guidance_embed else "schnell"


@lru_cache(maxsize=8)
def flux_shapes(config: FluxConfig) -> Mapping[str, tuple[int, ...]]:
    """Name and shape of every tensor of a transformer: 780 for dev, 776 for schnell. Weights are (out, in)."""
    width, mlp, head_dim = config.hidden_size, config.mlp_hidden, config.head_dim
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, out: int, inputs: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = (out, inputs)
        if bias:
            shapes[f"{name}.bias"] = (out,)

    def norms(name: str) -> None:
        shapes[f"{name}.query_norm.scale"] = shapes[f"{name}.key_norm.scale"] = (head_dim,)

    linear("img_in", width, config.in_channels)
    linear("txt_in", width, config.context_in_dim)
    embedders = {"time_in": 256, "vector_in": config.vec_in_dim} | (
        {"guidance_in": 256} if config.guidance_embed else {}
    )
    for name, inputs in embedders.items():
        linear(f"{name}.in_layer", width, inputs)
        linear(f"{name}.out_layer", width, width)
    for block in (f"double_blocks.{i}" for i in range(config.depth)):
        for stream in ("img", "txt"):
            linear(f"{block}.{stream}_mod.lin", 6 * width, width)
            linear(f"{block}.{stream}_attn.qkv", 3 * width, width, config.qkv_bias)
            norms(f"{block}.{stream}_attn.norm")
            linear(f"{block}.{stream}_attn.proj", width, width)
            linear(f"{block}.{stream}_mlp.0", mlp, width)
            linear(f"{block}.{stream}_mlp.2", width, mlp)
    for block in (f"single_blocks.{i}" for i in range(config.depth_single_blocks)):
        linear(f"{block}.linear1", 3 * width + mlp, width)
        linear(f"{block}.linear2", width, width + mlp)
        norms(f"{block}.norm")
        linear(f"{block}.modulation.lin", 3 * width, width)
    linear("final_layer.linear", config.out_channels, width)
    linear("final_layer.adaLN_modulation.1", 2 * width, width)
    return MappingProxyType(shapes)


# --- the autoencoder ---


def autoencoder_keys(keys: Iterable[str], source: str | Path = "the file") -> dict[str, str]:
    """The autoencoder's names, as ae.safetensors spells them, each with the key that it has in `source`."""
    return _without_prefix(keys, AUTOENCODER_PREFIXES, r"decoder\.up\.\d", AUTOENCODER, source)


def autoencoder_config(shapes: Shapes, source: str | Path = "the file") -> AutoEncoderConfig:
    """The sizes of the autoencoder in a file of these shapes, every one of whose tensors has been found to fit them.

    Shapes do not tell the norms' groups (ch / 4 here, which is 32 for ae.safetensors) nor scale_factor, shift_factor
    and resolution, which are FLUX.1's.
    """
    own = {name: shapes[key] for name, key in autoencoder_keys(shapes, source).items()}
    ch, in_channels, *_ = _shape(own, "encoder.conv_in.weight", 4, source)
    widths = [
        _shape(own, f"encoder.down.{level}.block.0.conv1.weight", 4, source)[0]
        for level in range(_count(own, r"encoder\.down\.(\d{1,3})\."))
    ]
    if ch % 4 or any(width % ch for width in widths):
        refuse(source, f"has levels of {widths} channels, no multiples of its first {ch}", "give ae.safetensors")
    config = AutoEncoderConfig(
        in_channels=in_channels,
        ch=ch,
        out_ch=_shape(own, "decoder.conv_out.weight", 4, source)[0],
        ch_mult=tuple(width // ch for width in widths),
        num_res_blocks=_count(own, r"encoder\.down\.0\.block\.(\d{1,3})\."),
        z_channels=_shape(own, "decoder.conv_in.weight", 4, source)[1],
        groups=ch // 4,
    )
    _compare(own, autoencoder_shapes(config), AUTOENCODER, source)
    return config


def autoencoder_shapes(config: AutoEncoderConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of an autoencoder, 244 for FLUX.1's. Convolutions are (out, in, height, width)."""
    shapes: dict[str, tuple[int, ...]] = {}
    widths = [config.ch * mult for mult in config.ch_mult]

    def conv(name: str, inputs: int, out: int, side: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, inputs, side, side), (out,)

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    def res_block(name: str, inputs: int, out: int) -> None:
        norm(f"{name}.norm1", inputs)
        conv(f"{name}.conv1", inputs, out, 3)
        norm(f"{name}.norm2", out)
        conv(f"{name}.conv2", out, out, 3)
        if inputs != out:
            conv(f"{name}.nin_shortcut", inputs, out, 1)

    def middle(name: str, width: int) -> None:
        res_block(f"{name}.block_1", width, width)
        norm(f"{name}.attn_1.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.attn_1.{part}", width, width, 1)
        res_block(f"{name}.block_2", width, width)

    def levels(name: str, order: Iterable[int], blocks: int, inputs: int, resampler: str, last: int) -> None:
        for level in order:
            for block in range(blocks):
                res_block(f"{name}.{level}.block.{block}", inputs, widths[level])
                inputs = widths[level]
            if level != last:
                conv(f"{name}.{level}.{resampler}.conv", inputs, inputs, 3)

    deepest = len(widths) - 1
    conv("encoder.conv_in", config.in_channels, config.ch, 3)
    levels("encoder.down", range(deepest + 1), config.num_res_blocks, config.ch, "downsample", last=deepest)
    middle("encoder.mid", widths[-1])
    norm("encoder.norm_out", widths[-1])
    conv("encoder.conv_out", widths[-1], 2 * config.z_channels, 3)
    conv("decoder.conv_in", config.z_channels, widths[-1], 3)
    middle("decoder.mid", widths[-1])
    levels("decoder.up", range(deepest, -1, -1), config.num_res_blocks + 1, widths[-1], "upsample", last=0)
    norm("decoder.norm_out", widths[0])
    conv("decoder.conv_out", widths[0], config.out_ch, 3)
    return shapes


# --- the text encoders ---


def clip_keys(keys: Iterable[str], source: str | Path = "the file") -> dict[str, str]:
    """CLIP's names without the `text_model.` prefix, as transformers 5 has them, each with the key in `source`.

    What belongs to CLIP's picture side, scales, and position_ids, which is no weight, are left out.
    """
    found = _without_prefix(_without_scales(keys), CLIP_PREFIXES, r"embeddings\.position_embedding\.", CLIP, source)
    return {
        name: key for name, key in found.items() if not re.search(r"^(text_projection|logit_scale|vision)|ids$", name)
    }


def clip_config(shapes: Shapes, source: str | Path = "the file") -> dict[str, Any]:
    """Arguments of transformers.CLIPTextConfig for a file of these shapes, all of which have been found to fit them.

    Heads are 64 wide, as in all of OpenAI's. eos_token_id 2 makes transformers pool at the highest id, which is the end
    token in every CLIP vocabulary.
    """
    own = {name: shapes[key] for name, key in clip_keys(shapes, source).items()}
    vocabulary, width = _matrix(own, "embeddings.token_embedding.weight", source)
    if width % 64:
        refuse(source, f"is {width} wide, which is no multiple of a head's 64", "give clip_l.safetensors")
    config = {
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
    _compare(own, clip_shapes(config), CLIP, source)
    return config


def clip_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of CLIP's text model, 196 for CLIP-L's."""
    width, hidden = config["hidden_size"], config["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.token_embedding.weight": (config["vocab_size"], width),
        "embeddings.position_embedding.weight": (config["max_position_embeddings"], width),
    }
    layers = [f"encoder.layers.{i}" for i in range(config["num_hidden_layers"])]
    linears = {f"self_attn.{part}_proj": (width, width) for part in ("q", "k", "v", "out")}
    for layer in layers:
        for name, shape in (linears | {"mlp.fc1": (hidden, width), "mlp.fc2": (width, hidden)}).items():
            shapes[f"{layer}.{name}.weight"], shapes[f"{layer}.{name}.bias"] = shape, shape[:1]
    for norm in (*(f"{layer}.layer_norm{n}" for layer in layers for n in (1, 2)), "final_layer_norm"):
        shapes[f"{norm}.weight"] = shapes[f"{norm}.bias"] = (width,)
    return shapes


def t5_keys(keys: Iterable[str], source: str | Path = "the file") -> dict[str, str]:
    """T5's encoder names, each with the key in `source`; the embedding once, as `shared.weight`, and no scales."""
    found = _without_prefix(_without_scales(keys), T5_PREFIXES, r"encoder\.block\.\d", T5, source)
    tied = found.pop("encoder.embed_tokens.weight", None)
    return found if tied is None else {"shared.weight": tied} | found


def t5_config(shapes: Shapes, source: str | Path = "the file") -> dict[str, Any]:
    """Arguments of transformers.T5Config for the encoder (of the 1.1 kind: gated GELU) in a file of these shapes, all
    of which have been found to fit them.
    """
    own = {name: shapes[key] for name, key in t5_keys(shapes, source).items()}
    vocabulary, width = _matrix(own, "shared.weight", source)
    attention = "encoder.block.0.layer.0.SelfAttention"
    buckets, heads = _matrix(own, f"{attention}.relative_attention_bias.weight", source)
    inner = _matrix(own, f"{attention}.q.weight", source)[0]
    if inner % heads:
        refuse(source, f"has {heads} heads in a width of {inner}", f"give {EXAMPLES[T5]}")
    config = {
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
    _compare(own, t5_shapes(config), T5, source)
    return config


def t5_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of T5's encoder, 219 for T5-XXL's."""
    width, inner, hidden = config["d_model"], config["d_kv"] * config["num_heads"], config["d_ff"]
    shapes: dict[str, tuple[int, ...]] = {"shared.weight": (config["vocab_size"], width)}
    for block in (f"encoder.block.{i}.layer" for i in range(config["num_layers"])):
        attention, mlp = f"{block}.0.SelfAttention", f"{block}.1.DenseReluDense"
        shapes |= {f"{attention}.{part}.weight": (inner, width) for part in "qkv"}
        shapes |= {f"{attention}.o.weight": (width, inner), f"{mlp}.wo.weight": (width, hidden)}
        shapes |= {f"{mlp}.{part}.weight": (hidden, width) for part in ("wi_0", "wi_1")}
        shapes |= {f"{block}.{n}.layer_norm.weight": (width,) for n in (0, 1)}
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    shapes[bias] = (config["relative_attention_num_buckets"], config["num_heads"])
    shapes["encoder.final_layer_norm.weight"] = (width,)
    return shapes


# --- shared by all ---


def kind(keys: Iterable[str]) -> str:
    """What a file with these keys is, in words for a message."""
    keys = list(keys)
    for pattern, name in KINDS.items():
        if any(re.search(pattern, key) for key in keys):
            return name
    return f"no model that fluxq knows (its first key is {printable(keys[0])})" if keys else "empty: it has no tensors"


def _without_scales(keys: Iterable[str]) -> list[str]:
    return [key for key in keys if not SCALES.search(key)]


def _without_prefix(
    keys: Iterable[str], prefixes: tuple[str, ...], marker: str, wanted: str, source: str | Path
) -> dict[str, str]:
    """Stripped name -> key, of all keys under the one prefix under which `marker` occurs in any key.

    Raises WrongRequest if that is none or several, or if what is there is not `wanted`.
    """
    keys = list(keys)
    present = [prefix for prefix in prefixes if any(re.match(re.escape(prefix) + marker, key) for key in keys)]
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


def _compare(own: Shapes, wanted: Shapes, what: str, source: str | Path) -> None:
    problems = listed(
        missing=[name for name in wanted if name not in own],
        unexpected=[printable(name) for name in own if name not in wanted],
        wrong_shape=[
            f"{name} is {own[name]}, not {shape}" for name, shape in wanted.items() if own.get(name, shape) != shape
        ],
    )
    if problems:
        refuse(source, f"is {what}, but of its {len(wanted):,} tensors {problems}", "download it again")
