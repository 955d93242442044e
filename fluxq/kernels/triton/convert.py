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


def _write(weight: Weight, divisor: Tensor | None, out: Tensor, transposed: bool, rotation: int) -> None:
    """Write `weight` into `out`, rotated if `rotation` is not 0, its rows divided by `divisor` (N,) if given."""
    (rows, columns), (numbers, absmax, levels, scale, form) = weight.shape, stored(weight)
    to = FORMS.get(out.dtype, "float")
    if form == to != "float" and not rotation:  # the same 8-bit format: copy the bytes
        form, to, scale, divisor = "bytes", "bytes", None, None
    tile = choose(f"dequantize{'_transposed' if transposed else ''}{'_rotated' if rotation else ''}", out.device)
    _convert[triton.cdiv(rows, tile.block_m), triton.cdiv(columns, tile.block_n)](
        numbers, absmax, levels, scale, divisor, bytes_of(out), rows, columns,
        numbers.stride(0), 0 if absmax is None else absmax.stride(0), out.stride(0),
        FROM=form, TO=to, ROTATION=rotation, TRANSPOSED=transposed, ROWS=tile.block_m, COLUMNS=tile.block_n,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


@triton.jit
def _convert(
    numbers_ptr,  # (N, K/8) int32 of NF4, else (N, K)
    absmax_ptr,  # (N, K/64) fp32 of NF4
    levels_ptr,  # (16,) fp32 of NF4
    scale_ptr,  # (N,) fp32 that rows are multiplied by, or None
    divisor_ptr,  # (N,) fp32 that rows are divided by, or None
    out_ptr,  # (N, K), or (K, N) if TRANSPOSED; numbers of 8 bits as uint8
    N,
    K,
    stride,
    absmax_stride,
    out_stride,
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
    y = encode(x, TO, out_ptr.dtype.element_ty)
    rows, columns = rows.to(tl.int64), first + tl.arange(0, COLUMNS)
    if TRANSPOSED:
        at = columns.to(tl.int64)[:, None] * out_stride + rows[None, :]
        tl.store(out_ptr + at, tl.trans(y), mask=(columns < K)[:, None] & (rows < N)[None, :])
    else:
        at = rows[:, None] * out_stride + columns[None, :]
        tl.store(out_ptr + at, y, mask=(rows < N)[:, None] & (columns < K)[None, :])
