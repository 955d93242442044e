"""Quantizes rows to 8 bits, each with its own scale: activations, gradients, and weights of any stored form.

A program holds a row in registers, so it reads it once; it reads rows that are too wide for that again.
"""

# A kernel is called with constexpr arguments as plain values, and with num_warps:
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..weights import Weight
from .bits import largest, nf4_level
from .eight_bits import scale_of
from .launch import Launch, shaped
from .rotation import rotated
from .stored import FORMS, LARGEST, bytes_of, encode, read, read_nf4, stored
from .table import Choice, choose


def row_quantize(
    w: Tensor, dtype: torch.dtype, columns: Tensor | None = None, rotation: int = 0
) -> tuple[Tensor, Tensor]:
    """`w` (N, K) in 8 bits of `dtype` (int8 or float8_e4m3fn), and the fp32 scales (N,) that restore each row.

    If columns (K,) fp32 is given, every row is first multiplied by it. Then, if `rotation` is not 0, each row is
    rotated in blocks of that many columns (rotation.py).
    """
    return _quantize(w, dtype, columns, rotation, slice(0, w.shape[0]))


def weight_rows(weight: Weight, dtype: torch.dtype, rotation: int, rows: slice) -> tuple[Tensor, Tensor]:
    """`rows` of `weight` (N, K) of any stored form as 8-bit values and row scales."""
    return _quantize(weight, dtype, None, rotation, rows)


def row_scales(weight: Weight, dtype: torch.dtype, rotation: int, rows: slice) -> Tensor:
    """The scales of `weight_rows`, without the values."""
    return _scales(weight, dtype, None, None, rotation, rows)


def _quantize(
    weight: Weight, dtype: torch.dtype, columns: Tensor | None, rotation: int, rows: slice
) -> tuple[Tensor, Tensor]:
    shape, device = (rows.stop - rows.start, weight.shape[1]), stored(weight).numbers.device
    values = torch.empty(shape, dtype=dtype, device=device)
    return values, _scales(weight, dtype, columns, values, rotation, rows)


def _scales(
    weight: Weight, dtype: torch.dtype, columns: Tensor | None, values: Tensor | None, rotation: int, rows: slice
) -> Tensor:
    """The row scales; the values are written into `values` if given."""
    numbers, absmax, levels, scale, form = stored(weight)
    width = weight.shape[1]
    scales = torch.empty(rows.stop - rows.start, dtype=torch.float32, device=numbers.device)
    launch = _launch(
        choose("row_quantize", numbers.device, width), form, dtype, rotation, rows.start, rows.stop, width,
        numbers.stride(0), 0 if absmax is None else absmax.stride(0),
    )  # fmt: skip
    launch(numbers, absmax, levels, scale, columns, None if values is None else bytes_of(values), scales)
    return scales


