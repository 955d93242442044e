"""Products of int8 or e4m3 matrices on the tensor cores, with scales, LoRA and bias in the epilogue.

Sums are exact in int32, or in fp32. Before sm_100, tensor cores truncate a sum of e4m3 products to 22 bits, which makes
it shrink: by 1 % over FLUX's widest layer. So after every `PROMOTED` numbers it is added to a sum in true fp32, which
leaves less than 0.1 % (Zhang et al. 2024, SageAttention2, found the 22 bits on RTX 40 and Hopper).

A tile is scaled, LoRA and bias are added in fp32, and the result is rounded once.
As separate passes over the int32 result, these would add half of the product's time (predicted, for RTX 40).

The table chooses one of these paths:

triton  The plain product.
scaled  fp8 on RTX 50 and similar GPUs, which multiply e4m3 at full rate only in blocks of 32 numbers with a scale each
        (OneTrainer measured half the rate without): every block's scale is 1, so the results are the same.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, ceildiv, shaped
from .layout import contiguous_rows
from .table import INTERPRETED, Choice, choose_tile, generation, truncates_fp8
from .tiles import add_lora, tile_of

PROMOTED = 512
"""After how many e4m3 products a partial sum is added to the true one; a multiple of every tile's depth. Each 128, as
Hopper's libraries do it, would be little more exact, and take a quarter of the time of Hopper's products (predicted).
"""


def matmul_8bit(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor | None,
    dtype: torch.dtype,
    s: Tensor | None = None,
    up: Tensor | None = None,
    bias: Tensor | None = None,
    up_scale: float = 1.0,
    onto: Tensor | None = None,
) -> Tensor:
    """(M, N) in `dtype`: a b^T, row m times a_scale[m], column n times b_scale[n], plus s (up_scale up)^T and bias,
    rounded once. If `onto` (M, N) is given, all of it is added to that, in place.

    a (M, K), b (N, K) both int8 or both float8_e4m3fn; a_scale (M,), b_scale (N,) fp32; s (M, R), up (N, R), bias (N,).
    s and up_scale up are rounded to `dtype` for their product. Raises ValueError for fp8 on a GPU that lacks it.
    """
    if a.dtype != torch.int8 and INTERPRETED < generation(a.device) < 89:
        raise ValueError("this GPU cannot multiply in fp8 (RTX 40 series and newer can); use compute int8 or bf16")
    (m, k), n = a.shape, b.shape[0]
    y = torch.empty(m, n, dtype=dtype, device=a.device) if onto is None else onto
    choice = choose_tile("matmul_int8" if a.dtype == torch.int8 else "matmul_fp8", a.device, m, n)
    a, b = contiguous_rows(a), contiguous_rows(b)  # 8-bit tensor cores before sm_100 read both along K
    r, s_stride, up_strides = 0, 0, (0, 0)
    if s is not None and up is not None:
        s, up = contiguous_rows(s), up if 1 in up.stride() else up.contiguous()
        r, s_stride, up_strides = s.shape[1], s.stride(0), up.stride()  # for the gradient, `up` is down^T
    promoted = PROMOTED if a.dtype != torch.int8 and truncates_fp8(a.device) else 0
    launch = _launch(choice, promoted, m, n, k, r, a.stride(0), b.stride(0), s_stride, up_strides, float(up_scale))
    launch(a, a_scale, b, b_scale, s, up, bias, onto, y)
    return y


@shaped
def _launch(
    choice: Choice, promoted: int, m: int, n: int, k: int, r: int, a_stride: int, b_stride: int, s_stride: int,
    up_strides: tuple[int, int], up_scale: float,
) -> Launch:  # fmt: skip
    along_r = up_strides[1] == 1 or r <= 1
    return Launch(
        _matmul_8bit, (ceildiv(m, choice.block_m) * ceildiv(n, choice.block_n),), m, n, k, r, a_stride, b_stride,
        s_stride, up_strides[0 if along_r else 1], up_scale,
        EVEN_K=k % choice.block_k == 0, UP_ALONG_R=along_r,
        BLOCK_M=choice.block_m, BLOCK_N=choice.block_n, BLOCK_K=choice.block_k, num_warps=choice.warps,
        SCALED=choice.path == "scaled" and _has_scaled_dot(), PROMOTE=promoted, num_stages=choice.stages,
    )  # fmt: skip


@cache
def _has_scaled_dot() -> bool:
    """Whether Triton compiles a scaled product of fp8 to the GPU's native instruction; before 3.6 it does not."""
    return tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 6)


