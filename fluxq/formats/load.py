"""Model files to models on a device: the transformer in its stored format, the autoencoder, the text encoders."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fluxq.formats import detect
from fluxq.formats.files import Checkpoint, refuse, strict_load
from fluxq.formats.tokenizers import load_clip_tokenizer, load_t5_tokenizer
from fluxq.formats.weights import StoredWeights
from fluxq.model.autoencoder import AutoEncoder
from fluxq.model.flux import Flux
from fluxq.model.linear import Linear
from fluxq.model.text import CLIP_LENGTH, STATES_BYTES, TextEncoders
from fluxq.model.text_layers import ClipEncoder, T5Encoder


def load_flux(path: Path, format: str, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Flux:
    """The transformer of a file in the original layout, computing in `dtype`.

    The matrices of the blocks are stored as `format`; what lies outside the blocks, and every vector, stays in `dtype`.
    One tensor at a time is read, moved to `device` and quantised there. Raises WrongRequest for any other file.
    """
    checkpoint = Checkpoint(path)
    names = detect.flux_keys(checkpoint.keys(), path)
    with torch.device("meta"):
        flux = Flux(detect.flux_config(checkpoint.shapes, path))
    for name, key in names.items():
        owner, _, leaf = name.rpartition(".")
        module, tensor = flux.get_submodule(owner), checkpoint.get(key).to(device)
        if isinstance(module, Linear) and leaf == "weight" and "_blocks." in name:
            module.store(tensor.to(dtype), format)
        else:
            setattr(module, leaf, tensor.to(dtype))
    return flux.eval()


def load_autoencoder(path: Path, device: torch.device, dtype: torch.dtype = torch.float32) -> AutoEncoder:
    """The autoencoder of a file in the original layout, in `dtype`. Raises WrongRequest for any other file."""
    checkpoint = Checkpoint(path)
    with torch.device("meta"):
        autoencoder = AutoEncoder(detect.autoencoder_config(checkpoint.shapes, path))
    _load(autoencoder, checkpoint, detect.autoencoder_keys(checkpoint.keys(), path), device, dtype)
    return autoencoder.eval().requires_grad_(False)


def load_text_encoders(
    clip_l: Path,
    t5xxl: Path,
    clip_tokenizer: Sequence[Path],
    t5_tokenizer: Sequence[Path],
    length: int,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> TextEncoders:
    """CLIP-L (fp32) and T5's encoder with their tokenizers, at a T5 length of `length` tokens.

    Headers alone are read: the encoders read their weights block by block when captions are given to them. T5 computes
    in `dtype`: by default in bf16, and in fp32 on processors that have no fast bf16. The tokenizers' files are as
    `find_tokenizers` gives them. Raises WrongRequest for a file that is not what its name says.
    """
    if dtype is None:
        slow = device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
        dtype = torch.float32 if slow else torch.bfloat16
    checkpoint = Checkpoint(clip_l)
    sizes = detect.clip_config(checkpoint.shapes, clip_l)
    if sizes["max_position_embeddings"] < CLIP_LENGTH:
        what = f"has {sizes['max_position_embeddings']} positions, where {CLIP_LENGTH} are wanted"
        refuse(clip_l, what, f"give {detect.EXAMPLES[detect.CLIP]}")
    weights = StoredWeights(checkpoint, detect.clip_keys(checkpoint.keys(), clip_l), device, torch.float32)
    clip = ClipEncoder(weights, sizes["num_hidden_layers"], sizes["num_attention_heads"])

    checkpoint = Checkpoint(t5xxl)
    sizes = detect.t5_config(checkpoint.shapes, t5xxl)
    weights = StoredWeights(checkpoint, detect.t5_keys(checkpoint.keys(), t5xxl), device, dtype)
    t5 = T5Encoder(weights, sizes["num_layers"], sizes["num_heads"])

    clip_tokenize, clip_ids = load_clip_tokenizer(clip_tokenizer)
    group = max(1, STATES_BYTES.get(device.type, STATES_BYTES["cpu"]) // (length * sizes["d_model"] * dtype.itemsize))
    return TextEncoders(t5, clip, load_t5_tokenizer(t5_tokenizer), clip_tokenize, clip_ids, length, group)


def _load(
    module: torch.nn.Module, checkpoint: Checkpoint, names: dict[str, str], device: torch.device, dtype: torch.dtype
) -> None:
    tensors: Iterable[tuple[str, Tensor]] = ((name, checkpoint.get(key)) for name, key in names.items())
    strict_load(module, {name: tensor.to(device, dtype) for name, tensor in tensors}, checkpoint.path)
