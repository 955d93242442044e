"""Decodes stored weights: to the dtype of the computation, or to 8-bit values with a scale per row.

One kernel converts any stored form to any other, tile by tile, and writes the tile as it is or transposed. If the row
scales are not known yet, rows.py computes them. A large layer can be decoded in parts: some of its rows at a time.
"""

# A kernel is called with constexpr arguments as plain values, and with num_warps:
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..weights import RowScaled, Weight
from .launch import Launch, ceildiv, shaped
from .layout import contiguous_rows
from .rotation import rotated
from .rows import row_scales, weight_rows
from .stored import FORMS, bytes_of, encode, read, stored
from .table import Choice, choose


def dequantize(
    weight: Weight,
    dtype: torch.dtype,
    out: Tensor | None = None,
    transposed: bool = False,
    part: slice | None = None,
) -> Tensor:
    """The (N, K) matrix that `weight` encodes, in `dtype`, or its transpose (K, N); or only the rows `part` of the
    weight. If `out` is given (rows of any stride), the result is written there.
    """
    part = slice(0, weight.shape[0]) if part is None else part
    if isinstance(weight, Tensor):
        matrix = weight[part].t() if transposed else weight[part]
        return matrix.to(dtype).contiguous() if out is None else out.copy_(matrix)
    if out is None:
        rows, columns = part.stop - part.start, weight.shape[1]
        device = stored(weight).numbers.device
        out = torch.empty((columns, rows) if transposed else (rows, columns), dtype=dtype, device=device)
    _write(weight, part, None, out, transposed, 0)
    return out


def decode_extended(weight: Weight, part: slice, up: Tensor, scale: float, bias: Tensor | None, out: Tensor) -> None:
    """Write the rows `part` of [W | scale up | bias | 0] into `out` (rows, K + padding), rows of any stride.

    up (N, R) of any float dtype; bias (N,), or None for zeros.
    """
    _write(weight, part, None, out, False, 0, contiguous_rows(up), bias, scale)


def row_dequantize(values: Tensor, scale: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """The (N, K) matrix of 8-bit `values` (N, K) and row scales (N,): multiplied in fp32, rounded once."""
    return dequantize(RowScaled(values, scale), dtype, out)


def to_rows(
    weight: Weight,
    dtype: torch.dtype,
    transposed: bool = False,
    rotation: int = 0,
    part: slice | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`weight` as a matrix of 8-bit values (N, K), or (K, N) if `transposed`, and its row scales (N,) fp32; or only the
    rows `part` of the weight.

    Transposing takes two passes, since no tile holds a whole row: the first only computes the scales, and is left out
    if they are given as `scale`. `rotation`: the block of columns in which rows are rotated before they are rounded
    (rotation.py), 0 for none.
    """
    whole, part = part is None, slice(0, weight.shape[0]) if part is None else part
    if not rotation and isinstance(weight, RowScaled) and weight.values.dtype == dtype:
        scale = weight.scale if whole else weight.scale[part]
        if not transposed:
            return weight.values if whole else weight.values[part], scale
        divisor = None  # the same 8-bit format: bytes are copied
    elif not transposed:
        return weight_rows(weight, dtype, rotation, part)
    else:
        divisor = scale = row_scales(weight, dtype, rotation, part) if scale is None else scale
    values = torch.empty((weight.shape[1], part.stop - part.start), dtype=dtype, device=scale.device)
    _write(weight, part, divisor, values, True, rotation)
    return values, scale


def _write(
    weight: Weight,
    part: slice,
    divisor: Tensor | None,
    out: Tensor,
    transposed: bool,
    rotation: int,
    up: Tensor | None = None,
    bias: Tensor | None = None,
    up_scale: float = 1.0,
) -> None:
    """Write the rows `part` of `weight` into `out`, rotated if `rotation` is not 0, divided by `divisor` (rows,) if
    given. LoRA's up, times its scale, and the bias fill the columns behind the weight.
    """
    numbers, absmax, levels, scale, form = stored(weight)
    to = FORMS.get(out.dtype, "float")
    if form == to != "float" and not rotation:  # the same 8-bit format: copy the bytes
        form, to, scale = "bytes", "bytes", None
    op = "dequantize_transposed_rotated" if rotation else "dequantize_transposed" if transposed else "dequantize"
    columns = weight.shape[1]
    launch = _launch(
        choose(op, out.device), form, to, rotation, transposed, part.start, part.stop, columns,
        columns if transposed else out.shape[1], 0 if up is None else up.shape[1], numbers.stride(0),
        0 if absmax is None else absmax.stride(0), out.stride(0), 0 if up is None else up.stride(0), float(up_scale),
    )  # fmt: skip
    launch(numbers, absmax, levels, scale, divisor, bytes_of(out), up, bias)


@shaped
def _launch(
    tile: Choice, form: str, to: str, rotation: int, transposed: bool, start: int, stop: int, columns: int, width: int,
    *numbers: float,
) -> Launch:  # fmt: skip
    return Launch(
        _convert, (ceildiv(stop - start, tile.block_m), ceildiv(width, tile.block_n)), start, stop, columns, width,
        *numbers,
        FROM=form, TO=to, ROTATION=rotation, TRANSPOSED=transposed, ROWS=tile.block_m, COLUMNS=tile.block_n,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


@triton.jit(do_not_specialize=["R", "up_stride"])
def _convert(
    numbers_ptr,  # (N, K/8) int32 of NF4, else (N, K)
    absmax_ptr,  # (N, K/64) fp32 of NF4
    levels_ptr,  # (16,) fp32 of NF4
    scale_ptr,  # (N,) fp32 that rows are multiplied by, or None
    divisor_ptr,  # (N - start,) fp32 that rows are divided by, or None
    out_ptr,  # (N - start, width), or (K, N - start) if TRANSPOSED; numbers of 8 bits as uint8
    up_ptr,  # (N, R) any float, or None
    bias_ptr,  # (N,) any float, or None
    start,  # the first row, a multiple of 64
    N,  # the end of the rows
    K,
    width,  # K, and with `up` the tail behind it: [up_scale up | bias | 0]
    R,
    stride,
    absmax_stride,
    out_stride,
    up_stride,
    up_scale,
    FROM: tl.constexpr,
    TO: tl.constexpr,
    ROTATION: tl.constexpr,  # the block, or 0
    TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    to = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rows, first = start + to, tl.program_id(1) * COLUMNS
    x = read(numbers_ptr, absmax_ptr, levels_ptr, rows, first, N, K, stride, absmax_stride, FROM, COLUMNS)
    if scale_ptr is not None:
        x *= tl.load(scale_ptr + rows, mask=rows < N, other=0.0)[:, None]
    if ROTATION:
        x = rotated(x, ROTATION)
    if divisor_ptr is not None:
        x *= (1.0 / tl.load(divisor_ptr + to, mask=rows < N, other=1.0))[:, None]
    rows, to, columns = rows.to(tl.int64), to.to(tl.int64), first + tl.arange(0, COLUMNS)
    if up_ptr is not None:
        x = _with_tail(x, up_ptr, bias_ptr, up_scale, rows, columns, first + COLUMNS > K, N, K, R, up_stride)
    y = encode(x, TO, out_ptr.dtype.element_ty)
    if TRANSPOSED:
        at = columns.to(tl.int64)[:, None] * out_stride + to[None, :]
        tl.store(out_ptr + at, tl.trans(y), mask=(columns < K)[:, None] & (rows < N)[None, :])
    else:
        at = to[:, None] * out_stride + columns[None, :]
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
