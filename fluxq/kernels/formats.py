"""How frozen weights are stored: `nf4` (two 4-bit codes a byte, one fp32 scale per 64 weights) or `bf16` (a plain
tensor).

A stored weight is a plain container of tensors, not a tensor subclass: whoever multiplies by it asks for `dequantize`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fluxq.kernels.dispatch import ops

FORMATS = ("nf4", "bf16")
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


Weight = Tensor | NF4Weight


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
    raise ValueError(f"format must be one of {', '.join(FORMATS)}, not {format!r}")


def dequantize(q: Weight, dtype: torch.dtype) -> Tensor:
    """The (N, K) matrix that `q` stands for, in `dtype`."""
    if isinstance(q, NF4Weight):
        return ops().nf4_dequantize(q.codes, q.absmax, dtype)
    return q.to(dtype)
