"""Encodes a matrix in NF4, byte for byte as bitsandbytes (Dettmers et al. 2023, appendix E); convert.py decodes."""

# A kernel is called with constexpr arguments as plain values, and with num_warps:
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..weights import NF4_BLOCK
from .bits import largest, nf4_midpoints, nf4_shifts
from .launch import Launch, ceildiv, shaped
from .table import Choice, choose


def nf4_quantize(w: Tensor) -> tuple[Tensor, Tensor]:
    """NF4 codes (N, K/2) uint8 and scales (N, K/64) fp32 of the (N, K) matrix `w`, byte for byte as bitsandbytes."""
    rows, columns = w.shape
    flat = w.contiguous()  # a no-op for weights from files; blocks run along rows
    codes = torch.empty(rows, columns // 2, dtype=torch.uint8, device=w.device)
    absmax = torch.empty(rows, columns // NF4_BLOCK, dtype=torch.float32, device=w.device)
    launch = _launch(choose("nf4_quantize", w.device), absmax.numel())
    launch(flat, codes.view(torch.int32), absmax, nf4_midpoints(w.device))
    return codes, absmax


@shaped
def _launch(tile: Choice, blocks: int) -> Launch:
    return Launch(
        _quantize, (ceildiv(blocks, tile.block_m),), blocks,
        BLOCKS=tile.block_m, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


@triton.jit(do_not_specialize=[])
def _quantize(
    w_ptr,  # (blocks, 64)
    codes_ptr,  # (blocks, 8) int32: eight codes each
    absmax_ptr,  # (blocks,) fp32
    midpoints_ptr,  # (16,) fp32, the last inf
    blocks,
    BLOCKS: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    inside = (block < blocks)[:, None]
    w = tl.load(w_ptr + block[:, None] * 64 + tl.arange(0, 64)[None, :], mask=inside, other=0.0).to(tl.float32)
    absmax = largest(w, axis=1)
    least = tl.full([BLOCKS], 1e-38, tl.float32)  # subnormal; a plain literal would be fp64
    scaled = w * tl.div_rn(1.0, tl.maximum(absmax, least))[:, None]
    # A code is the number of midpoints below: a binary search over the 15, in four steps.
    midpoints, scaled = tl.load(midpoints_ptr + tl.arange(0, 16)), scaled.reshape(BLOCKS * 64)
    code = tl.zeros([BLOCKS * 64], tl.int32)
    for step in tl.static_range(3, -1, -1):
        code += tl.where(scaled > tl.gather(midpoints, code + ((1 << step) - 1), 0), 1 << step, 0)
    words = tl.sum(code.reshape(BLOCKS, 8, 8) << nf4_shifts(2), axis=2)
    tl.store(codes_ptr + block[:, None] * 8 + tl.arange(0, 8)[None, :], words, mask=inside)
    tl.store(absmax_ptr + block, absmax, mask=block < blocks)
