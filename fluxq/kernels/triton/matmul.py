"""One kernel for a linear layer with the weight as it is stored: decoded in the loop, LoRA added to the accumulator.

For few rows of input, where reading the weight is all the work, and if there is no memory to decode a weight into. With
many rows, every tile of rows would decode each weight again, which costs more than decoding it once into a scratch
(linear.py).
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..weights import Weight
from .bits import e4m3_decode, int8_decode, nf4_decode
from .launch import Launch, ceildiv, shaped
from .layout import contiguous_rows
from .stored import stored
from .table import Choice
from .tiles import add_lora, tile_of


def linear(
    x: Tensor, weight: Weight, bias: Tensor | None, s: Tensor | None, up: Tensor | None, up_scale: float, tiles: Choice
) -> Tensor:
    """x W^T + s (up_scale up)^T + bias, (M, N) in x's dtype. x (M, K), s (M, R), up (N, R), bias (N,)."""
    (m, k), n = x.shape, weight.shape[0]
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    numbers, absmax, levels, row_scale, form = stored(weight)
    x = contiguous_rows(x)
    s, up = (None, None) if s is None or up is None else (contiguous_rows(s), contiguous_rows(up))
    launch = _launch(
        tiles, form, m, n, k, 0 if s is None else s.shape[1], x.stride(0), numbers.stride(0),
        0 if absmax is None else absmax.stride(0), 0 if s is None else s.stride(0), 0 if up is None else up.stride(0),
        float(up_scale),
    )  # fmt: skip
    launch(x, numbers, row_scale, absmax, levels, bias, s, up, y)
    return y


@shaped
def _launch(tiles: Choice, form: str, m: int, n: int, k: int, *numbers: float) -> Launch:
    return Launch(
        _linear, (ceildiv(m, tiles.block_m) * ceildiv(n, tiles.block_n),), m, n, k, *numbers,
        FORM=form, EVEN_K=k % tiles.block_k == 0, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_K=tiles.block_k,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M", "R", "s_stride", "up_stride"])  # they vary with image and LoRA
def _linear(
    x_ptr,  # (M, K) any float, rows x_stride apart
    w_ptr,  # float: (N, K) as x; fp8, int8: (N, K) bytes; nf4: (N, K/8) int32; rows w_stride apart
    scale_ptr,  # float: None; fp8, int8: (N,) fp32
    absmax_ptr,  # nf4: (N, K/64) fp32, rows absmax_stride apart
    levels_ptr,  # nf4: (16,) fp32
    bias_ptr,  # (N,) any float, or None
    s_ptr,  # (M, R) any float, or None
    up_ptr,  # (N, R) any float, or None
    y_ptr,  # (M, N) as x
    M,
    N,
    K,
    R,
    x_stride,
    w_stride,
    absmax_stride,
    s_stride,
    up_stride,
    up_scale,
    FORM: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row, column = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N)
    # From here on pointers, M and N are the tile's, so 64-bit arithmetic (M N can exceed 2^31) runs once per program.
    first_m, first_n = row.to(tl.int64) * BLOCK_M, column.to(tl.int64) * BLOCK_N
    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    inside_m, inside_n = m < M - first_m, n < N - first_n
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    # Rows past the end read the tile's first row, so the loop needs no mask for them; their results are not stored.
    x_ptrs = x_ptr + first_m * x_stride + tl.where(inside_m, m, 0)[:, None] * x_stride + k
    near_n = tl.where(inside_n, n, 0)[:, None]
    w_ptrs = w_ptr + first_n * w_stride + near_n * w_stride
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        # x may hold anything behind K, and its padding NaN, so it is masked like the weight.
        x = tl.load(x_ptrs) if EVEN_K else tl.load(x_ptrs, mask=start + k < K, other=0.0)
        if FORM == "nf4":
            word = start // 8 + tl.arange(0, BLOCK_K // 8)
            block = start // 64 + tl.arange(0, BLOCK_K // 64)
            absmax_ptrs = absmax_ptr + first_n * absmax_stride + near_n * absmax_stride + block
            words = tl.load(w_ptrs + word) if EVEN_K else tl.load(w_ptrs + word, mask=word < K // 8, other=0)
            absmax = tl.load(absmax_ptrs) if EVEN_K else tl.load(absmax_ptrs, mask=block < K // 64, other=0.0)
            levels = nf4_decode(words, levels_ptr).reshape(BLOCK_N, BLOCK_K // 64, 64)
            w = (levels * absmax[:, :, None]).reshape(BLOCK_N, BLOCK_K).to(dtype)
        else:
            inside_k = start + k < K
            w = tl.load(w_ptrs + start + k) if EVEN_K else tl.load(w_ptrs + start + k, mask=inside_k, other=0)
            if FORM == "int8":
                w = int8_decode(w).to(dtype)
            elif FORM == "fp8":
                w = e4m3_decode(w).to(dtype)
        acc = tl.dot(x, w.trans(), acc, input_precision="ieee")
        x_ptrs += BLOCK_K
    if scale_ptr is not None:
        acc *= tl.load(scale_ptr + first_n + n, mask=inside_n, other=0.0)
    if s_ptr is not None:
        s_ptrs = s_ptr + first_m * s_stride + m[:, None] * s_stride
        up_ptrs = up_ptr + first_n * up_stride + n[:, None] * up_stride
        acc = add_lora(acc, s_ptrs, up_ptrs, inside_m, inside_n, R, 1, up_scale, dtype)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + first_n + n, mask=inside_n, other=0.0).to(tl.float32)
    y_ptrs = y_ptr + first_m * N + first_n + m[:, None] * N + n
    tl.store(y_ptrs, acc.to(dtype), mask=inside_m[:, None] & inside_n)
