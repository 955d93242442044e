"""Decodes stored weights: to the dtype of the computation, or to 8-bit values with a scale per row.

One kernel converts any stored form to any other, tile by tile, and writes the tile as it is or transposed. If the row
scales are not known yet, rows.py computes them. A large layer can be decoded in parts: `weight[a:b]` is a view.
"""

# A kernel is called with constexpr arguments as plain values, and with num_warps:
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..weights import RowScaled, Weight
from .launch import ceildiv, launched
from .layout import contiguous_rows
from .rotation import rotated
from .rows import row_scales, weight_rows
from .stored import FORMS, bytes_of, encode, read, stored
from .table import choose


def dequantize(weight: Weight, dtype: torch.dtype, out: Tensor | None = None, transposed: bool = False) -> Tensor:
    """The (N, K) matrix that `weight` encodes, in `dtype`, or its transpose (K, N). If `out` is given (rows of any
    stride), the result is written there.
    """
    if isinstance(weight, Tensor):
        matrix = weight.t() if transposed else weight
        return matrix.to(dtype).contiguous() if out is None else out.copy_(matrix)
    rows, columns = weight.shape
    if out is None:
        device = stored(weight).numbers.device
        out = torch.empty((columns, rows) if transposed else (rows, columns), dtype=dtype, device=device)
    _write(weight, None, out, transposed, 0)
    return out


def decode_extended(weight: Weight, up: Tensor, scale: float, bias: Tensor | None, out: Tensor) -> None:
    """Write [W | scale up | bias | 0] into `out` (N, K + padding), rows of any stride.

    up (N, R) of any float dtype; bias (N,), or None for zeros.
    """
    _write(weight, None, out, False, 0, (contiguous_rows(up), bias, scale))


def row_dequantize(values: Tensor, scale: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """The (N, K) matrix of 8-bit `values` (N, K) and row scales (N,): multiplied in fp32, rounded once."""
    return dequantize(RowScaled(values, scale), dtype, out)


def to_rows(weight: Weight, dtype: torch.dtype, transposed: bool = False, rotation: int = 0) -> tuple[Tensor, Tensor]:
    """`weight` as a matrix of 8-bit values (N, K), or (K, N) if `transposed`, and its row scales (N,) fp32.

    Transposing takes two passes, since no tile holds a whole row: the first only computes the scales. `rotation`: the
    block of columns in which rows are rotated before they are rounded (rotation.py), 0 for none.
    """
    if not rotation and isinstance(weight, RowScaled) and weight.values.dtype == dtype:
        if not transposed:
            return weight.values, weight.scale
        scale = weight.scale
    elif transposed:
        scale = row_scales(weight, dtype, rotation)
    else:
        return weight_rows(weight, dtype, rotation)
    values = torch.empty(weight.shape[::-1], dtype=dtype, device=scale.device)
    _write(weight, scale, values, True, rotation)
    return values, scale


def _write(
    weight: Weight,
    divisor: Tensor | None,
    out: Tensor,
    transposed: bool,
    rotation: int,
    tail: tuple[Tensor | None, Tensor | None, float] = (None, None, 1.0),
) -> None:
    """Write `weight` into `out`, rotated if `rotation` is not 0, its rows divided by `divisor` (N,) if given.

    tail: LoRA's up, the bias and LoRA's scale, which fill the columns behind the weight.
    """
    (rows, columns), (numbers, absmax, levels, scale, form) = weight.shape, stored(weight)
    to = FORMS.get(out.dtype, "float")
    if form == to != "float" and not rotation:  # the same 8-bit format: copy the bytes
        form, to, scale, divisor = "bytes", "bytes", None, None
    tile = choose(f"dequantize{'_transposed' if transposed else ''}{'_rotated' if rotation else ''}", out.device)
    (up, bias, up_scale), width = tail, columns if transposed else out.shape[1]
    _convert[ceildiv(rows, tile.block_m), ceildiv(width, tile.block_n)](
        numbers, absmax, levels, scale, divisor, bytes_of(out), up, bias, up_scale, rows, columns, width,
        0 if up is None else up.shape[1], numbers.stride(0), 0 if absmax is None else absmax.stride(0), out.stride(0),
        0 if up is None else up.stride(0),
        FROM=form, TO=to, ROTATION=rotation, TRANSPOSED=transposed, ROWS=tile.block_m, COLUMNS=tile.block_n,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


@launched(do_not_specialize=["R", "up_stride"])
def _convert(
    numbers_ptr,  # (N, K/8) int32 of NF4, else (N, K)
    absmax_ptr,  # (N, K/64) fp32 of NF4
    levels_ptr,  # (16,) fp32 of NF4
    scale_ptr,  # (N,) fp32 that rows are multiplied by, or None
    divisor_ptr,  # (N,) fp32 that rows are divided by, or None
    out_ptr,  # (N, WIDTH), or (K, N) if TRANSPOSED; numbers of 8 bits as uint8
    up_ptr,  # (N, R) any float, or None
    bias_ptr,  # (N,) any float, or None
    up_scale,
    N,
    K,
    width,  # K, and with `up` the tail behind it: [up_scale up | bias | 0]
    R,
    stride,
    absmax_stride,
    out_stride,
    up_stride,
    FROM: tl.constexpr,
    TO: tl.constexpr,
    ROTATION: tl.constexpr,  # the block, or 0
    TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * COLUMNS
    x = read(numbers_ptr, absmax_ptr, levels_ptr, rows, first, N, K, stride, absmax_stride, FROM, COLUMNS)
    if scale_ptr is not None:
        x *= tl.load(scale_ptr + rows, mask=rows < N, other=0.0)[:, None]
    if ROTATION:
        x = rotated(x, ROTATION)
    if divisor_ptr is not None:
        x *= (1.0 / tl.load(divisor_ptr + rows, mask=rows < N, other=1.0))[:, None]
    rows, columns = rows.to(tl.int64), first + tl.arange(0, COLUMNS)
    if up_ptr is not None:
        x = _with_tail(x, up_ptr, bias_ptr, up_scale, rows, columns, first + COLUMNS > K, N, K, R, up_stride)
    y = encode(x, TO, out_ptr.dtype.element_ty)
    if TRANSPOSED:
        at = columns.to(tl.int64)[:, None] * out_stride + rows[None, :]
        tl.store(out_ptr + at, tl.trans(y), mask=(columns < K)[:, None] & (rows < N)[None, :])
    else:
        at = rows[:, None] * out_stride + columns[None, :]
        tl.store(out_ptr + at, y, mask=(rows < N)[:, None] & (columns < width)[None, :])


@triton.jit
def _with_tail(x, up_ptr, bias_ptr, up_scale, rows, columns, crosses, N, K, R, up_stride):
    """`x`, with [up_scale up | bias | 0] in the columns from K on, if the tile crosses K."""
    if crosses:
        column = (columns - K)[None, :]
        inside = (rows < N)[:, None] & (column >= 0) & (column < R)
        tail = tl.load(up_ptr + rows[:, None] * up_stride + column, mask=inside, other=0.0).to(tl.float32) * up_scale
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + rows, mask=rows < N, other=0.0).to(tl.float32)
            tail = tl.where(column == R, bias[:, None], tail)
        x = tl.where(column < 0, x, tail)
    return x
