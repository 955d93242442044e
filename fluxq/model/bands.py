"""The autoencoder in bands of rows: the same result as on whole maps, in two fifths of the memory.

Feature maps are computed lazily, a few rows at a time; each convolution requests one more row on either side. A group
norm needs the mean and variance of the whole map, so it first computes its input once just to measure it. To limit the
repeated work, one map per residual block is stored, and what is in between is computed up to three times. The attention
in the middle stores its keys and values and takes its queries band by band. Nothing is approximated and there are no
seams; only the rounding of sums differs. No gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .autoencoder_layers import AttnBlock, Decoder, Encoder, Level, Middle, ResnetBlock


@dataclass(frozen=True)
class FeatureMap:
    """A lazy feature map (B, C, height, W): `rows(a, b)` computes rows a to b, best `band` of them at a time."""

    height: int
    rows: Callable[[int, int], Tensor]
    band: int

    def bands(self) -> Iterator[tuple[int, int]]:
        yield from ((a, min(a + self.band, self.height)) for a in range(0, self.height, self.band))

    def derive(self, rows: Callable[[int, int], Tensor], height: int | None = None) -> FeatureMap:
        """A map whose rows are computed from this one."""
        return FeatureMap(self.height if height is None else height, rows, self.band)


@torch.no_grad()
def encode(encoder: Encoder, images: Tensor, band: int) -> Tensor:
    """encoder(images), computed `band` rows of each feature map at a time."""
    x = _middle(encoder.mid, _levels(encoder.down, _conv(encoder.conv_in, _stored(images, band))))
    return _all_rows(_conv(encoder.conv_out, _norm(encoder.norm_out, x)))


@torch.no_grad()
def decode(decoder: Decoder, z: Tensor, band: int) -> Tensor:
    """decoder(z), computed `band` rows of each feature map at a time."""
    x = _levels(reversed(decoder.up), _middle(decoder.mid, _conv(decoder.conv_in, _stored(z, band))))
    return _all_rows(_conv(decoder.conv_out, _norm(decoder.norm_out, x)))


def _levels(levels: Iterable[nn.Module], x: FeatureMap) -> FeatureMap:
    """Stores the map after each block; around a resampling, the smaller one."""
    for level in cast("Iterable[Level]", levels):
        for i, block in enumerate(cast("Iterable[ResnetBlock]", level.block), start=1):
            x = _resnet(block, x)
            if i == len(level.block) and hasattr(level, "downsample"):
                x = _down(level.downsample.conv, x)
            x = _stored(_all_rows(x), x.band)
        if hasattr(level, "upsample"):
            x = _up(level.upsample.conv, x)
    return x


def _middle(middle: Middle, x: FeatureMap) -> FeatureMap:
    x = _stored(_all_rows(_resnet(middle.block_1, x)), x.band)
    x = _stored(_all_rows(_attention(middle.attn_1, x)), x.band)
    return _stored(_all_rows(_resnet(middle.block_2, x)), x.band)


def _stored(x: Tensor, band: int) -> FeatureMap:
    return FeatureMap(x.shape[2], lambda a, b: x[:, :, a:b], band)


def _all_rows(x: FeatureMap) -> Tensor:
    """The whole map, assembled from its bands."""
    first = x.rows(*next(x.bands()))
    whole = first.new_empty(*first.shape[:2], x.height, first.shape[3])
    whole[:, :, : first.shape[2]] = first
    for a, b in list(x.bands())[1:]:
        whole[:, :, a:b] = x.rows(a, b)
    return whole


def _resnet(block: ResnetBlock, x: FeatureMap) -> FeatureMap:
    x = _cached(x)
    h = _conv(block.conv1, _norm(block.norm1, x))
    h = _conv(block.conv2, _norm(block.norm2, h))

    def rows(a: int, b: int) -> Tensor:
        inner = h.rows(a, b)  # first: it requests more rows of x than the shortcut, which then finds them cached
        return inner.add_(block.nin_shortcut(x.rows(a, b)))

    return x.derive(rows)


def _attention(attention: AttnBlock, x: FeatureMap) -> FeatureMap:
    h = _norm(attention.norm, x, activation=False)
    k, v = attention.keys_values(_all_rows(h))
    return x.derive(lambda a, b: x.rows(a, b) + attention.attend(h.rows(a, b), k, v))


def _conv(conv: nn.Conv2d, x: FeatureMap) -> FeatureMap:
    """3 x 3 convolution, zero-padded."""

    def rows(a: int, b: int) -> Tensor:
        above, below = int(a == 0), int(b == x.height)
        own = x.rows(a - 1 + above, b + 1 - below)
        return F.conv2d(F.pad(own, (0, 0, above, below)), conv.weight, conv.bias, padding=(0, 1))

    return x.derive(rows)


def _down(conv: nn.Conv2d, x: FeatureMap) -> FeatureMap:
    """3 x 3 convolution with stride 2, zero-padded at the right and bottom."""

    def rows(a: int, b: int) -> Tensor:
        end = min(2 * b + 1, x.height)
        return F.conv2d(F.pad(x.rows(2 * a, end), (0, 1, 0, 2 * b + 1 - end)), conv.weight, conv.bias, stride=2)

    return x.derive(rows, x.height // 2)


def _up(conv: nn.Conv2d, x: FeatureMap) -> FeatureMap:
    """Nearest-neighbor upsampling by 2, then a 3 x 3 convolution."""

    def rows(a: int, b: int) -> Tensor:
        doubled = F.interpolate(x.rows(a // 2, (b + 1) // 2), scale_factor=2.0, mode="nearest")
        return doubled[:, :, a % 2 : a % 2 + b - a]

    return _conv(conv, x.derive(rows, 2 * x.height))


def _norm(norm: nn.GroupNorm, x: FeatureMap, activation: bool = True) -> FeatureMap:
    """Group norm with the statistics of the whole map, then SiLU."""
    mean, variance = _statistics(x, norm.num_groups)  # (B, G) fp64
    each = norm.num_channels // norm.num_groups
    gain = norm.weight * (variance + norm.eps).rsqrt().repeat_interleave(each, 1)
    shift = (norm.bias - mean.repeat_interleave(each, 1) * gain).float()[:, :, None, None]  # (B, C, 1, 1)
    gain = gain.float()[:, :, None, None]

    def rows(a: int, b: int) -> Tensor:
        own = x.rows(a, b)
        normed = torch.addcmul(shift, own, gain).to(own.dtype)
        return F.silu(normed, inplace=True) if activation else normed

    return x.derive(rows)


def _statistics(x: FeatureMap, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and variance (B, G) fp64 of each group of channels, combined from those of bands (Chan et al. 1983)."""
    count, mean, squares = 0, torch.zeros(()), torch.zeros(())
    for a, b in x.bands():
        own = x.rows(a, b).float().unflatten(1, (groups, -1)).flatten(2)  # (B, G, C/G * rows * W)
        variance, center = (part.double() for part in torch.var_mean(own, dim=2, correction=0))
        size = own.shape[2]
        shift = center - mean.to(center)
        mean = mean.to(center) + shift * size / (count + size)
        squares = squares.to(center) + variance * size + shift**2 * count * size / (count + size)
        count += size
    return mean, squares / count


def _cached(x: FeatureMap) -> FeatureMap:
    """`x` with the last computed rows cached, so that requests within them are free."""
    last: tuple[int, int, Tensor] | None = None

    def rows(a: int, b: int) -> Tensor:
        nonlocal last
        if last is None or not last[0] <= a < b <= last[1]:
            last = None  # frees the old rows before computing new ones
            last = a, b, x.rows(a, b)
        return last[2][:, :, a - last[0] : b - last[0]]

    return x.derive(rows)
