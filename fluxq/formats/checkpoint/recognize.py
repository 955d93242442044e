"""Recognize how each tensor of a checkpoint is stored, from the keys next to it, for any model in any layout.

Only the header is read, plus a few hundred bytes per layer if the layers describe themselves.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from .files import Checkpoint, TensorFile, printable, refuse
from .gguf import GgufFile
from .keys import gguf_name
from .stored_tensors import (
    NESTED,
    Blocks,
    EightBits,
    Foreign,
    FourBits,
    Plain,
    Scaled,
    Stored,
    damaged,
)

COMFY_FP8 = ("float8_e4m3fn", "float8_e5m2")
GGUF_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
GGUF_BLOCKS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
MAX_STATE_BYTES = 1 << 16  # of a layer's JSON; real ones have fewer than 300

# Companions that do not affect a weight's value: scales of activations, and a layout that only int8 kernels use.
IGNORED_COMPANIONS = ("scale_input", "input_scale", "comfy_quant", "weight_format")
FOREIGN_COMPANIONS = ("weight_scale", "weight_scale_2", "pre_quant_scale", "smooth_factor", "weight_zero")


def stored_tensors(owners: Mapping[str, TensorFile]) -> dict[str, Stored]:
    """The logical tensors of the files: companions, such as scales, are merged into the tensor they belong to.

    owners maps each key to its file. Raises WrongRequest if the companions of a 4-bit weight are damaged, or if one
    tensor has two names.
    """
    tensors: dict[str, Stored] = {}
    companions = {key for key in owners if key.rpartition(".")[2] == "scaled_fp8"}
    formats = _comfy_formats(owners)
    for key, file in owners.items():
        if isinstance(file, Checkpoint):
            tensors[key] = _of_safetensors(file, key, owners, formats, companions)
        elif isinstance(file, GgufFile):
            if (name := gguf_name(key)) in tensors:
                what = f"has one tensor under two names ({printable(key)}, {printable(name)})"
                refuse(file.path, what, "remove one of them")
            tensors[name] = _of_gguf(file, key)
    return {key: stored for key, stored in tensors.items() if key not in companions}


def _of_gguf(file: GgufFile, key: str) -> Stored:
    if file.types[key] in GGUF_PLAIN:
        return Plain(file, key, GGUF_PLAIN[file.types[key]])
    dimensions = len(file.shape(key))
    if file.types[key] in GGUF_BLOCKS and dimensions == 2:
        return Blocks(file, key)
    return Foreign(file, key, f"GGUF's {file.types[key]}" + (f" in {dimensions} dimensions" if dimensions != 2 else ""))


def _of_safetensors(
    file: Checkpoint, key: str, owners: Mapping[str, TensorFile], formats: Mapping[str, str], companions: set[str]
) -> Stored:
    """The tensor `key`; the keys of its companions are added to `companions`."""
    layer = key.removesuffix(".weight")
    if layer == key:
        return Plain(file, key, file.dtype(key))

    def existing(*names: str) -> list[str]:
        """Those of `names` that exist; they are companions of this tensor."""
        keys = [name for name in names if name in owners]
        companions.update(keys)
        return keys

    def plain(name: str) -> Plain:
        owner = owners[name]
        assert isinstance(owner, Checkpoint)
        return Plain(owner, name, owner.dtype(name))

    existing(*(f"{layer}.{name}" for name in IGNORED_COMPANIONS))
    if state := existing(*(f"{key}.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4"))):
        existing(*(f"{key}.{part}" for part in ("absmax", "quant_map", *NESTED)))
        return FourBits(file, key, state[0].rpartition("__")[2], _json(owners, state[0]), owners)
    if largest := existing(f"{layer}.SCB", f"{key}.SCB"):
        return EightBits(plain(key), plain(largest[0]))
    format = formats.get(layer, "nvfp4" if f"{layer}.weight_scale_2" in owners else None)
    if format is not None and format not in COMFY_FP8:
        existing(*(f"{layer}.{name}" for name in FOREIGN_COMPANIONS))
        return Foreign(file, key, printable(format))
    if scale := existing(f"{layer}.scale_weight", f"{layer}.weight_scale"):
        return Scaled(plain(key), plain(scale[0]))
    return plain(key)


def _comfy_formats(owners: Mapping[str, TensorFile]) -> dict[str, str]:
    """Layer -> the name of its format, as Comfy's newer files state it: in the header, or next to the weight."""
    formats: dict[str, str] = {}
    for file in dict.fromkeys(owners.values()):
        if text := file.metadata.get("_quantization_metadata"):
            layers = _parsed(file, "_quantization_metadata", text).get("layers")
            if not isinstance(layers, dict):
                damaged(file, "_quantization_metadata", "it has no layers")
            formats |= {layer: _format(file, layer, about) for layer, about in layers.items()}
    for key, file in owners.items():
        if key.endswith(".comfy_quant"):
            layer = key.removesuffix(".comfy_quant")
            formats[layer] = _format(file, key, _json(owners, key))
    return formats


def _format(file: TensorFile, key: str, about: Any) -> str:
    format = about.get("format") if isinstance(about, dict) else None
    return format if isinstance(format, str) else damaged(file, key, "it has no format")


def _json(owners: Mapping[str, TensorFile], key: str) -> dict[str, Any]:
    """The JSON object in the bytes of a tensor."""
    file = owners[key]
    if file.size(key) > MAX_STATE_BYTES:
        damaged(file, key, f"{file.size(key):,} bytes, the limit is {MAX_STATE_BYTES:,}")
    return _parsed(file, key, file.read(key).numpy().tobytes())


def _parsed(file: TensorFile, key: str, text: str | bytes) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        damaged(file, key, printable(str(error)))
    if not isinstance(content, dict):
        damaged(file, key, f"a JSON {type(content).__name__}, not an object")
    return content