@triton.jit(do_not_specialize=["M", "R", "s_stride", "up_stride"])  # they vary with image and LoRA
def _matmul_8bit(
    a_ptr,  # (M, K) int8 or e4m3, rows a_stride apart
    a_scale_ptr,  # (M,) fp32
    b_ptr,  # (N, K) as a, rows b_stride apart
    b_scale_ptr,  # (N,) fp32, or None
    s_ptr,  # (M, R) any float, or None
    up_ptr,  # (N, R) any float, its rows or columns up_stride apart, or None
    bias_ptr,  # (N,) any float, or None
    onto_ptr,  # (M, N) any float, what is added, or None
    y_ptr,  # (M, N) any float
    M,
    N,
    K,
    R,
    a_stride,
    b_stride,
    s_stride,
    up_stride,
    up_scale,
    EVEN_K: tl.constexpr,
    UP_ALONG_R: tl.constexpr,  # up's rows are contiguous, else its columns
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SCALED: tl.constexpr,
    PROMOTE: tl.constexpr,  # after how much of K a partial sum is added to `acc`, or 0 for never
):
    row, column = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N)
    # From here on pointers, M and N are the tile's, so 64-bit arithmetic (M N can exceed 2^31) runs once per program.
    first_m, first_n = row.to(tl.int64) * BLOCK_M, column.to(tl.int64) * BLOCK_N
    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    inside_m, inside_n = m < M - first_m, n < N - first_n
    # Rows past the end read the tile's first row, so the loop needs no mask for them; their results are not stored.
    a_ptrs = a_ptr + first_m * a_stride + tl.where(inside_m, m, 0)[:, None] * a_stride + k
    b_ptrs = b_ptr + first_n * b_stride + tl.where(inside_n, n, 0)[:, None] * b_stride + k
    acc_type: tl.constexpr = tl.int32 if a_ptr.dtype.element_ty == tl.int8 else tl.float32
    acc = tl.zeros((BLOCK_M, BLOCK_N), acc_type)
    if PROMOTE:
        part = tl.zeros((BLOCK_M, BLOCK_N), acc_type)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            a, b = tl.load(a_ptrs), tl.load(b_ptrs)
        else:
            a = tl.load(a_ptrs, mask=start + k < K, other=0.0)
            b = tl.load(b_ptrs, mask=start + k < K, other=0.0)
        if SCALED:
            a_unit = tl.full((BLOCK_M, BLOCK_K // 32), 127, tl.uint8)
            b_unit = tl.full((BLOCK_N, BLOCK_K // 32), 127, tl.uint8)
            acc = tl.dot_scaled(a, a_unit, "e4m3", b.trans(), b_unit, "e4m3", acc)
        elif PROMOTE:
            part = tl.dot(a, b.trans(), part, out_dtype=acc_type)
            if (start + BLOCK_K) % PROMOTE == 0:
                acc += part
                part = tl.zeros((BLOCK_M, BLOCK_N), acc_type)
        else:
            acc = tl.dot(a, b.trans(), acc, out_dtype=acc_type)
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K
    if PROMOTE:
        acc += part
    y = acc.to(tl.float32) * tl.load(a_scale_ptr + first_m + m, mask=inside_m, other=0.0)[:, None]
    if b_scale_ptr is not None:
        y *= tl.load(b_scale_ptr + first_n + n, mask=inside_n, other=0.0)
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    if s_ptr is not None:
        s_ptrs = s_ptr + first_m * s_stride + m[:, None] * s_stride
        if UP_ALONG_R:
            up_ptrs = up_ptr + first_n * up_stride + n[:, None] * up_stride
            y = add_lora(y, s_ptrs, up_ptrs, inside_m, inside_n, R, 1, up_scale, dtype)
        else:
            y = add_lora(y, s_ptrs, up_ptr + first_n + n[:, None], inside_m, inside_n, R, up_stride, up_scale, dtype)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + first_n + n, mask=inside_n, other=0.0).to(tl.float32)
    at, inside = first_m * N + first_n + m[:, None] * N + n, inside_m[:, None] & inside_n
    if onto_ptr is not None:
        y += tl.load(onto_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, y.to(dtype), mask=inside)
