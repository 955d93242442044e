"""Shared by the matrix products: the order in which tiles are computed, and LoRA on the accumulator."""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_of(program, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The tile (row, column) that a program computes. Eight rows of tiles are grouped and visited column by column, so
    that programs that run at the same time read data that is already in L2.
    """
    rows, columns = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first = program // (8 * columns) * 8
    height = tl.minimum(rows - first, 8)
    within = program % (8 * columns)
    return first + within % height, within // height


@triton.jit
def add_lora(
    acc,  # (BLOCK_M, BLOCK_N) fp32
    s_ptrs,  # (BLOCK_M, 1): the rows of s (M, R), any float
    up_ptrs,  # (BLOCK_N, 1): the first column of up (N, R), any float; the next is up_step numbers on
    inside_m,  # (BLOCK_M,), (BLOCK_N,): which of them exist
    inside_n,
    R,
    up_step,
    up_scale,
    DTYPE: tl.constexpr,
):
    """acc + s (up_scale up)^T, the factors rounded to DTYPE. It reads the rank 16 at a time, so one kernel serves all
    ranks.
    """
    lane = tl.arange(0, 16)
    for start in tl.range(0, R, 16, num_stages=1):  # the main loop benefits more from the memory of extra stages
        r = start + lane
        s = tl.load(s_ptrs + r, mask=inside_m[:, None] & (r < R), other=0.0).to(DTYPE)
        up = tl.load(up_ptrs + r * up_step, mask=inside_n[:, None] & (r < R), other=0.0).to(tl.float32) * up_scale
        acc = tl.dot(s, up.to(DTYPE).trans(), acc, input_precision="ieee")
    return acc
