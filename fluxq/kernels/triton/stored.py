"""How kernels read a matrix in any stored form, tile by tile, and the forms in which they write one."""

# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..weights import NF4Weight, RowScaled, Weight
from .bits import (
    e4m3_decode,
    e4m3_encode,
    int8_decode,
    int8_encode,
    nf4_decode,
    nf4_levels,
)
from .layout import contiguous_rows

FORMS = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}
LARGEST = {"int8": 127.0, "fp8": 448.0}


class Stored(NamedTuple):
    """A weight's tensors, rows of any stride, and the name of its form: "nf4", "int8", "fp8" or "float"."""

    numbers: Tensor  # (N, K/8) int32 of NF4, (N, K) uint8 of 8 bits, else (N, K)
    absmax: Tensor | None  # (N, K/64) fp32 of NF4
    levels: Tensor | None  # (16,) fp32 of NF4
    scale: Tensor | None  # (N,) fp32 of 8 bits
    form: str


def stored(weight: Weight) -> Stored:
    if isinstance(weight, NF4Weight):
        return Stored(weight.words, weight.absmax, nf4_levels(weight.words.device), None, "nf4")
    if isinstance(weight, RowScaled):
        return Stored(bytes_of(contiguous_rows(weight.values)), None, None, weight.scale, FORMS[weight.values.dtype])
    return Stored(contiguous_rows(weight), None, None, None, "float")


def bytes_of(x: Tensor) -> Tensor:
    """`x` as kernels take it: 8-bit numbers as uint8."""
    return x.view(torch.uint8) if x.dtype in FORMS else x


@triton.jit
def read(
    numbers_ptr,
    absmax_ptr,
    levels_ptr,
    rows,  # (R,) int32
    first,
    N,
    K,
    stride,
    absmax_stride,
    FROM: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Columns first to first + COLUMNS of `rows` as fp32 (bytes unchanged); zeros beyond the edges."""
    inside, start = (rows < N)[:, None], rows.to(tl.int64)[:, None]
    if FROM == "nf4":
        words, absmax = read_nf4(numbers_ptr, absmax_ptr, rows, first, N, K, stride, absmax_stride, COLUMNS)
        levels = nf4_decode(words, levels_ptr).reshape(absmax.shape[0], absmax.shape[1], 64)
        return (levels * absmax[:, :, None]).reshape(absmax.shape[0], COLUMNS)
    else:
        column = first + tl.arange(0, COLUMNS)[None, :]
        x = tl.load(numbers_ptr + start * stride + column, mask=inside & (column < K), other=0)
        if FROM == "bytes":
            return x
        elif FROM == "int8":
            return int8_decode(x)
        elif FROM == "fp8":
            return e4m3_decode(x)
        else:
            return x.to(tl.float32)


@triton.jit
def read_nf4(numbers_ptr, absmax_ptr, rows, first, N, K, stride, absmax_stride, COLUMNS: tl.constexpr):
    """(R, COLUMNS/8) int32 and (R, COLUMNS/64) fp32; zeros beyond the edges."""
    inside, start, blocks = (rows < N)[:, None], rows.to(tl.int64)[:, None], K // 64
    block = first // 64 + tl.arange(0, COLUMNS // 64)[None, :]
    absmax = tl.load(absmax_ptr + start * absmax_stride + block, mask=inside & (block < blocks), other=0.0)
    word = first // 8 + tl.arange(0, COLUMNS // 8)[None, :]
    words = tl.load(numbers_ptr + start * stride + word, mask=inside & (word < blocks * 8), other=0)
    return words, absmax


@triton.jit
def encode(x, TO: tl.constexpr, dtype: tl.constexpr):
    """fp32 as it is written: as `dtype`, or in the form TO as uint8."""
    if TO == "bytes":
        return x
    elif TO == "int8":
        return int8_encode(x)
    elif TO == "fp8":
        return e4m3_encode(x)
    else:
        return x.to(dtype)
