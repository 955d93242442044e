"""Converts 4-bit and 8-bit numbers from and to fp32 in integer arithmetic, for all kernels in this folder.

Integers, because GPUs before sm_89 cannot even load an e4m3 number (their pointers are uint8 here), and because
Triton's interpreter rounds e4m3 incorrectly. Native conversion would save only a few instructions, in kernels that wait
for memory.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import NF4_LEVELS


@cache
def nf4_levels(device: torch.device) -> Tensor:
    """(16,) fp32."""
    return torch.tensor(NF4_LEVELS, device=device)


@cache
def nf4_midpoints(device: torch.device) -> Tensor:
    """(16,) fp32: the midpoint between each level and the next; after the last, inf."""
    levels = torch.tensor(NF4_LEVELS)
    return torch.cat([(levels[1:] + levels[:-1]) / 2, torch.tensor([torch.inf])]).to(device)


@triton.jit
def nf4_decode(
    words,  # (..., W) int32: eight codes each; the high half of each byte comes first
    levels_ptr,  # (16,) fp32
):
    """(..., W, 8) fp32."""
    return nf4_level((tl.expand_dims(words, -1) >> nf4_shifts(len(words.shape))) & 15, levels_ptr)


@triton.jit
def nf4_level(codes, levels_ptr):
    """The levels of codes of any shape, fp32.

    The lookup reads shared memory (tl.gather): 16 words are in 16 banks, so a warp reads them at once, and decoding
    compiles to 7 instructions per weight. A load from a pointer takes 10 to 20, a tree of selections 25.
    """
    levels = tl.load(levels_ptr + tl.arange(0, 16))
    return tl.gather(levels, codes.reshape(codes.numel), 0).reshape(codes.shape)


@triton.jit
def nf4_shifts(rank: tl.constexpr):
    """(1, ..., 1, 8) int32: the bit offset of each of a word's eight codes."""
    shifts = (tl.arange(0, 8) * 4) ^ 4
    for _ in tl.static_range(rank):  # pyright: ignore[reportGeneralTypeIssues]
        shifts = tl.expand_dims(shifts, 0)
    return shifts


@triton.jit
def largest(x, axis=None):
    """The largest magnitude of x (fp32) along `axis`; NaN if any is NaN, which `tl.max` would leave out.

    Without the sign, a float's bits are ordered as integers are, and those of NaN are the largest.
    """
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=axis).to(tl.float32, bitcast=True)


@triton.jit
def int8_decode(byte):
    """fp32 from uint8."""
    return byte.to(tl.int8, bitcast=True).to(tl.float32)


@triton.jit
def int8_encode(x):
    """uint8 from fp32 within -127..127, half to even: in 1.5 * 2^23 + x the last bit counts ones."""
    return (x + 12582912.0).to(tl.int32, bitcast=True).to(tl.uint8)


@triton.jit
def e4m3_decode(byte):
    """fp32 from uint8; a NaN (0x7F) becomes 480.

    Shifted to fp32's exponent and mantissa bits, the number is 2^-120 times its value, subnormal numbers included.
    """
    wide = byte.to(tl.int8, bitcast=True).to(tl.int32) << 20  # the sign fills the bits to its left
    return (wide & -0x78100000).to(tl.float32, bitcast=True) * 1.329227995784916e36


@triton.jit
def e4m3_encode(x):
    """uint8 from fp32 within -448..448, half to even, bit for bit PyTorch's conversion.

    Added to 2^(e + 20), a number with exponent e keeps exactly the three mantissa bits of e4m3; below e = -6 the last
    bit of e4m3 has a fixed place. Multiplied by 2^-120, the exponent is e4m3's own.
    """
    bits = x.to(tl.int32, bitcast=True)
    large = (tl.maximum(bits & 0x7F800000, 121 << 23) + (20 << 23)).to(tl.float32, bitcast=True)
    rounded = (tl.abs(x) + large) - large
    places = (rounded * 7.52316384526264e-37).to(tl.int32, bitcast=True) >> 20
    return (places | ((bits >> 24) & 0x80)).to(tl.uint8)
