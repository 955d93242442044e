"""A matrix into one of the stored formats and back."""

from __future__ import annotations

import torch
from torch import Tensor

from fluxq.kernels.dispatch import ops
from fluxq.kernels.weights import FORMATS, NF4_BLOCK, NF4Weight, RowScaled, Weight


def quantize(w: Tensor, format: str) -> Weight:
    """The (N, K) matrix `w`, any float dtype, stored as `format`.

    Raises ValueError for an unknown format, and for NF4 where K is no multiple of 64.
    """
    if format == "bf16":
        return w.to(torch.bfloat16)
    if format == "nf4":
        if w.ndim != 2 or w.shape[1] % NF4_BLOCK:
            raise ValueError(f"nf4 stores matrices whose width is a multiple of {NF4_BLOCK}, not {tuple(w.shape)}")
        return NF4Weight(*ops(w).nf4_quantize(w))
    if format == "fp8" and w.dtype == torch.float8_e4m3fn:
        return RowScaled(w, torch.ones(w.shape[0], device=w.device))
    if format in ("fp8", "int8"):
        return RowScaled(*ops(w).row_quantize(w, torch.int8 if format == "int8" else torch.float8_e4m3fn))
    raise ValueError(f"format must be one of {', '.join(FORMATS)}, not {format!r}")


def dequantize(q: Weight, dtype: torch.dtype) -> Tensor:
    """The (N, K) matrix that `q` stands for, in `dtype`."""
    if isinstance(q, Tensor):
        return q.to(dtype)
    return ops(q.codes if isinstance(q, NF4Weight) else q.values).dequantize(q, dtype)
