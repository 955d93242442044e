"""Latents to images: the autoencoder decodes one image at a time, after the transformer has finished all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from PIL import Image
from torch import Tensor

from fluxq.console import Notify, silent
from fluxq.memory.phases import SamplingLimits, band_for
from fluxq.model.autoencoder import AutoEncoder, within_memory
from fluxq.model.flux import Flux

from .denoising import Texts, denoise
from .requests import Request


def sample_images(
    flux: Flux,
    load: Callable[[int | None], AutoEncoder],
    texts: Texts,
    requests: Sequence[Request],
    progress: Callable[[int, int], None] = lambda done, total: None,
    limits: SamplingLimits | None = None,
    notify: Notify = silent,
) -> list[Image.Image]:
    """The images of `requests`, in order.

    load: (rows to process at a time, None for all) -> the autoencoder. texts, progress: see `denoise`.
    """
    limits = limits or SamplingLimits()
    return decode_images(load, denoise(flux, texts, requests, progress, limits.tokens), limits.decoding_bytes, notify)


@torch.no_grad()
def decode_images(
    load: Callable[[int | None], AutoEncoder], latents: Iterable[Tensor], most_bytes: int | None, notify: Notify
) -> list[Image.Image]:
    """The images of latents (16, H/8, W/8). most_bytes: the GPU memory for the autoencoder, None for no limit."""
    latents = list(latents)
    autoencoder = load(band_for(max(x[0].numel() for x in latents) * 64, most_bytes))
    return [
        to_image(within_memory(autoencoder, partial(decode_latents, autoencoder, x[None]), notify)[0]) for x in latents
    ]


def decode_latents(autoencoder: AutoEncoder, latents: Tensor) -> Tensor:
    """Images (B, 3, H, W) in -1..1 from latents (B, 16, H/8, W/8)."""
    weight = autoencoder.decoder.conv_in.weight
    return autoencoder.decode(latents.to(weight.device, weight.dtype)).float().clamp(-1, 1)


def to_image(x: Tensor) -> Image.Image:
    """A PIL image from a tensor (3, H, W) in -1..1."""
    return Image.fromarray(((x + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy())