@shaped
def _launch(
    tile: Choice, form: str, dtype: torch.dtype, rotation: int, start: int, stop: int, width: int, *strides: int
) -> Launch:
    return Launch(
        _rows, (stop - start,), start, stop, width, *strides,
        FROM=form, TO=FORMS[dtype], ROTATION=rotation, LARGEST=LARGEST[FORMS[dtype]],
        ONCE=tile.block_n >= width, COLUMNS=tile.block_n, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


@triton.jit(do_not_specialize=["start", "N"])
def _rows(
    numbers_ptr,  # (N, K/8) int32 of NF4, else (N, K)
    absmax_ptr,  # (N, K/64) fp32 of NF4
    levels_ptr,  # (16,) fp32 of NF4
    scale_ptr,  # (N,) fp32 of 8 bits
    columns_ptr,  # (K,) fp32, or None
    out_ptr,  # (N - start, K) uint8, or None if only scales are wanted
    scales_ptr,  # (N - start,) fp32
    start,  # the first row
    N,  # the end of the rows
    K,
    stride,
    absmax_stride,
    FROM: tl.constexpr,
    TO: tl.constexpr,
    ROTATION: tl.constexpr,  # the block, or 0
    LARGEST: tl.constexpr,
    ONCE: tl.constexpr,  # COLUMNS holds a whole row
    COLUMNS: tl.constexpr,
):
    to = tl.program_id(0)
    row = start + to
    x, magnitude = _piece(
        numbers_ptr, absmax_ptr, levels_ptr, scale_ptr, columns_ptr,
        row, 0, N, K, stride, absmax_stride, FROM, ROTATION, COLUMNS,
    )  # fmt: skip
    if not ONCE:
        for first in range(COLUMNS, K, COLUMNS):
            _, here = _piece(
                numbers_ptr, absmax_ptr, levels_ptr, scale_ptr, columns_ptr,
                row, first, N, K, stride, absmax_stride, FROM, ROTATION, COLUMNS,
            )  # fmt: skip
            magnitude = tl.maximum(magnitude, here, propagate_nan=tl.PropagateNan.ALL)
    scale = scale_of(magnitude, LARGEST)
    tl.store(scales_ptr + to, scale)
    if out_ptr is not None:
        inverse = 1.0 / scale
        if ONCE:
            _write(x * inverse, out_ptr, to, 0, K, TO, COLUMNS)
        else:
            for first in range(0, K, COLUMNS):
                x, _ = _piece(
                    numbers_ptr, absmax_ptr, levels_ptr, scale_ptr, columns_ptr,
                    row, first, N, K, stride, absmax_stride, FROM, ROTATION, COLUMNS,
                )  # fmt: skip
                _write(x * inverse, out_ptr, to, first, K, TO, COLUMNS)


@triton.jit
def _piece(
    numbers_ptr,
    absmax_ptr,
    levels_ptr,
    scale_ptr,
    columns_ptr,
    row,
    first,
    N,
    K,
    stride,
    absmax_stride,
    FROM: tl.constexpr,
    ROTATION: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """(1, COLUMNS) fp32 of a row, and the largest magnitude in it."""
    x = read(
        numbers_ptr, absmax_ptr, levels_ptr, row + tl.arange(0, 1), first, N, K, stride, absmax_stride, FROM, COLUMNS
    )
    if scale_ptr is not None:
        x *= tl.load(scale_ptr + row)
    if columns_ptr is not None:
        column = first + tl.arange(0, COLUMNS)[None, :]
        x *= tl.load(columns_ptr + column, mask=column < K, other=0.0)
    x = rotated(x, ROTATION) if ROTATION else x
    if FROM == "nf4" and ROTATION == 0:
        magnitude = _nf4_largest(numbers_ptr, absmax_ptr, levels_ptr, row, first, N, K, stride, absmax_stride, COLUMNS)
    else:
        magnitude = largest(x)
    return x, magnitude


@triton.jit
def _nf4_largest(numbers_ptr, absmax_ptr, levels_ptr, row, first, N, K, stride, absmax_stride, COLUMNS: tl.constexpr):
    """The largest magnitude of a row of NF4: a block's is that of its lowest or highest code.

    It is found from the codes, so that only two per block are looked up. Reducing the decoded row would decode it
    twice, because the compiler gives a reduction its own layout.
    """
    words, absmax = read_nf4(
        numbers_ptr, absmax_ptr, row + tl.arange(0, 1), first, N, K, stride, absmax_stride, COLUMNS
    )
    low, high = words & 15, words & 15
    for shift in tl.static_range(4, 32, 4):
        low, high = tl.minimum(low, (words >> shift) & 15), tl.maximum(high, (words >> shift) & 15)
    word = tl.maximum(nf4_level(high, levels_ptr), -nf4_level(low, levels_ptr))
    return largest(absmax * tl.max(word.reshape(1, COLUMNS // 64, 8), axis=2))


@triton.jit
def _write(x, out_ptr, row, first, K, TO: tl.constexpr, COLUMNS: tl.constexpr):
    column = first + tl.arange(0, COLUMNS)[None, :]
    tl.store(out_ptr + row.to(tl.int64) * K + column, encode(x, TO, tl.uint8), mask=column < K)
