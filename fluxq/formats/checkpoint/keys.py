"""Other projects' tensor names, mapped to the original ones.

diffusers renames the tensors of FLUX.1 and its autoencoder, OpenCLIP those of CLIP, llama.cpp those of T5.

The original files (BFL) fuse q, k, v and the MLP's input into one matrix where diffusers has several, and they store
the two halves of the last modulation in the opposite order. One rule covers both: a diffusers module is the
concatenation, in the order given, of row ranges of one BFL module. Columns never differ.
"""

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import torch

from fluxq.model.config import AutoEncoderConfig, FluxConfig

from .shapes import autoencoder_shapes, flux_shapes

Shapes = Mapping[str, tuple[int, ...]]

GLOBAL = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
DOUBLE = {
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
SINGLE = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
}
BLOCKS = {"double_blocks": ("transformer_blocks", DOUBLE), "single_blocks": ("single_transformer_blocks", SINGLE)}

# Applied in order to the autoencoder's names; the index of decoder.up is also reversed.
AUTOENCODER = {
    r"\.norm_out\.": ".conv_norm_out.",
    r"\.mid\.block_1\.": ".mid_block.resnets.0.",
    r"\.mid\.block_2\.": ".mid_block.resnets.1.",
    r"\.mid\.attn_1\.norm\.": ".mid_block.attentions.0.group_norm.",
    r"\.mid\.attn_1\.proj_out\.": ".mid_block.attentions.0.to_out.0.",
    r"\.mid\.attn_1\.([qkv])\.": r".mid_block.attentions.0.to_\1.",
    r"\.(down|up)\.(\d+)\.block\.": r".\1_blocks.\2.resnets.",
    r"\.(down|up)\.(\d+)\.(down|up)sample\.": r".\1_blocks.\2.\3samplers.0.",
    r"\.nin_shortcut\.": ".conv_shortcut.",
}

OPENCLIP = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
OPENCLIP_LAYER = {
    "ln_1": ("layer_norm1",),
    "attn.in_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.out_proj": ("self_attn.out_proj",),
    "ln_2": ("layer_norm2",),
    "mlp.c_fc": ("mlp.fc1",),
    "mlp.c_proj": ("mlp.fc2",),
}

# Applied in order to the names of T5's encoder in a GGUF file, which are llama.cpp's.
T5_GGUF = {
    r"^enc\.output_norm\.": "encoder.final_layer_norm.",
    r"^enc\.blk\.": "encoder.block.",
    r"\.attn_([qkvo])\.": r".layer.0.SelfAttention.\1.",
    r"\.attn_rel_b\.": ".layer.0.SelfAttention.relative_attention_bias.",
    r"\.attn_norm\.": ".layer.0.layer_norm.",
    r"\.ffn_gate\.": ".layer.1.DenseReluDense.wi_0.",
    r"\.ffn_up\.": ".layer.1.DenseReluDense.wi_1.",
    r"\.ffn_down\.": ".layer.1.DenseReluDense.wo.",
    r"\.ffn_norm\.": ".layer.1.layer_norm.",
}


def gguf_name(name: str) -> str:
    """transformers' name of a GGUF tensor of T5's encoder; any other name is returned unchanged."""
    if name == "token_embd.weight":
        return "shared.weight"
    if name.startswith("enc."):
        for pattern, replacement in T5_GGUF.items():
            name = re.sub(pattern, replacement, name)
    return name


