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
    multiply,
    multiply_by_down,
    outputs,
    registers,
    scales_of,
    tile_and_down,
    to_8_bits,
    with_dtype,
)
from .launch import Launch, ceildiv, power_of_2, shaped
from .layout import contiguous_rows
from .rotation import rotated
from .table import Choice, choose


def gelu_tanh(h: Tensor, prepend: Tensor | None, wants: Wants) -> Activations:
    """gelu(h), tanh's approximation, in the form that the next layer `wants`; with `prepend` (B, L, D) to its left."""
    h, prepend = contiguous_rows(h), prepend if prepend is None else contiguous_rows(prepend)
    left = 0 if prepend is None else prepend.shape[-1]
    out = outputs(h, left + h.shape[2], wants)
    strides = (*h.stride()[:2], *((0, 0) if prepend is None else prepend.stride()[:2]))
    if out.values is None:
        launch = _launch(choose("gelu_tanh", h.device), h.shape, left, *strides, out.x.stride(1))
        launch(h, prepend, out.x)
        return out
    down = tile_and_down("gelu_tanh_8bit", wants, h)
    launch = _launch_8_bits(
        down.tile, wants.dtype, wants.rotation, down.block, 0 if down.fused is None else len(down.fused), h.shape, left,
        *strides,
    )  # fmt: skip
    launch(h, prepend, out.x, out.values, out.scale, down.fused, None if down.fused is None else out.s)
    multiply(down, out)
    return with_dtype(out, wants)


@shaped
def _launch(tile: Choice, shape: tuple[int, int, int], left: int, *strides: int) -> Launch:
    batch, length, width = shape
    rows, block = tile.block_m, min(tile.block_n, power_of_2(width))
    return Launch(
        _gelu, (ceildiv(left, block) + ceildiv(width, block), ceildiv(length, rows), batch), *strides, length,
        W=width, D=left, BLOCK=block, ROWS=rows, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


@shaped
def _launch_8_bits(
    tile: Choice, dtype: torch.dtype, rotation: int, block_r: int, rank: int, shape: tuple[int, int, int], left: int,
    *strides: int,
) -> Launch:  # fmt: skip
    batch, length, width = shape
    return Launch(
        _gelu_8_bits, (ceildiv(length, tile.block_m), batch), *strides, length, rank,
        W=width, D=left, BLOCK=power_of_2(left + width), ROWS=tile.block_m,
        INT8=dtype == torch.int8, ROTATION=rotation, BLOCK_R=block_r, BLOCK_K=tile.block_k,
        PRECISION="ieee", num_warps=tile.warps, num_stages=tile.stages, maxnreg=registers(tile.warps),
    )  # fmt: skip


def gelu_tanh_backward(dy: Tensor, h: Tensor) -> Tensor:
    """The gradient of h (B, L, W), from the columns of dy (B, L, W) that correspond to gelu(h)."""
    dy, h = contiguous_rows(dy), contiguous_rows(h)
    dh = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    launch = _launch_backward(choose("gelu_tanh_backward", h.device), h.shape, *dy.stride()[:2], *h.stride()[:2])
    launch(dy, h, dh)
    return dh


@shaped
def _launch_backward(tile: Choice, shape: tuple[int, int, int], *strides: int) -> Launch:
    batch, length, width = shape
    rows, block = tile.block_m, min(tile.block_n, power_of_2(width))
    return Launch(
        _gelu_backward, (ceildiv(width, block), ceildiv(length, rows), batch), *strides, length,
        W=width, BLOCK=block, ROWS=rows, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


@triton.jit
def _sigmoid_of_twice_u(h):
    return tl.sigmoid(1.5957691216057308 * h * (1.0 + 0.044715 * h * h))


@triton.jit(do_not_specialize=["L"])
def _gelu(
    h_ptr,  # (B, L, W)
    prepend_ptr,  # (B, L, D), or None
    y_ptr,  # (B, L, D + W) out, rows y_l apart
    h_b,
    h_l,
    prepend_b,
    prepend_l,
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
        if prepend_ptr is not None:
            column = block * BLOCK + tl.arange(0, BLOCK)[None, :]
            x = tl.load(prepend_ptr + b * prepend_b + row * prepend_l + column, mask=mask & (column < D), other=0.0)
            tl.store(y + column, x, mask=mask & (column < D))
    else:
        column = (block - blocks_left) * BLOCK + tl.arange(0, BLOCK)[None, :]
        h = tl.load(h_ptr + b * h_b + row * h_l + column, mask=mask & (column < W), other=0.0).to(tl.float32)
        tl.store(y + D + column, (h * _sigmoid_of_twice_u(h)).to(y_ptr.dtype.element_ty), mask=mask & (column < W))


@triton.jit(do_not_specialize=["L", "R"])
def _gelu_8_bits(
    h_ptr,  # (B, L, W)
    prepend_ptr,  # (B, L, D), or None
    y_ptr,  # (B, L, D + W) out
    values_ptr,  # (B L, D + W) out: bytes of int8 or e4m3
    row_scale_ptr,  # (B L,) fp32 out
    down_ptr,  # (R, D + W), or None
    s_ptr,  # (B L, R) as h out, or None
    h_b,
    h_l,
    prepend_b,
    prepend_l,
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
        if prepend_ptr is not None:
            x = tl.load(prepend_ptr + b * prepend_b + row * prepend_l + column, mask=left, other=0.0)
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


@triton.jit(do_not_specialize=["L"])
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
