"""Model files to models on a device: the transformer in its stored format, the autoencoder, the text encoders."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from fluxq.errors import WrongRequest
from fluxq.formats import detect
from fluxq.formats.files import Checkpoint, strict_load
from fluxq.formats.source import open_autoencoder, open_flux
from fluxq.kernels import quantize
from fluxq.model.autoencoder import AutoEncoder
from fluxq.model.flux import Flux
from fluxq.model.linear import Linear
from fluxq.model.text import TextEncoders, Tokenize
from fluxq.quiet import quiet_imports


def load_flux(path: Path, format: str, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Flux:
    """The transformer at `path`, a file or a folder in either layout, computing in `dtype`.

    The matrices of the blocks are stored as `format`; what lies outside the blocks, and every vector, stays in `dtype`.
    One tensor at a time is read, moved to `device` and quantised there. Raises WrongRequest as `open_flux` does.
    """
    source = open_flux(path)
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
    clip_l: Path, t5xxl: Path, clip_tokenizer: Path, t5_tokenizer: Path, length: int, device: torch.device
) -> TextEncoders:
    """CLIP-L (fp32) and T5's encoder (bf16) with their tokenizers, at a T5 length of `length` tokens.

    clip_tokenizer is a folder with vocab.json and merges.txt; t5_tokenizer a spiece.model. Raises WrongRequest for a
    file that is not what its name says.
    """
    with quiet_imports():  # late: it takes seconds
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel

    checkpoint = Checkpoint(clip_l)
    with torch.device("meta"):
        clip = CLIPTextModel(CLIPTextConfig(**detect.clip_config(checkpoint.shapes, clip_l), bos_token_id=None))
    clip.embeddings.register_buffer(
        "position_ids", torch.arange(clip.config.max_position_embeddings, device=device)[None], persistent=False
    )
    _load(clip, checkpoint, detect.clip_keys(checkpoint.keys(), clip_l), device, torch.float32)

    checkpoint = Checkpoint(t5xxl)
    with torch.device("meta"):
        t5 = T5EncoderModel(T5Config(**detect.t5_config(checkpoint.shapes, t5xxl)))
    _load(t5, checkpoint, detect.t5_keys(checkpoint.keys(), t5xxl), device, torch.bfloat16)

    try:
        vocabulary = CLIPTokenizer(vocab=str(clip_tokenizer / "vocab.json"), merges=str(clip_tokenizer / "merges.txt"))
    except (OSError, ValueError) as error:
        raise WrongRequest(f"{clip_tokenizer} holds no usable vocab.json and merges.txt for CLIP: {error}") from error

    def clip_tokenize(caption: str) -> list[int]:
        return vocabulary(caption, add_special_tokens=False, verbose=False)["input_ids"]

    return TextEncoders(
        t5.eval().requires_grad_(False),
        clip.eval().requires_grad_(False),
        _t5_tokenizer(t5_tokenizer),
        clip_tokenize,
        (cast(int, vocabulary.bos_token_id), cast(int, vocabulary.eos_token_id)),
        length,
    )


def _load(
    module: torch.nn.Module, checkpoint: Checkpoint, names: dict[str, str], device: torch.device, dtype: torch.dtype
) -> None:
    tensors: Iterable[tuple[str, Tensor]] = ((name, checkpoint.get(key)) for name, key in names.items())
    strict_load(module, {name: tensor.to(device, dtype) for name, tensor in tensors}, checkpoint.path)


def _t5_tokenizer(path: Path) -> Tokenize:
    from sentencepiece import SentencePieceProcessor

    try:
        processor = SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise WrongRequest(f"{path} is no usable SentencePiece model (spiece.model) for T5: {error}") from error
    return processor.encode
