"""Model files to models on a device: the transformer in its stored format, the autoencoder, the text encoders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from fluxq.formats.detect import CLIP, EXAMPLES
from fluxq.formats.files import refuse, strict_load
from fluxq.formats.source import Source, open_autoencoder, open_clip, open_flux, open_t5
from fluxq.formats.tokenizers import load_clip_tokenizer, load_t5_tokenizer
from fluxq.formats.weights import StoredWeights
from fluxq.kernels import quantize
from fluxq.model.autoencoder import AutoEncoder
from fluxq.model.config import FluxConfig
from fluxq.model.flux import Flux
from fluxq.model.linear import Linear
from fluxq.model.text import CLIP_LENGTH, STATES_BYTES, TextEncoders
from fluxq.model.text_layers import ClipEncoder, T5Encoder


def load_flux(
    path: Path | Source[FluxConfig], format: str, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> Flux:
    """The transformer at `path`, a file or a folder in either layout, or of a source, computing in `dtype`.

    The matrices of the blocks are stored as `format`; what lies outside the blocks, and every vector, stays in `dtype`.
    One tensor at a time is read, moved to `device` and quantised there. Raises WrongRequest as `open_flux` does.
    """
    source = open_flux(path) if isinstance(path, Path) else path
    with torch.device("meta"):
        flux = Flux(source.config)
    for name in source.shapes:
        owner, _, leaf = name.rpartition(".")
        module, tensor = flux.get_submodule(owner), source.value(name, dtype, device)
        if isinstance(module, Linear) and leaf == "weight" and "_blocks." in name:
            module.store(quantize(tensor, format))
        else:
            setattr(module, leaf, tensor)
    return flux.eval()


def load_autoencoder(path: Path, device: torch.device, dtype: torch.dtype = torch.float32) -> AutoEncoder:
    """The autoencoder at `path`, a file or a folder in either layout, in `dtype`. Raises WrongRequest as
    `open_autoencoder` does.
    """
    source = open_autoencoder(path)
    with torch.device("meta"):
        autoencoder = AutoEncoder(source.config)
    strict_load(autoencoder, {name: source.value(name, dtype, device) for name in source.shapes}, source.path)
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
        mkldnn = torch.backends.mkldnn.is_available()  # absent on some Arm builds
        fast = mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        slow = device.type == "cpu" and not fast
        dtype = torch.float32 if slow else torch.bfloat16
    clip_source, t5_source = open_clip(clip_l), open_t5(t5xxl)
    sizes = clip_source.config
    if sizes["max_position_embeddings"] < CLIP_LENGTH:
        what = f"has {sizes['max_position_embeddings']} positions, where {CLIP_LENGTH} are wanted"
        refuse(clip_l, what, f"give {EXAMPLES[CLIP]}")
    weights = StoredWeights(clip_source, device, torch.float32)
    clip = ClipEncoder(weights, sizes["num_hidden_layers"], sizes["num_attention_heads"])
    sizes = t5_source.config
    t5 = T5Encoder(StoredWeights(t5_source, device, dtype), sizes["num_layers"], sizes["num_heads"])

    clip_tokenize, clip_ids = load_clip_tokenizer(clip_tokenizer)
    group = max(1, STATES_BYTES.get(device.type, STATES_BYTES["cpu"]) // (length * sizes["d_model"] * dtype.itemsize))
    return TextEncoders(t5, clip, load_t5_tokenizer(t5_tokenizer), clip_tokenize, clip_ids, length, group)
