"""Numbers of 4 and 8 bits from and to fp32, in integer arithmetic: what the kernels of this folder share.

Integers, because GPUs before sm_89 cannot so much as load an e4m3 number (their pointers are uint8 here), and because
Triton's interpreter rounds e4m3 wrongly; the native conversion would save a few instructions of kernels that wait for
memory.
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
    """(16,) fp32: between each level and the next; behind the last, inf."""
    levels = torch.tensor(NF4_LEVELS)
    return torch.cat([(levels[1:] + levels[:-1]) / 2, torch.tensor([torch.inf])]).to(device)


@triton.jit
def nf4_decode(
    words,  # (..., W) int32: eight codes each; in memory the high half of a byte comes first
    levels_ptr,  # (16,) fp32
):
    """(..., W, 8) fp32."""
    return nf4_level((tl.expand_dims(words, -1) >> nf4_shifts(len(words.shape))) & 15, levels_ptr)


@triton.jit
def nf4_level(codes, levels_ptr):
    """The levels of codes of any shape, fp32.

    They are looked up in shared memory (tl.gather): 16 words lie in 16 banks, so a warp reads in one go, and all of
    decoding compiles to 7 instructions a weight; with a load from a pointer to 10 to 20, with a tree of selections to
    25.
    """
    levels = tl.load(levels_ptr + tl.arange(0, 16))
    return tl.gather(levels, codes.reshape(codes.numel), 0).reshape(codes.shape)


@triton.jit
def nf4_shifts(rank: tl.constexpr):
    """(1, ..., 1, 8) int32: where in a word each of its eight codes lies."""
    shifts = (tl.arange(0, 8) * 4) ^ 4
    for _ in tl.static_range(rank):  # pyright: ignore[reportGeneralTypeIssues]
        shifts = tl.expand_dims(shifts, 0)
    return shifts


@triton.jit
def int8_decode(byte):
    """fp32 of uint8."""
    return byte.to(tl.int8, bitcast=True).to(tl.float32)


@triton.jit
def int8_encode(x):
    """uint8 of fp32 within -127..127, half to even: in 1.5 * 2^23 + x the last bit counts ones."""
    return (x + 12582912.0).to(tl.int32, bitcast=True).to(tl.uint8)


@triton.jit
def e4m3_decode(byte):
    """fp32 of uint8; a NaN (0x7F) becomes 480.

    In fp32's places for exponent and mantissa the number is 2^-120 of itself, subnormal ones too.
    """
    wide = byte.to(tl.int8, bitcast=True).to(tl.int32) << 20  # the sign fills what is left of it
    return (wide & -0x78100000).to(tl.float32, bitcast=True) * 1.329227995784916e36


@triton.jit
def e4m3_encode(x):
    """uint8 of fp32 within -448..448, half to even, the very bits of PyTorch's conversion.

    Beside 2^(e + 20), fp32 keeps of a number with exponent e the three bits that e4m3 keeps; below e = -6 e4m3's last
    bit stays where it is. Times 2^-120 the exponent is e4m3's own.
    """
    bits = x.to(tl.int32, bitcast=True)
    large = (tl.maximum(bits & 0x7F800000, 121 << 23) + (20 << 23)).to(tl.float32, bitcast=True)
    rounded = (tl.abs(x) + large) - large
    places = (rounded * 7.52316384526264e-37).to(tl.int32, bitcast=True) >> 20
    return (places | ((bits >> 24) & 0x80)).to(tl.uint8)
