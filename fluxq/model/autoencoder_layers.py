"""Encoder and decoder of the FLUX.1 autoencoder, with the parameter names of the original file.

Convolutional, with one attention layer in the middle (Esser et al. 2021; black-forest-labs/flux `autoencoder.py`).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .config import AutoEncoderConfig


class ResnetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class AttnBlock(nn.Module):
    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.attend(h, *self.keys_values(h))

    def keys_values(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, 1, h w, C) of normed features (B, C, h, w)."""
        return _tokens(self.k(h)), _tokens(self.v(h))

    def attend(self, h: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention output (B, C, h, w) for queries from normed features (B, C, h, w): all rows of the map, or some."""
        attended = F.scaled_dot_product_attention(_tokens(self.q(h)), k, v)
        return self.proj_out(attended[:, 0].mT.reshape(h.shape))


def _tokens(x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, 1, h w, C), contiguous: otherwise attention would materialize the score matrix."""
    return x.flatten(2).mT[:, None].contiguous()


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The residual blocks of one resolution, then `resample` unless it is the last."""

    def __init__(
        self, in_channels: int, out_channels: int, blocks: int, groups: int, resample: type[nn.Module] | None
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * blocks
        self.block = nn.ModuleList(ResnetBlock(a, b, groups) for a, b in zip(widths, widths[1:], strict=False))
        if resample is Downsample:
            self.downsample = Downsample(out_channels)
        if resample is Upsample:
            self.upsample = Upsample(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        for module in self.children():
            for layer in module if isinstance(module, nn.ModuleList) else [module]:
                x = layer(x)
        return x


class Middle(nn.Module):
    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups)
        self.attn_1 = AttnBlock(channels, groups)
        self.block_2 = ResnetBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Images (B, 3, 8 h, 8 w) -> moments (B, 2 z, h, w): mean, then log variance."""

    def __init__(self, config: AutoEncoderConfig) -> None:
        super().__init__()
        widths = [config.ch, *(config.ch * m for m in config.ch_mult)]
        last = len(config.ch_mult) - 1
        self.conv_in = nn.Conv2d(config.in_channels, config.ch, 3, padding=1)
        self.down = nn.ModuleList(
            Level(widths[i], widths[i + 1], config.num_res_blocks, config.groups, Downsample if i < last else None)
            for i in range(last + 1)
        )
        self.mid = Middle(widths[-1], config.groups)
        self.norm_out = nn.GroupNorm(config.groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """z (B, z, h, w) -> images (B, 3, 8 h, 8 w). `up` lists levels by resolution, highest first, and runs backward."""

    def __init__(self, config: AutoEncoderConfig) -> None:
        super().__init__()
        widths = [config.ch * m for m in config.ch_mult]
        inner = [*widths[1:], widths[-1]]  # input width of each level
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], config.groups)
        self.up = nn.ModuleList(
            Level(inner[i], widths[i], config.num_res_blocks + 1, config.groups, Upsample if i > 0 else None)
            for i in range(len(widths))
        )
        self.norm_out = nn.GroupNorm(config.groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], config.out_ch, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))
