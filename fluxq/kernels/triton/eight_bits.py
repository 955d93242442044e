"""Shared by the ops that produce a linear layer's input: 8-bit rows, and their product with LoRA's `down`."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activations import Activations, Wants
from ..rounding import rounded
from .bits import e4m3_encode, int8_encode, largest
from .launch import ceildiv
from .table import Choice, choose, fills, multiprocessors


def outputs(like: Tensor, width: int, wants: Wants) -> Activations:
    """Uninitialized memory for rows of `width`, as many as `like` (B, L, ...) has, in the form that `wants` names.

    Values are uint8 here; `with_dtype` sets their type.
    """
    batch, length, _ = like.shape
    y = like.new_empty(batch, length, width + (wants.padding if wants.dtype is None else 0))
    if wants.dtype is None:
        return Activations(y)
    values = like.new_empty(batch * length, width, dtype=torch.uint8)
    scale = like.new_empty(batch * length, dtype=torch.float32)
    s = None if wants.down is None else like.new_empty(batch * length, wants.down.shape[0])
    return Activations(y, values, scale, s)


def with_dtype(rows: Activations, wants: Wants) -> Activations:
    """`rows` with its values viewed in the dtype that `wants` names."""
    return rows if rows.values is None or wants.dtype is None else rows._replace(values=rows.values.view(wants.dtype))


class Down(NamedTuple):
    """LoRA's `down` (R, K) for 8-bit rows, or None; the same if the kernel that writes the rows multiplies by it; how
    much of R it computes at a time: 16 for small ranks, else 64, so that all ranks need only two kernels; and its tile.
    """

    factor: Tensor | None
    fused: Tensor | None
    block: int
    tile: Choice


def tile_and_down(op: str, wants: Wants, like: Tensor) -> Down:
    """The tile of `op`, which writes 8-bit rows, as many as `like` (B, L, ...) has. Its kernel also multiplies them by
    `down` if that is wanted and if its programs of a tile of rows each fill the GPU; or else `multiply` does it after.
    """
    if wants.down is None:
        return Down(None, None, 16, choose(op, like.device))
    factor = rounded(wants.down, like.dtype)
    assert factor is not None
    tile, block = choose(f"{op}_down", like.device), 16 if factor.shape[0] <= 16 else 64
    if fills(like.shape[0] * ceildiv(like.shape[1], tile.block_m), multiprocessors(like.device)):
        return Down(factor, factor.contiguous(), block, tile)
    return Down(factor, None, 16, choose(op, like.device))


def multiply(down: Down, out: Activations) -> None:
    """Write s = x down^T if the kernel did not."""
    if down.factor is not None and down.fused is None and out.s is not None:
        torch.mm(out.x.view(-1, out.x.shape[-1]), down.factor.t(), out=out.s)


def registers(warps: int) -> int:
    """The most registers per thread that let two programs run on a multiprocessor, so that one works while the other
    waits for memory. Without a limit, the compiler uses more than it needs.
    """
    return min(65536 // (2 * 32 * warps), 255)


@triton.jit
def scales_of(y, INT8: tl.constexpr):
    """The scales (rows,) of y (rows, columns) fp32."""
    return scale_of(largest(y, axis=1), 127.0 if INT8 else 448.0)


@triton.jit
def scale_of(magnitude, LARGEST: tl.constexpr):
    """The scale of a row whose largest magnitude is `magnitude`; NaN stays NaN, so that 8 bits do not hide it."""
    return tl.div_rn(tl.maximum(magnitude, 1e-30, propagate_nan=tl.PropagateNan.ALL), LARGEST)


@triton.jit
def to_8_bits(y, scale, INT8: tl.constexpr):
    """y (rows, columns) fp32 divided by `scale` (rows,), as bytes of int8 or e4m3."""
    scaled = y * (1.0 / scale)[:, None]
    return int8_encode(scaled) if INT8 else e4m3_encode(tl.minimum(tl.maximum(scaled, -448.0), 448.0))


@triton.jit
def multiply_by_down(
    y_ptr,  # (ROWS, K) written by this program
    down_ptr,  # (R, K)
    s_ptr,  # (ROWS, R) out
    rows,  # how many of ROWS exist
    R,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """s = y down^T for a tile of rows; y is read back from the cache right after it was written."""
    tl.debug_barrier()  # other threads of this program wrote what this one reads
    row = tl.arange(0, ROWS)[:, None]
    here = row < rows
    for first in range(0, R, BLOCK_R):
        rank = first + tl.arange(0, BLOCK_R)
        s = tl.zeros([ROWS, BLOCK_R], tl.float32)
        for start in range(0, K, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)[None, :]
            y = tl.load(y_ptr + row * K + k, mask=here & (k < K), other=0.0)
            down = tl.load(down_ptr + rank[:, None] * K + k, mask=(rank < R)[:, None] & (k < K), other=0.0)
            s = tl.dot(y, tl.trans(down), s, input_precision=PRECISION)
        tl.store(s_ptr + row * R + rank[None, :], s.to(s_ptr.dtype.element_ty), mask=here & (rank < R)[None, :])
