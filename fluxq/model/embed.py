"""Inputs of the transformer: packed latents, token positions and their RoPE angles, embedded time and guidance."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .linear import Linear


def sinusoid(s: Tensor, width: int = 256) -> Tensor:
    """(B, width) embedding of scalars s (B,), fp32 or wider: cosines, then sines, of 1000 s at falling frequencies."""
    s = s.to(torch.promote_types(s.dtype, torch.float32))
    half = width // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, dtype=s.dtype, device=s.device) / half)
    angles = 1000 * s[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class MLPEmbedder(nn.Module):
    """(B, in_dim) -> (B, hidden): two linear layers with SiLU between."""

    def __init__(self, in_dim: int, hidden: int) -> None:
        super().__init__()
        self.in_layer = Linear(in_dim, hidden)
        self.out_layer = Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


def rope_angles(ids: Tensor, axes_dim: tuple[int, ...], theta: int) -> tuple[Tensor, Tensor]:
    """cos and sin (B or 1, 1, L, D/2), fp32, of every token's angles; ids (B, L, axes) or (L, axes) are positions.

    Angles are computed in fp64: positions reach the hundreds, where fp32 loses digits.
    """
    positions = ids.double() if ids.ndim == 3 else ids.double()[None]
    angles = [
        positions[..., axis, None] * theta ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=ids.device) / dim)
        for axis, dim in enumerate(axes_dim)
    ]
    joint = torch.cat(angles, dim=-1)[:, None]  # (B, 1, L, D/2)
    return joint.cos().float(), joint.sin().float()


def image_ids(height: int, width: int, device: torch.device | str | None = None) -> Tensor:
    """(height * width, 3) positions (0, row, column) of an image of height x width tokens."""
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    rows, columns = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1).float()


def text_ids(length: int, device: torch.device | str | None = None) -> Tensor:
    """(length, 3) positions of text tokens: all zero."""
    return torch.zeros(length, 3, device=device)


def pack(latents: Tensor) -> Tensor:
    """(B, C, H, W) latents -> (B, H/2 W/2, 4 C) tokens of 2 x 2 latents; channel index c * 4 + row * 2 + column."""
    b, c, h, w = latents.shape
    return latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h // 2 * (w // 2), c * 4)


def unpack(img: Tensor, height: int, width: int) -> Tensor:
    """(B, L, 4 C) tokens -> (B, C, height, width) latents: the inverse of `pack`."""
    b, _, c4 = img.shape
    grid = img.view(b, height // 2, width // 2, c4 // 4, 2, 2)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(b, c4 // 4, height, width)
