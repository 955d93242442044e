"""Fills the columns next to x that make base, LoRA and bias one product (linear.py)."""

# A kernel is called with constexpr arguments as plain values, and with num_warps:
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, ceildiv, shaped
from .layout import contiguous_rows
from .table import Choice, choose


def fill_padding(rows: Tensor, k: int, s: Tensor) -> None:
    """Write [s | 1 | 0] into the columns of `rows` (M, ...) from k on. s (M, R)."""
    s, (m, width), r = contiguous_rows(s), rows.shape, s.shape[1]
    launch = _launch(choose("fill_padding", rows.device), m, width - k, r, rows.stride(0), s.stride(0))
    launch(rows[:, k:], s)


@shaped
def _launch(tile: Choice, m: int, width: int, r: int, out_stride: int, s_stride: int) -> Launch:
    return Launch(
        _fill_padding, (ceildiv(m, tile.block_m), ceildiv(width, tile.block_n)), m, width, r, out_stride, s_stride,
        EIGHTS=r % 8 == s_stride % 8 == 0,  # so rows of s can be read eight numbers at a time
        ROWS=tile.block_m, COLUMNS=tile.block_n, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


@triton.jit
def _multiple(n, EIGHTS: tl.constexpr):
    """n, in a form that tells the compiler that it is a multiple of eight, if EIGHTS."""
    return n // 8 * 8 if EIGHTS else n


@triton.jit(do_not_specialize=["M", "R", "s_stride"])
def _fill_padding(
    out_ptr,  # (M, width) out, rows out_stride apart
    s_ptr,  # (M, R)
    M,
    width,  # in practice a multiple of 32, so that all widths share one kernel
    R,
    out_stride,
    s_stride,
    EIGHTS: tl.constexpr,  # R and s_stride are multiples of eight
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    R, s_stride = _multiple(R, EIGHTS), _multiple(s_stride, EIGHTS)
    x = tl.load(s_ptr + row * s_stride + column, mask=(row < M) & (column < R), other=0.0).to(tl.float32)
    x = tl.where(column == R, 1.0, x)
    tl.store(out_ptr + row * out_stride + column, x.to(out_ptr.dtype.element_ty), mask=(row < M) & (column < width))
