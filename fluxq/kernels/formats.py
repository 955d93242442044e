"""Converts a matrix to and from the stored formats."""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import ops
from .weights import FORMATS, NF4_BLOCK, NF4Weight, RowScaled, Weight


def quantize(w: Weight, format: str) -> Weight:
    """The (N, K) matrix `w`, of any float dtype or stored in any format, stored as `format`.

    A weight that is already in that format keeps its bytes; e4m3 without scales counts as fp8 with scales of 1. Raises
    ValueError for an unknown format, and for NF4 if K is not a multiple of 64.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, not {format!r}")
    if format == "bf16":
        return dequantize(w, torch.bfloat16)
    if isinstance(w, NF4Weight) and format == "nf4":
        return w
    eight_bits = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}.get(format)
    if isinstance(w, RowScaled) and w.values.dtype == eight_bits:
        return w
    if isinstance(w, Tensor) and w.dtype == torch.float8_e4m3fn == eight_bits:
        return RowScaled(w, torch.ones(w.shape[0], device=w.device))
    if not isinstance(w, Tensor) or w.dtype.itemsize == 1:
        w = dequantize(w, torch.float32)
    if eight_bits is not None:
        return RowScaled(*ops(w).row_quantize(w, eight_bits))
    if w.ndim != 2 or w.shape[1] % NF4_BLOCK:
        raise ValueError(f"nf4 needs a matrix whose width is a multiple of {NF4_BLOCK}, not {tuple(w.shape)}")
    return NF4Weight(*ops(w).nf4_quantize(w))


def dequantize(q: Weight, dtype: torch.dtype) -> Tensor:
    """The (N, K) matrix that `q` encodes, in `dtype`."""
    if isinstance(q, Tensor):
        return q.to(dtype)
    return ops(q.codes if isinstance(q, NF4Weight) else q.values).dequantize(q, dtype)
