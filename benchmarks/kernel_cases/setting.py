"""What every case has in common: where it runs, FLUX's shapes, and how closeness is judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.roofline import Ceilings
from fluxq.kernels import ops

LAYERS = {"qkv": (3, 1), "proj": (1, 1), "mlp.0": (4, 1), "mlp.2": (1, 4), "linear2": (1, 5)}
"""A block's layers as multiples of the width D: (N, K). A single block calls linear1 as qkv and as mlp.0."""


@dataclass(frozen=True)
class Setting:
    """FLUX.1's width and rows, or `tiny` ones. `rows`: text and image tokens of 512, 768 and 1024 pixels."""

    device: torch.device
    tiny: bool = False
    rows: tuple[int, ...] = (1536, 2816, 4608)
    rank: int = 16
    seconds: float = 0.4
    ceilings: Ceilings = field(default_factory=dict)

    @property
    def width(self) -> int:
        return 128 if self.tiny else 3072

    @property
    def heads(self) -> int:
        return 2 if self.tiny else 24

    @property
    def text(self) -> int:
        return 70 if self.tiny else 512

    @property
    def ours(self) -> ModuleType:
        """The backend that fluxq takes on this device."""
        return ops(torch.empty(0, device=self.device))

    def layer(self, name: str) -> tuple[int, int]:
        n, k = LAYERS[name]
        return n * self.width, k * self.width

    def randn(self, *shape: int, std: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return (torch.randn(shape, device=self.device) * std).to(dtype)


def relative_error(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b| in the Frobenius norm, in fp64."""
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-300))


def cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.double().flatten(), b.double().flatten()
    return float(a @ b / (a.norm() * b.norm()).clamp(min=1e-300))


def twice_rule(ours: Sequence[Tensor], plain: Sequence[Tensor], exact: Sequence[Tensor]) -> dict[str, Any]:
    """Against fp64, ours may err at most twice as much as plain PyTorch in the same dtypes, output by output."""
    rows = [
        {"ours": relative_error(a, c), "plain": relative_error(b, c)}
        for a, b, c in zip(ours, plain, exact, strict=True)
    ]
    fine = [row["ours"] <= 2 * row["plain"] + 1e-6 for row in rows]  # NaN is never fine
    return {"ok": all(fine), "errors": rows}
