"""The FLUX.1 autoencoder: images (B, 3, 8 h, 8 w) in -1..1 <-> latents (B, 16, h, w).

It is frozen and runs outside the training step: on all rows of a feature map at once, or band by band, which needs
less memory and gives the same result (bands.py).
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from fluxq.console import Notify
from fluxq.errors import is_out_of_memory

from . import bands
from .autoencoder_layers import Decoder, Encoder
from .config import AutoEncoderConfig

T = TypeVar("T")
BANDS = (32, 8)  # rows at a time; fewer rows save no more memory


def within_memory(autoencoder: AutoEncoder, run: Callable[[], T], notify: Notify) -> T:
    """run(), which uses `autoencoder`. If the GPU runs out of memory, give back what torch does not use and retry;
    after that, retry in narrower bands and keep those. Only bands change the result, within rounding.

    Raises the last error if the narrowest bands do not fit either.
    """
    repeated = False
    while True:
        try:
            return run()
        except RuntimeError as error:
            before = autoencoder.band
            if not is_out_of_memory(error) or (repeated and before is not None and before <= BANDS[-1]):
                raise
        # Outside the except block: the traceback, which holds the failed attempt's feature maps, is freed.
        gc.collect()
        torch.cuda.empty_cache()
        if not repeated:
            repeated = True
            continue
        band = next(band for band in BANDS if before is None or band < before)
        autoencoder.in_bands(band)
        notify(f"the GPU has too little memory for the autoencoder; from here on it works on {band} rows at a time")


class AutoEncoder(nn.Module):
    """Images <-> latents = scale_factor * (z - shift_factor)."""

    band: int | None = None  # rows of a feature map at once; None: all

    def __init__(self, config: AutoEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.requires_grad_(False)

    def in_bands(self, band: int | None) -> AutoEncoder:
        """Work on `band` rows of a feature map at a time from now on; None: all at once. Returns itself.

        Bands take less memory and more time; results are the same within rounding. There are no gradients in bands.
        """
        self.band = band
        return self

    def moments(self, images: Tensor) -> Tensor:
        """Mean and log variance (B, 2 z, h, w) of images (B, 3, 8 h, 8 w) in -1..1."""
        return self.encoder(images) if self.band is None else bands.encode(self.encoder, images, self.band)

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Latents (B, z, h, w) of images (B, 3, 8 h, 8 w) in -1..1: sampled with `generator`, or the mean if None."""
        z, log_variance = self.moments(images).chunk(2, dim=1)
        if generator is not None:
            noise = torch.randn(z.shape, generator=generator, dtype=z.dtype).to(z.device)
            z = z + torch.exp(0.5 * log_variance) * noise
        return self.config.scale_factor * (z - self.config.shift_factor)

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, 8 h, 8 w) in about -1..1 from latents (B, z, h, w)."""
        z = latents / self.config.scale_factor + self.config.shift_factor
        return self.decoder(z) if self.band is None else bands.decode(self.decoder, z, self.band)
