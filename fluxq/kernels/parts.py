"""Gradients of a layer whose outputs are several tensors: consecutive parts, which together are all of them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

Parts = list[tuple[slice, Tensor]]
"""Which of the N outputs each gradient is of, and the gradient as a matrix (M, part)."""


def by_part(dys: Sequence[Tensor]) -> Parts:
    """dys: (..., part) each, in order."""
    parts, start = Parts(), 0
    for dy in dys:
        n = dy.shape[-1]
        parts.append((slice(start, start + n), dy.reshape(-1, n)))
        start += n
    return parts


def s_gradient(parts: Parts, up: Tensor, scale: float) -> Tensor:
    """The gradient of s = x down^T: scale dy up, (M, R) in dy's dtype. up (N, R)."""
    rows = parts[0][1]
    ds, up = rows.new_empty(rows.shape[0], up.shape[1]), up.to(rows.dtype)
    for part, dy in parts:
        ds.addmm_(dy, up if len(parts) == 1 else up[part], beta=int(part.start > 0), alpha=scale)
    return ds
