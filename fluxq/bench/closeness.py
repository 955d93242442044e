"""How the answer of an op is judged: against fp64, beside what plain PyTorch gives in the same dtypes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def relative_error(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b| in the Frobenius norm, in fp64."""
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-300))


def cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.double().flatten(), b.double().flatten()
    return float(a @ b / (a.norm() * b.norm()).clamp(min=1e-300))


def twice_rule(
    ours: Sequence[Tensor], plain: Sequence[Tensor], exact: Sequence[Tensor], slack: float = 1e-6
) -> dict[str, Any]:
    """Each output's relative error may be at most twice that of plain PyTorch in the same dtypes, both against fp64,
    and `slack` more.
    """
    errors = [
        {"ours": relative_error(a, c), "plain": relative_error(b, c)}
        for a, b, c in zip(ours, plain, exact, strict=True)
    ]
    fine = [error["ours"] <= 2 * error["plain"] + slack for error in errors]  # NaN is never fine
    return {"ok": all(fine), "errors": errors}