def module_split(module: str, config: FluxConfig) -> list[tuple[str, int, int]]:
    """The diffusers modules that a BFL module becomes: (name, first row, row after the last), in diffusers' order.

    If a name occurs twice (the last modulation), that diffusers module is the pieces in this order. Raises KeyError for
    a module that a transformer of this config does not have.
    """
    shapes = flux_shapes(config)
    rows = next(
        shapes[key][0] for leaf in ("weight", "scale") if (key := f"{module}.{leaf}") in shapes or leaf == "scale"
    )
    if module == "final_layer.adaLN_modulation.1":
        return [(GLOBAL[module], rows // 2, rows), (GLOBAL[module], 0, rows // 2)]
    if module in GLOBAL:
        return [(GLOBAL[module], 0, rows)]
    blocks, index, inner = module.split(".", 2)
    prefix, table = BLOCKS[blocks]
    names = table[inner]
    width = config.hidden_size if len(names) > 1 else rows
    ends = [*(width * (i + 1) for i in range(len(names) - 1)), rows]
    return [
        (f"{prefix}.{index}.{name}", start, end) for name, start, end in zip(names, [0, *ends[:-1]], ends, strict=True)
    ]


def to_diffusers(tensors: Mapping[str, torch.Tensor], config: FluxConfig) -> dict[str, torch.Tensor]:
    """A transformer's tensors under diffusers' names: dev's 780 become 1160. All are views except the two swapped."""
    result: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        module, leaf = key.rsplit(".", 1)
        for name, start, end in module_split(module, config):
            name = f"{name}.{'bias' if leaf == 'bias' else 'weight'}"
            piece = tensor[start:end]
            result[name] = torch.cat([result[name], piece]) if name in result else piece
    return result


class RowRange(NamedTuple):
    """`rows` rows of the file's tensor `key`, starting at row `first`."""

    key: str
    first: int
    rows: int


@lru_cache(maxsize=8)
def flux_pieces(config: FluxConfig) -> Mapping[str, tuple[RowRange, ...]]:
    """Original name -> the diffusers rows that make it up, in order: the inverse of `to_diffusers`."""
    parts: dict[str, list[tuple[int, RowRange]]] = {}
    filled: dict[str, int] = {}
    for key in flux_shapes(config):
        module, leaf = key.rsplit(".", 1)
        for name, start, end in module_split(module, config):
            name = f"{name}.{'bias' if leaf == 'bias' else 'weight'}"
            parts.setdefault(key, []).append((start, RowRange(name, filled.get(name, 0), end - start)))
            filled[name] = filled.get(name, 0) + end - start
    return {key: tuple(piece for _, piece in sorted(pieces)) for key, pieces in parts.items()}


def openclip_pieces(shapes: Shapes) -> dict[str, tuple[RowRange, ...]]:
    """transformers' name -> the rows of the one OpenCLIP tensor that hold it, for a CLIP text model."""
    pieces: dict[str, tuple[RowRange, ...]] = {}
    for key, shape in shapes.items():
        if key in OPENCLIP:
            pieces[OPENCLIP[key]] = (RowRange(key, 0, shape[0]),)
        elif layer := re.fullmatch(r"transformer\.resblocks\.(\d{1,3})\.(.+)[._](weight|bias)", key):
            names = OPENCLIP_LAYER.get(layer[2], ())
            for i, name in enumerate(names):
                first, end = (shape[0] * n // len(names) for n in (i, i + 1))
                pieces[f"encoder.layers.{layer[1]}.{name}.{layer[3]}"] = (RowRange(key, first, end - first),)
    return pieces


def flux_diffusers_shapes(config: FluxConfig) -> dict[str, tuple[int, ...]]:
    """diffusers' name and shape of every tensor of a transformer: 1160 for dev."""
    own, shapes = flux_shapes(config), {}
    for name, pieces in flux_pieces(config).items():
        for piece in pieces:
            rows = shapes.get(piece.key, (0,))[0] + piece.rows
            shapes[piece.key] = (rows, *own[name][1:])
    return shapes


def flux_original_names(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """A diffusers file's shapes under the original names, to read model sizes from before the file is checked.

    If the original fuses several diffusers tensors, the shape is that of the first one.
    """
    globals_ = {name: own for own, name in GLOBAL.items()}
    blocks = {
        theirs: (own, {name: inner for inner, names in table.items() for name in names})
        for own, (theirs, table) in BLOCKS.items()
    }
    result: dict[str, tuple[int, ...]] = {}
    for key, shape in shapes.items():
        module, _, leaf = key.rpartition(".")
        kind, _, rest = module.partition(".")
        index, _, inner = rest.partition(".")
        if module in globals_:
            result.setdefault(f"{globals_[module]}.{leaf}", shape)
        elif kind in blocks and inner in blocks[kind][1]:
            own = blocks[kind][1][inner]
            result.setdefault(f"{blocks[kind][0]}.{index}.{own}.{'scale' if own.endswith('_norm') else leaf}", shape)
    return result


def autoencoder_diffusers_names(config: AutoEncoderConfig) -> dict[str, str]:
    """Original name -> diffusers' name of every tensor of an autoencoder."""
    return {name: _autoencoder_name(name, len(config.ch_mult) - 1) for name in autoencoder_shapes(config)}


def autoencoder_diffusers_shapes(config: AutoEncoderConfig) -> dict[str, tuple[int, ...]]:
    """diffusers' name and shape of every tensor of an autoencoder: the attention's 1x1 convolutions are matrices."""
    own, names = autoencoder_shapes(config), autoencoder_diffusers_names(config)
    return {names[key]: shape[:2] if _is_attention(names[key]) else shape for key, shape in own.items()}


def autoencoder_original_names(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """A diffusers file's shapes, with the original names for those that determine an autoencoder's sizes."""
    pattern, own = r"^encoder\.down_blocks\.(\d+)\.resnets\.", r"encoder.down.\1.block."
    return {re.sub(pattern, own, key): shape for key, shape in shapes.items()}


def autoencoder_to_diffusers(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """An autoencoder's tensors under diffusers' names, as views; the attention's 1x1 convolutions become matrices."""
    deepest = max(int(match[1]) for key in tensors if (match := re.match(r"decoder\.up\.(\d+)\.", key)))
    result: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        name = _autoencoder_name(key, deepest)
        result[name] = tensor[:, :, 0, 0] if _is_attention(name) and tensor.ndim == 4 else tensor
    return result


def _autoencoder_name(name: str, deepest: int) -> str:
    name = re.sub(r"^decoder\.up\.(\d+)", lambda match: f"decoder.up.{deepest - int(match[1])}", name)
    for pattern, replacement in AUTOENCODER.items():
        name = re.sub(pattern, replacement, name)
    return name


def _is_attention(name: str) -> bool:
    return ".attentions." in name
