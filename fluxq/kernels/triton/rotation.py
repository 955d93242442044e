"""Rotation by blocks of regular Hadamard matrices (fluxq/kernels/rotation.py), in registers and in fp32.

A matrix of 4^n is a product of n steps: in step i the four numbers whose places differ in the i-th digit to base 4
become half their sum, less each. Within a row the digits of a block lie in a thread or in the lanes of its warp, so a
step costs a few additions and shuffles and no shared memory. Two products with 16 x 16 matrices, on tensor cores, take
a fifth fewer instructions, but go through shared memory four times, hold less in flight and round to tf32 (compiled for
all GPUs; neither was timed).
"""

# A kernel is called with constexpr arguments as plain values, and with num_warps:
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .table import choose


def rotate(x: Tensor, block: int) -> Tensor:
    """x H for x (..., K), H the (block, block) matrix on every stretch of `block` columns; its own inverse."""
    x, y = x.contiguous(), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tile = choose("rotate", x.device)
    _rotate[(triton.cdiv(x.numel(), tile.block_n),)](
        x, y, x.numel() // block, BLOCK=block, NUMBERS=tile.block_n, num_warps=tile.warps, num_stages=tile.stages
    )
    return y


@triton.jit
def rotated(x, BLOCK: tl.constexpr):
    """x H for a tile x (rows, columns) fp32, BLOCK 64 or 256, of which columns are a multiple."""
    x = _step(_step(_step(x, 1), 4), 16)
    return _step(x, 64) if BLOCK == 256 else x


@triton.jit
def _step(x, PLACE: tl.constexpr):
    """Four numbers are summed at once, not two and two: such a sum the compiler does not do again for each reader."""
    four = x.reshape(x.numel // (4 * PLACE), 4, PLACE)
    return (0.5 * tl.sum(four, axis=1, keep_dims=True) - four).reshape(x.shape)


@triton.jit(do_not_specialize=["blocks"])
def _rotate(
    x_ptr,  # (blocks, BLOCK) any float
    y_ptr,  # as x, out
    blocks,  # counted in these, sizes of images fit 32 bits
    BLOCK: tl.constexpr,
    NUMBERS: tl.constexpr,
):
    HERE: tl.constexpr = NUMBERS // BLOCK
    block = tl.program_id(0).to(tl.int64) * HERE + tl.arange(0, HERE)[:, None]
    at, inside = block * BLOCK + tl.arange(0, BLOCK)[None, :], block < blocks
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, rotated(x, BLOCK).to(y_ptr.dtype.element_ty), mask=inside)
