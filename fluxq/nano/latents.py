"""What pretraining needs with plain modules: images to packed latents and back, and sampling."""

import math
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

SCALE, SHIFT = 0.3611, 0.1159  # FLUX's latents are SCALE * (z - SHIFT)


def as_tensor(images: list) -> Tensor:
    """Pillow images -> (N, 3, H, W) uint8."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def encode(autoencoder: Any, images: Tensor) -> Tensor:
    """(B, 3, H, W) uint8 -> latents (B, 16, H/8, W/8), the mean of the distribution."""
    x = (images / 127.5 - 1).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        mean = autoencoder.encoder(x).chunk(2, dim=1)[0].float()
    return SCALE * (mean - SHIFT)


@torch.no_grad()
def decode(autoencoder: Any, latents: Tensor) -> Tensor:
    """Latents -> (B, 3, H, W) uint8."""
    y = autoencoder.decoder((latents / SCALE + SHIFT).contiguous(memory_format=torch.channels_last))
    return ((y.clamp(-1, 1) + 1) * 127.5).round().byte()


def pack(latents: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H/2 * W/2, 4C), channel index c * 4 + row * 2 + column."""
    B, C, H, W = latents.shape
    return latents.view(B, C, H // 2, 2, W // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(B, -1, 4 * C)


def unpack(img: Tensor, rows: int = 6, columns: int = 6) -> Tensor:
    """The inverse of `pack`."""
    B, _, width = img.shape
    x = img.view(B, rows, columns, width // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(B, width // 4, 2 * rows, 2 * columns)


def schedule(steps: int, tokens: int = 36) -> list[float]:
    """FLUX.1-dev's `steps` + 1 timesteps from 1 to 0, shifted by a mu that is linear in the number of image tokens."""
    mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
    return [math.exp(mu) / (math.exp(mu) + 1 / t - 1) if t else 0.0 for t in torch.linspace(1, 0, steps + 1).tolist()]


@torch.no_grad()
def sample(
    model: nn.Module, ids: Tensor, guidance: float, seed: int, cfg: float = 1.0, empty: Tensor | None = None
) -> Tensor:
    """Packed latents (B, 36, 64) after 20 Euler steps. `cfg` other than 1: classifier-free guidance against `empty`."""
    x = torch.randn(len(ids), 36, 64, generator=torch.Generator().manual_seed(seed))
    times = schedule(20)
    for t, after in zip(times[:-1], times[1:], strict=True):
        now, g = torch.full((len(x),), t), torch.full((len(x),), guidance)
        v = model(x, ids, now, g).float()
        if cfg != 1.0 and empty is not None:
            plain = model(x, empty.expand_as(ids), now, g).float()
            v = plain + cfg * (v - plain)
        x = x + (after - t) * v
    return x


def contact_sheet(images: Tensor, columns: int = 8) -> Image.Image:
    """(N, 3, H, W) uint8 -> one image, filled row by row, with gaps of two pixels."""
    N, _, H, W = images.shape
    sheet = Image.new("RGB", (columns * (W + 2), -(-N // columns) * (H + 2)))
    for i, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        sheet.paste(Image.fromarray(image), (i % columns * (W + 2), i // columns * (H + 2)))
    return sheet
