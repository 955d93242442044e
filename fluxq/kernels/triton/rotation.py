"""Rotation by blocks of regular Hadamard matrices (fluxq/kernels/rotation.py), in registers and in fp32.

A matrix of size 4^n is a product of n steps: in step i, each group of four numbers whose positions differ in the i-th
base-4 digit is replaced by half its sum minus each number. Within a row, the digits of a block are in one thread or in
the lanes of its warp, so a step costs a few additions and shuffles and no shared memory. Two products with 16 x 16
matrices on tensor cores would take a fifth fewer instructions, but go through shared memory four times, keep less in
flight and round to tf32 (compiled for all GPUs; neither was timed).
"""

# A kernel is called with constexpr arguments as plain values, and with num_warps:
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, ceildiv, shaped
from .table import Choice, choose


def rotate(x: Tensor, block: int) -> Tensor:
    """x H for x (..., K), with the (block, block) matrix H applied to every `block` columns; its own inverse."""
    x, y = x.contiguous(), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(choose("rotate", x.device), x.numel(), block)(x, y)
    return y


@shaped
def _launch(tile: Choice, count: int, block: int) -> Launch:
    return Launch(
        _rotate, (ceildiv(count, tile.block_n),), count // block,
        BLOCK=block, NUMBERS=tile.block_n, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


@triton.jit
def rotated(x, BLOCK: tl.constexpr):
    """x H for a tile x (rows, columns) fp32; BLOCK is 64 or 256, and columns is a multiple of it."""
    x = _step(_step(_step(x, 1), 4), 16)
    return _step(x, 64) if BLOCK == 256 else x


@triton.jit
def _step(x, PLACE: tl.constexpr):
    """Sum four numbers at once, not in pairs: the compiler does not repeat such a sum for each reader."""
    four = x.reshape(x.numel // (4 * PLACE), 4, PLACE)
    return (0.5 * tl.sum(four, axis=1, keep_dims=True) - four).reshape(x.shape)


@triton.jit(do_not_specialize=["blocks"])
def _rotate(
    x_ptr,  # (blocks, BLOCK) any float
    y_ptr,  # as x, out
    blocks,  # the count of blocks fits 32 bits for any image size
    BLOCK: tl.constexpr,
    NUMBERS: tl.constexpr,
):
    HERE: tl.constexpr = NUMBERS // BLOCK
    block = tl.program_id(0).to(tl.int64) * HERE + tl.arange(0, HERE)[:, None]
    at, inside = block * BLOCK + tl.arange(0, BLOCK)[None, :], block < blocks
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, rotated(x, BLOCK).to(y_ptr.dtype.element_ty), mask=inside)
