"""Load models from files onto a device: the transformer in its stored format, the autoencoder, the text encoders."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from fluxq.kernels import quantize
from fluxq.model.autoencoder import AutoEncoder
from fluxq.model.clip import Clip
from fluxq.model.config import FluxConfig
from fluxq.model.flux import Flux
from fluxq.model.linear import Linear
from fluxq.model.text import CLIP_LENGTH, STATES_BYTES, TextEncoders, clip_tokens
from fluxq.model.text_layers import TOKENS_PER_BATCH, ClipEncoder, T5Encoder, clip_units, t5_units
from fluxq.offload import Streams

from .checkpoint.detect import CLIP, EXAMPLES
from .checkpoint.files import refuse, strict_load
from .checkpoint.source import Source, open_autoencoder, open_clip, open_flux, open_t5
from .tokenizers import load_clip_tokenizer, load_t5_tokenizer
from .weights import StoredWeights, StreamedWeights, streamed

ENCODER_SLOTS = 2  # a block of T5-XXL takes 386 MB; reading the file is the bottleneck, so more slots would not help


def load_flux(
    path: Path | Source[FluxConfig], format: str, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> Flux:
    """The transformer at `path` (a file or a folder in either layout) or of a source, computing in `dtype`.

    The matrices of the blocks are stored in `format`; vectors, and everything outside the blocks, are in `dtype`.
    Tensors are read, moved to `device` and quantized there one at a time. Raises WrongRequest as `open_flux` does.
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
    """The autoencoder at `path`, a file or a folder in either layout, in `dtype`.

    Raises WrongRequest as `open_autoencoder` does.
    """
    source = open_autoencoder(path)
    with torch.device("meta"):
        autoencoder = AutoEncoder(source.config)
    strict_load(autoencoder, {name: source.value(name, dtype, device) for name in source.shapes}, source.path)
    return autoencoder.eval().requires_grad_(False)


def load_clip(clip_l: Path, tokenizer: Sequence[Path], device: torch.device, dtype: torch.dtype | None = None) -> Clip:
    """CLIP-L with its tokenizer, entirely on `device`, for training.

    By default in bf16 on a GPU, like the transformer, and in fp32 on a CPU. `tokenizer` are files from
    `find_tokenizers`. Raises WrongRequest as `open_clip` does.
    """
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    source = open_clip(clip_l)
    tokenize, special = load_clip_tokenizer(tokenizer)
    with torch.device("meta"):
        clip = Clip(source.config, partial(clip_tokens, tokenize=tokenize, special=special))
    strict_load(clip, {name: source.value(name, dtype, device) for name in source.shapes}, source.path)
    return clip.eval()


def load_text_encoders(
    clip_l: Path,
    t5xxl: Path,
    clip_tokenizer: Sequence[Path],
    t5_tokenizer: Sequence[Path],
    length: int,
    device: torch.device,
    dtype: torch.dtype | None = None,
    slots: int | None = None,
    streams: Streams | None = None,
    poison: bool = False,
    budget: int | None = None,
    masked: bool = False,
) -> TextEncoders:
    """CLIP-L (fp32) and T5's encoder with their tokenizers, at a T5 length of `length` tokens.

    clip_tokenizer, t5_tokenizer   files from `find_tokenizers`
    dtype            what T5 computes in: by default bf16, or fp32 on CPUs without fast bf16
    slots            size of the ring that streams their blocks, by default 2; with 0, the default on CPUs, each block
                     is read when it is needed
    streams, poison  see StreamingRing
    budget           the most bytes of the device to use; to stay within it, fewer captions are encoded at a time, but
                     at least one
    masked           T5 does not see the padding, see TextEncoders

    Raises WrongRequest for a file that is not the model it should be.
    """
    if dtype is None:
        mkldnn = torch.backends.mkldnn.is_available()  # absent on some Arm builds
        fast = mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        slow = device.type == "cpu" and not fast
        dtype = torch.float32 if slow else torch.bfloat16
    clip_source, t5_source = open_clip(clip_l), open_t5(t5xxl)
    sizes = clip_source.config
    if sizes["max_position_embeddings"] < CLIP_LENGTH:
        what = f"has {sizes['max_position_embeddings']} positions, fewer than {CLIP_LENGTH}"
        refuse(clip_l, what, f"use {EXAMPLES[CLIP]}")
    weights = [StoredWeights(clip_source, device, torch.float32), StoredWeights(t5_source, device, dtype)]
    if slots is None:
        slots = 0 if device.type == "cpu" else ENCODER_SLOTS
    if slots:
        units = clip_units(sizes["num_hidden_layers"]), t5_units(t5_source.config["num_layers"])
        weights = streamed(list(zip(weights, units, strict=True)), device, slots, streams, poison)
    clip = ClipEncoder(weights[0], sizes["num_hidden_layers"], sizes["num_attention_heads"])
    sizes = t5_source.config
    t5 = T5Encoder(weights[1], sizes["num_layers"], sizes["num_heads"])

    clip_tokenize, clip_ids = load_clip_tokenizer(clip_tokenizer)
    states = STATES_BYTES.get(device.type, STATES_BYTES["cpu"])
    if budget is not None:
        states = min(states, budget - encoder_bytes(weights[1], length))
    group = max(1, states // (length * sizes["d_model"] * dtype.itemsize))
    return TextEncoders(t5, clip, load_t5_tokenizer(t5_tokenizer), clip_tokenize, clip_ids, length, group, masked)


def encoder_bytes(t5: StoredWeights, length: int) -> int:
    """Bytes that T5 needs on the device besides the states: the ring's slots, one block's values, and temporaries.

    The temporaries are, for a batch of tokens in the feed-forward layers: the states, the normed states, the gate
    twice and its factor; and the bias of the attention scores.
    """
    sizes, shapes = t5.source.config, t5.source.shapes
    width, hidden = sizes["d_model"], sizes["d_ff"]
    (layers,) = t5_units(1).values()
    block = sum(math.prod(shapes[name]) for own in layers.values() for name in own)
    tokens = max(1, TOKENS_PER_BATCH // length) * length
    temporaries = tokens * (2 * width + 3 * hidden) + sizes["num_heads"] * length**2
    slots = t5.ring.slot_bytes if isinstance(t5, StreamedWeights) else 0
    return slots + (block + temporaries) * t5.dtype.itemsize
