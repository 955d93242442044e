"""The gradient of a linear layer's input with few rows, from the weight as it is stored.

Reading the weight is all the work, so the kernel reads it once and decodes it in the loop. The weight is contiguous
along K and the gradient sums over N: a program handles some columns of W and a share of its rows, so that there are
many programs and each reads contiguous memory. A second kernel sums the shares, always in the same order. Atomic
additions would not need it, but would round differently from run to run.
"""

# A kernel is called with constexpr arguments as plain values, and with num_warps:
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..weights import Weight
from .launch import Launch, ceildiv, shaped
from .layout import contiguous_rows
from .stored import read, stored
from .table import Choice, choose


def input_gradient(
    dy: Tensor, weight: Weight, ds: Tensor | None, down: Tensor | None, out: Tensor, tile: Choice
) -> None:
    """Write dy W + ds down into `out` (M, K), rows of any stride. dy (M, N), ds (M, R), down (R, K); or no LoRA."""
    (m, n), k = dy.shape, weight.shape[1]
    numbers, absmax, levels, scale, form = stored(weight)
    dy = contiguous_rows(dy)
    rows = tile.block_m if m <= tile.block_m else 64  # all of them at once, so that each weight is read only once
    share = max(tile.chunk // tile.block_n, tile.block_k)
    sums = torch.empty(ceildiv(n, share), m, k, dtype=torch.float32, device=dy.device)
    shares = _shares_launch(
        tile, form, rows, share, m, n, k, dy.stride(0), numbers.stride(0), 0 if absmax is None else absmax.stride(0)
    )
    shares(dy, numbers, absmax, levels, scale, sums)
    ds, down = (None, None) if ds is None or down is None else (contiguous_rows(ds), contiguous_rows(down))
    summed = _sum_launch(
        choose("sum_shares", dy.device), len(sums), m, k, 0 if ds is None else ds.shape[1],
        0 if ds is None else ds.stride(0), 0 if down is None else down.stride(0), out.stride(0),
    )  # fmt: skip
    summed(sums, ds, down, out)


@shaped
def _shares_launch(tile: Choice, form: str, rows: int, share: int, m: int, n: int, k: int, *strides: int) -> Launch:
    return Launch(
        _shares, (ceildiv(k, tile.block_n), ceildiv(n, share), ceildiv(m, rows)), m, n, k, *strides,
        FORM=form, SHARE=share, BLOCK_M=rows, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


@shaped
def _sum_launch(tile: Choice, shares: int, m: int, k: int, *numbers: int) -> Launch:
    return Launch(
        _sum_shares, (ceildiv(k, tile.block_n), ceildiv(m, tile.block_m)), shares, m, k, *numbers,
        ROWS=tile.block_m, COLUMNS=tile.block_n, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def _shares(
    dy_ptr,  # (M, N) any float, rows dy_stride apart
    w_ptr,  # (N, K/8) int32 of NF4, (N, K) uint8 of 8 bits, else (N, K); rows w_stride apart
    absmax_ptr,  # (N, K/64) fp32 of NF4, rows absmax_stride apart
    levels_ptr,  # (16,) fp32 of NF4
    scale_ptr,  # (N,) fp32 of 8 bits
    sums_ptr,  # (shares, M, K) fp32 out
    M,
    N,
    K,
    dy_stride,
    w_stride,
    absmax_stride,
    FORM: tl.constexpr,
    SHARE: tl.constexpr,  # how many rows of W per share
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    first, share = tl.program_id(0) * BLOCK_N, tl.program_id(1)
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    row, inside_m = m.to(tl.int64)[:, None], (m < M)[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(share * SHARE, tl.minimum(share * SHARE + SHARE, N), BLOCK_K):
        n = start + tl.arange(0, BLOCK_K)
        dy = tl.load(dy_ptr + row * dy_stride + n[None, :], mask=inside_m & (n < N)[None, :], other=0.0)
        w = read(w_ptr, absmax_ptr, levels_ptr, n, first, N, K, w_stride, absmax_stride, FORM, BLOCK_N)
        if scale_ptr is not None:
            w *= tl.load(scale_ptr + n, mask=n < N, other=0.0)[:, None]
        acc = tl.dot(dy, w.to(dy.dtype), acc, input_precision="ieee")
    column = first + tl.arange(0, BLOCK_N)[None, :]
    tl.store(sums_ptr + (share.to(tl.int64) * M + row) * K + column, acc, mask=inside_m & (column < K))


@triton.jit(do_not_specialize=["shares", "M", "R", "ds_stride"])
def _sum_shares(
    sums_ptr,  # (shares, M, K) fp32
    ds_ptr,  # (M, R) any float, or None
    down_ptr,  # (R, K) as ds, or None
    out_ptr,  # (M, K) any float, rows out_stride apart
    shares,
    M,
    K,
    R,
    ds_stride,
    down_stride,
    out_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < M) & (column < K)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for share in range(shares):
        acc += tl.load(sums_ptr + (share * M + row) * K + column, mask=inside, other=0.0)
    if ds_ptr is not None:
        for start in range(0, R, 16):
            r = start + tl.arange(0, 16)
            ds = tl.load(ds_ptr + row * ds_stride + r[None, :], mask=(row < M) & (r < R)[None, :], other=0.0)
            down = tl.load(
                down_ptr + r[:, None] * down_stride + column, mask=(r < R)[:, None] & (column < K), other=0.0
            )
            acc = tl.dot(ds, down, acc, input_precision="ieee")
    tl.store(out_ptr + row * out_stride + column, acc.to(out_ptr.dtype.element_ty), mask=inside)
