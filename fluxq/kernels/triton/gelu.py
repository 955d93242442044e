"""GELU by tanh's approximation, written where the next layer reads it, with another tensor to its left.

gelu(h) = h sigmoid(2 u) with u = sqrt(2/pi) (h + 0.044715 h^3), since (1 + tanh u) / 2 = sigmoid(2 u). In 8 bits a
program holds a whole row, both parts of it, so finding the largest magnitude needs no second read. Only the product
with LoRA's `down`, if wanted, reads a tile of rows back from the cache.
"""

# A kernel is called with constexpr arguments as plain values, and with num_warps:
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activations import Activations, Wants
from .eight_bits import (
    down_and_block,
    multiply_by_down,
    outputs,
    registers,
    scales_of,
    to_8_bits,
    with_dtype,
)
from .launch import ceildiv, launched, power_of_2
from .layout import contiguous_rows
from .rotation import rotated
from .table import choose


def gelu_tanh(h: Tensor, beside: Tensor | None, wants: Wants) -> Activations:
    """gelu(h), tanh's approximation, in the form that the next layer `wants`; with `beside` (B, L, D) to its left."""
    (batch, length, width), h = h.shape, contiguous_rows(h)
    beside, left = (None, 0) if beside is None else (contiguous_rows(beside), beside.shape[-1])
    out = outputs(h, left + width, wants)
    strides = (*h.stride()[:2], *((0, 0) if beside is None else beside.stride()[:2]), out.x.stride(1))
    if out.values is None:
        tile = choose("gelu_tanh", h.device)
        rows, block = tile.block_m, min(tile.block_n, power_of_2(width))
        _gelu[ceildiv(left, block) + ceildiv(width, block), ceildiv(length, rows), batch](
            h, beside, out.x, *strides, length,
            W=width, D=left, BLOCK=block, ROWS=rows, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        return out
    down, block_r = down_and_block(wants, h)
    tile = choose("gelu_tanh_8bit" if down is None else "gelu_tanh_8bit_down", h.device)
    _gelu_8_bits[ceildiv(length, tile.block_m), batch](
        h, beside, out.x, out.values, out.scale, down, out.s,
        *strides[:4], length, 0 if down is None else len(down),
        W=width, D=left, BLOCK=power_of_2(left + width), ROWS=tile.block_m,
        INT8=wants.dtype == torch.int8, ROTATION=wants.rotation, BLOCK_R=block_r, BLOCK_K=tile.block_k,
        PRECISION="ieee", num_warps=tile.warps, num_stages=tile.stages, maxnreg=registers(tile.warps),
    )  # fmt: skip
    return with_dtype(out, wants)


def gelu_tanh_backward(dy: Tensor, h: Tensor) -> Tensor:
    """The gradient of h (B, L, W), from the columns of dy (B, L, W) that correspond to gelu(h)."""
    (batch, length, width), dy, h = h.shape, contiguous_rows(dy), contiguous_rows(h)
    dh = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    tile = choose("gelu_tanh_backward", h.device)
    rows, block = tile.block_m, min(tile.block_n, power_of_2(width))
    _gelu_backward[ceildiv(width, block), ceildiv(length, rows), batch](
        dy, h, dh, *dy.stride()[:2], *h.stride()[:2], length,
        W=width, BLOCK=block, ROWS=rows, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return dh


@triton.jit
def _sigmoid_of_twice_u(h):
    return tl.sigmoid(1.5957691216057308 * h * (1.0 + 0.044715 * h * h))


@launched(do_not_specialize=["L"])
def _gelu(
    h_ptr,  # (B, L, W)
    beside_ptr,  # (B, L, D), or None
    y_ptr,  # (B, L, D + W) out, rows y_l apart
    h_b,
    h_l,
    beside_b,
    beside_l,
    y_l,
    L,
    W: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    block, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    token = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row, mask = token.to(tl.int64)[:, None], (token < L)[:, None]
    y = y_ptr + (b * L + row) * y_l
    blocks_left = (D + BLOCK - 1) // BLOCK
    if block < blocks_left:
        if beside_ptr is not None:
            column = block * BLOCK + tl.arange(0, BLOCK)[None, :]
            x = tl.load(beside_ptr + b * beside_b + row * beside_l + column, mask=mask & (column < D), other=0.0)
            tl.store(y + column, x, mask=mask & (column < D))
    else:
        column = (block - blocks_left) * BLOCK + tl.arange(0, BLOCK)[None, :]
        h = tl.load(h_ptr + b * h_b + row * h_l + column, mask=mask & (column < W), other=0.0).to(tl.float32)
        tl.store(y + D + column, (h * _sigmoid_of_twice_u(h)).to(y_ptr.dtype.element_ty), mask=mask & (column < W))


@launched(do_not_specialize=["L", "R"])
def _gelu_8_bits(
    h_ptr,  # (B, L, W)
    beside_ptr,  # (B, L, D), or None
    y_ptr,  # (B, L, D + W) out
    values_ptr,  # (B L, D + W) out: bytes of int8 or e4m3
    row_scale_ptr,  # (B L,) fp32 out
    down_ptr,  # (R, D + W), or None
    s_ptr,  # (B L, R) fp32 out, or None
    h_b,
    h_l,
    beside_b,
    beside_l,
    L,
    R,
    W: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,  # at least D + W
    ROWS: tl.constexpr,
    INT8: tl.constexpr,
    ROTATION: tl.constexpr,  # the block of 8-bit rows, or 0
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    first, b = tl.program_id(0) * ROWS, tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    left, inside = column < D, column < D + W
    for step in range(tl.minimum(L - first, ROWS)):
        row = first.to(tl.int64) + step
        to = (b * L + row) * (D + W) + column
        x = tl.zeros([1, BLOCK], h_ptr.dtype.element_ty)
        if beside_ptr is not None:
            x = tl.load(beside_ptr + b * beside_b + row * beside_l + column, mask=left, other=0.0)
        h = tl.load(h_ptr + b * h_b + row * h_l + column - D, mask=inside & (column >= D), other=x).to(tl.float32)
        rounded = tl.where(left, h, h * _sigmoid_of_twice_u(h)).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + to, rounded, mask=inside)
        y = rounded.to(tl.float32)  # gelu(0) = 0, so columns past the width stay zero
        y = rotated(y, ROTATION) if ROTATION else y
        row_scale = scales_of(y, INT8)
        tl.store(row_scale_ptr + b * L + row + tl.arange(0, 1), row_scale)
        tl.store(values_ptr + to, to_8_bits(y, row_scale, INT8), mask=inside)
    if down_ptr is not None:
        m = b * L + first
        multiply_by_down(
            y_ptr + m * (D + W), down_ptr, s_ptr + m * R, L - first, R, D + W, ROWS, BLOCK_R, BLOCK_K, PRECISION
        )


@launched(do_not_specialize=["L"])
def _gelu_backward(
    dy_ptr,  # (B, L, W), rows dy_l apart
    h_ptr,  # (B, L, W)
    dh_ptr,  # (B, L, W) out
    dy_b,
    dy_l,
    h_b,
    h_l,
    L,
    W: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    b, token = tl.program_id(2).to(tl.int64), tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    row, m, mask = token.to(tl.int64)[:, None], (b * L + token)[:, None], (token < L)[:, None] & (column < W)
    dy = tl.load(dy_ptr + b * dy_b + row * dy_l + column, mask=mask, other=0.0).to(tl.float32)
    h = tl.load(h_ptr + b * h_b + row * h_l + column, mask=mask, other=0.0).to(tl.float32)
    sigmoid = _sigmoid_of_twice_u(h)
    twice_du = 1.5957691216057308 * (1.0 + 0.134145 * h * h)
    dh = dy * sigmoid * (1.0 + h * (1.0 - sigmoid) * twice_du)
    tl.store(dh_ptr + m * W + column, dh.to(dh_ptr.dtype.element_ty), mask=mask)
