"""Name and shape of every tensor of the four models, computed from a model's sizes; names are the original files'.

`sizes` compares files with these, `quantized` lays them out, `check` counts their bytes.
"""

from collections.abc import Iterable, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from fluxq.model.config import AutoEncoderConfig, FluxConfig


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


def autoencoder_shapes(config: AutoEncoderConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of an autoencoder: 244 for FLUX.1. Convolutions are (out, in, height, width)."""
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


def clip_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a CLIP text model with this `clip_config`: 196 for CLIP-L."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.token_embedding.weight": (config["vocab_size"], width),
        "embeddings.position_embedding.weight": (config["max_position_embeddings"], width),
        "final_layer_norm.weight": (width,),
        "final_layer_norm.bias": (width,),
    }
    matrices = {f"self_attn.{part}_proj": (width, width) for part in "qkv"} | {"self_attn.out_proj": (width, width)}
    matrices |= {"mlp.fc1": (inner, width), "mlp.fc2": (width, inner)}
    for layer in (f"encoder.layers.{i}" for i in range(config["num_hidden_layers"])):
        for name, shape in matrices.items():
            shapes[f"{layer}.{name}.weight"], shapes[f"{layer}.{name}.bias"] = shape, shape[:1]
        for norm in ("layer_norm1", "layer_norm2"):
            shapes[f"{layer}.{norm}.weight"] = shapes[f"{layer}.{norm}.bias"] = (width,)
    return shapes


def t5_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a T5 encoder with this `t5_config`, the embedding once: 219 for T5-XXL."""
    width, hidden, inner = config["d_model"], config["d_ff"], config["num_heads"] * config["d_kv"]
    first = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    shapes: dict[str, tuple[int, ...]] = {
        "shared.weight": (config["vocab_size"], width),
        first: (config["relative_attention_num_buckets"], config["num_heads"]),
        "encoder.final_layer_norm.weight": (width,),
    }
    for block in (f"encoder.block.{i}" for i in range(config["num_layers"])):
        for part in "qkv":
            shapes[f"{block}.layer.0.SelfAttention.{part}.weight"] = (inner, width)
        shapes[f"{block}.layer.0.SelfAttention.o.weight"] = (width, inner)
        for part, shape in (("wi_0", (hidden, width)), ("wi_1", (hidden, width)), ("wo", (width, hidden))):
            shapes[f"{block}.layer.1.DenseReluDense.{part}.weight"] = shape
        for layer in (0, 1):
            shapes[f"{block}.layer.{layer}.layer_norm.weight"] = (width,)
    return shapes
