"""How frozen weights are stored: `nf4`, `fp8`, `int8`, or `bf16` (a plain tensor).

nf4    two 4-bit codes a byte, one fp32 scale per 64 weights: bitsandbytes' bytes
fp8    e4m3 (4 exponent bits, 3 of mantissa), one fp32 scale per output row; a file that is fp8 already keeps its bytes
int8   symmetric in -127..127, one fp32 scale per output row

A stored weight is a plain container of tensors, not a tensor subclass: whoever multiplies by it asks for `dequantize`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fluxq.kernels.dispatch import ops

FORMATS = ("nf4", "fp8", "int8", "bf16")
NF4_BLOCK = 64


@dataclass(frozen=True, eq=False)
class NF4Weight:
    """An (N, K) matrix in NF4. bitsandbytes' bytes for the same matrix are `codes.flatten()` and `absmax.flatten()`.

    codes (N, K/2) uint8, high nibble first; absmax (N, K/64) fp32.
    """

    codes: Tensor
    absmax: Tensor

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.codes.shape[0], self.codes.shape[1] * 2))


@dataclass(frozen=True, eq=False)
class RowScaled:
    """An (N, K) matrix in 8 bits: row n is values[n] * scale[n].

    values (N, K) int8 or float8_e4m3fn; scale (N,) fp32.
    """

    values: Tensor
    scale: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.values.shape


Weight = Tensor | NF4Weight | RowScaled


def quantize(w: Tensor, format: str) -> Weight:
    """The (N, K) matrix `w`, any float dtype, stored as `format`.

    Raises ValueError for an unknown format, and for NF4 where K is no multiple of 64.
    """
    if format == "bf16":
        return w.to(torch.bfloat16)
    if format == "nf4":
        if w.ndim != 2 or w.shape[1] % NF4_BLOCK:
            raise ValueError(f"nf4 stores matrices whose width is a multiple of {NF4_BLOCK}, not {tuple(w.shape)}")
        return NF4Weight(*ops().nf4_quantize(w))
    if format == "fp8" and w.dtype == torch.float8_e4m3fn:
        return RowScaled(w, torch.ones(w.shape[0], device=w.device))
    if format in ("fp8", "int8"):
        return RowScaled(*ops().row_quantize(w, torch.int8 if format == "int8" else torch.float8_e4m3fn))
    raise ValueError(f"format must be one of {', '.join(FORMATS)}, not {format!r}")


def dequantize(q: Weight, dtype: torch.dtype) -> Tensor:
    """The (N, K) matrix that `q` stands for, in `dtype`."""
    if isinstance(q, NF4Weight):
        return ops().nf4_dequantize(q.codes, q.absmax, dtype)
    if isinstance(q, RowScaled):
        return ops().row_dequantize(q.values, q.scale, dtype)
    return q.to(dtype)
