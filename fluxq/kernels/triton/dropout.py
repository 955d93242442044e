"""Dropout of a LoRA's input (fluxq/kernels/reference.py): what is left out is hashed in registers, never stored."""

# A kernel is called with constexpr arguments as plain values, and with num_warps:
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, ceildiv, shaped
from .layout import contiguous_rows
from .table import Choice, choose


def drop(x: Tensor, rate: float, key: Tensor, onto: Tensor | None = None) -> Tensor:
    """`x` (..., K) with zeros where numbers are left out, each with chance `rate`; added to `onto` in place if given.

    Which ones depends on `key` (1,) int64 and on their place among the M K numbers.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if onto is None else onto
    rows, to = (contiguous_rows(t).reshape(-1, t.shape[-1]) for t in (x, out))
    choice, strides = choose("drop", x.device), (rows.stride(0), to.stride(0))
    _launch(choice, *rows.shape, *strides, round(rate * 2**32), onto is not None)(rows, to, key)
    return out


@shaped
def _launch(tile: Choice, m: int, k: int, x_stride: int, out_stride: int, threshold: int, adds: bool) -> Launch:
    return Launch(
        _drop, (ceildiv(m, tile.block_m), ceildiv(k, tile.block_n)), m, k, x_stride, out_stride,
        THRESHOLD=threshold, ADDS=adds,
        ROWS=tile.block_m, COLUMNS=tile.block_n, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


@triton.jit
def _mixed(n):
    """murmur3's 32-bit finalizer."""
    n = (n ^ (n >> 16)) * 0x85EBCA6B
    n = (n ^ (n >> 13)) * 0xC2B2AE35
    return n ^ (n >> 16)


@triton.jit(do_not_specialize=["M"])
def _drop(
    x_ptr,  # (M, K) any float, rows x_stride apart
    out_ptr,  # (M, K) as x, rows out_stride apart; added to if ADDS
    key_ptr,  # (1,) int64
    M,
    K,
    x_stride,
    out_stride,
    THRESHOLD: tl.constexpr,  # what a hash of 32 bits must reach to be kept
    ADDS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside, key = (row < M) & (column < K), tl.load(key_ptr)
    hashed = _mixed((row * K + column).to(tl.uint32) + key.to(tl.uint32))
    hashed = _mixed(hashed ^ (key >> 32).to(tl.uint32))
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0)
    x = tl.where(hashed < THRESHOLD, 0.0, x)
    if ADDS:
        x = x.to(tl.float32) + tl.load(out_ptr + row * out_stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * out_stride + column, x.to(out_ptr.dtype.element_ty), mask=inside)
