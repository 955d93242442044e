"""The ops in plain PyTorch: the definition of correct, and what runs where no kernel does.

Letters: N out, K in, M rows (batch x tokens), R rank, B batch, H heads, L tokens, D head width.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

# The 16 quantiles of a normal distribution that NF4 stores, as bitsandbytes has them (Dettmers et al. 2023, appendix
# E).
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_NF4_BLOCK = 64


def nf4_quantize(w: Tensor) -> tuple[Tensor, Tensor]:
    """NF4 codes (N, K/2) uint8 and scales (N, K/64) fp32 of the (N, K) matrix `w`, the very bytes of bitsandbytes.

    A weight divided by its block's largest magnitude gets the number of level midpoints below it. A search over 15
    midpoints per weight is slow in PyTorch, so the upper half of the float's bits looks the answer up; in the few table
    cells that contain a midpoint, one comparison decides.
    """
    rows, columns = w.shape
    codes = torch.empty(rows * columns // 2, dtype=torch.uint8, device=w.device)
    absmax = torch.empty(rows * columns // _NF4_BLOCK, dtype=torch.float32, device=w.device)
    below, midpoint = _nf4_tables(w.device)
    flat = w.reshape(-1)
    step = _chunk(w.device)
    for start in range(0, flat.numel(), step):
        chunk = flat[start : start + step].float().view(-1, _NF4_BLOCK)
        largest = chunk.abs().amax(dim=1)
        scaled = (chunk * (1.0 / largest.clamp(min=1e-38)).unsqueeze(1)).clamp_(-1, 1).view(-1)
        cell = (scaled.view(torch.int32) >> 16) + 32768
        code = below.index_select(0, cell).add_(scaled > midpoint.index_select(0, cell))
        pair = code.view(torch.int16)  # little endian: the first weight of a pair is the low byte
        codes[start // 2 : (start + code.numel()) // 2] = ((pair << 4) | (pair >> 8)).to(torch.uint8)
        absmax[start // _NF4_BLOCK : (start + code.numel()) // _NF4_BLOCK] = largest
    return codes.view(rows, columns // 2), absmax.view(rows, columns // _NF4_BLOCK)


@cache
def _nf4_tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """For each upper half of a float (as int16 + 32768): how many midpoints lie below the cell, and the midpoint
    inside it or inf.
    """
    levels = torch.tensor(NF4_LEVELS)
    midpoints = (levels[1:] + levels[:-1]) / 2
    upper = torch.arange(-32768, 32768, dtype=torch.int32) << 16
    ends = torch.stack([upper, upper | 0xFFFF]).view(torch.float32).nan_to_num()
    below = torch.bucketize(ends.amin(0), midpoints)
    inside = torch.bucketize(ends.amax(0), midpoints) > below
    midpoint = torch.where(inside, midpoints[below.clamp(max=14)], torch.inf)
    return below.to(device, torch.uint8), midpoint.to(device)


def nf4_dequantize(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """The (N, K) matrix of NF4 `codes` (N, K/2), `absmax` (N, K/64): level times scale in fp32, rounded once."""
    pairs = _nf4_pairs(codes.device)
    matrix = torch.empty(codes.shape[0], codes.shape[1] * 2, dtype=dtype, device=codes.device)
    blocks, scales, flat = matrix.view(-1, _NF4_BLOCK), absmax.reshape(-1, 1), codes.reshape(-1)
    step = _chunk(codes.device) // _NF4_BLOCK
    for start in range(0, len(blocks), step):
        part = flat[start * _NF4_BLOCK // 2 : (start + step) * _NF4_BLOCK // 2]
        values = pairs.index_select(0, part.int()).view(torch.float32).view(-1, _NF4_BLOCK)
        blocks[start : start + step] = values * scales[start : start + step]
    return matrix


@cache
def _nf4_pairs(device: torch.device) -> Tensor:
    """(256,) int64: both levels of a byte, two fp32 gathered as one number."""
    levels = torch.tensor(NF4_LEVELS, device=device)
    return torch.stack([levels.repeat_interleave(16), levels.repeat(16)], dim=1).view(torch.int64).view(-1)


def row_quantize(w: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`w` (N, K) in 8 bits of `dtype` (int8 or float8_e4m3fn), and the fp32 scales (N,) that bring each row back.

    A row's largest magnitude becomes the largest number of the type; int8 rounds half to even and never uses -128.
    """
    largest = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    values, scale = torch.empty_like(w, dtype=dtype), torch.empty(w.shape[0], device=w.device)
    step = max(1, _chunk(w.device) // w.shape[1])
    for start in range(0, w.shape[0], step):
        rows = w[start : start + step].float()
        scale[start : start + step] = rows.abs().amax(dim=1).clamp(min=1e-30) / largest
        scaled = (rows / scale[start : start + step, None]).clamp_(-largest, largest)
        values[start : start + step] = scaled.round_().to(dtype) if dtype == torch.int8 else scaled.to(dtype)
    return values, scale


def row_dequantize(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The (N, K) matrix of 8-bit `values` (N, K) and row scales (N,): multiplied in fp32, rounded once."""
    matrix = torch.empty_like(values, dtype=dtype)
    step = max(1, _chunk(values.device) // values.shape[1])
    for start in range(0, values.shape[0], step):
        matrix[start : start + step] = values[start : start + step].float() * scale[start : start + step, None]
    return matrix


def _chunk(device: torch.device) -> int:
    """How many weights are handled at a time: what stays in a processor's cache, or what fills a card."""
    return 1 << 18 if device.type == "cpu" else 1 << 24


def unnest_absmax(absmax: Tensor, quant_map: Tensor, nested_absmax: Tensor, offset: float, block: int = 256) -> Tensor:
    """fp32 scales from bitsandbytes' nested ("double quantised") form, which stores them in 8 bits of their own.

    absmax (n,) uint8; quant_map (256,) fp32; nested_absmax (ceil(n/block),) fp32; offset is the mean that was taken
    off.
    """
    scales = nested_absmax.repeat_interleave(block)[: absmax.numel()]
    return quant_map[absmax.long()] * scales + offset


def lora_linear(
    x: Tensor, w: Tensor, bias: Tensor | None, down: Tensor | None, up: Tensor | None, scale: float
) -> tuple[Tensor, Tensor | None]:
    """y = x W^T + bias + scale (x down^T) up^T, and x down^T for the backward pass. x (..., K), w (N, K), down (R,
    K), up (N, R).
    """
    y = F.linear(x, w, bias)
    if down is None or up is None:
        return y, None
    s = F.linear(x, down)  # (..., R)
    return y + scale * F.linear(s, up), s


def lora_linear_backward(
    dy: Tensor, w: Tensor | None, x: Tensor, s: Tensor | None, down: Tensor | None, up: Tensor | None, scale: float
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, down and up for `lora_linear`. `w` None: the gradient of x is not wanted; `s` None: there is
    no LoRA.
    """
    dx = dy @ w if w is not None else None
    if s is None or down is None or up is None:
        return dx, None, None
    ds = scale * (dy @ up)  # (..., R)
    if dx is not None:
        dx = dx + ds @ down
    d_down = ds.flatten(0, -2).mT @ x.flatten(0, -2)
    d_up = scale * (dy.flatten(0, -2).mT @ s.flatten(0, -2))
    return dx, d_down, d_up


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(1 + scale) LayerNorm(x) + shift. x (B, L, W); shift, scale (B, 1, W). Statistics in fp32 or better."""
    normed = F.layer_norm(_at_least_fp32(x), x.shape[-1:], eps=1e-6).to(x.dtype)
    return torch.addcmul(shift, normed, 1 + scale)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """x / rms(x) * weight over the last dimension, in fp32 or better, rounded once."""
    x32 = _at_least_fp32(x)
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + 1e-6) * weight.to(x32.dtype)).to(x.dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each adjacent pair of x (B, H, L, D) turned by its angle; cos, sin (B or 1, 1, L, D/2) fp32 or better."""
    a, b = _at_least_fp32(x).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v with the heads joined: (B, H, L, D) -> (B, L, H D)."""
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
