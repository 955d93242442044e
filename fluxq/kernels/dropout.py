"""Dropout of LoRA: what one micro-step leaves out of each layer.

Inside `dropping(by_layer)` a linear layer uses its LoRA as `by_layer` says. A block that runs there keeps that for its
replay (replay.py), which so leaves out the same. Outside, nothing is left out, and no kernel is launched for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor


class Dropped(NamedTuple):
    """What one use of a layer leaves out: the LoRA becomes scale (factors * (drop(x) down^T)) up^T.

    factors: (B, R) fp32 for x down^T of each example: 0 for a rank, or for all, that are left out, else what makes up
    for the rest. rate: the chance of each number of the input to be left out, 0 for none; key: (1,) int64, which ones.
    """

    factors: Tensor
    rate: float
    key: Tensor

    def scale(self, s: Tensor) -> Tensor:
        """`s` (..., R), whose rows are those of B examples in order, times their factors, in place."""
        s.view(len(self.factors), -1, s.shape[-1]).mul_(self.factors[:, None])
        return s


_current: Mapping[Any, Dropped] | None = None


@contextmanager
def dropping(by_layer: Mapping[Any, Dropped] | None) -> Iterator[None]:
    """Inside, layers leave out what `by_layer` has for them; None: nothing."""
    global _current
    before, _current = _current, by_layer
    try:
        yield
    finally:
        _current = before


def current() -> Mapping[Any, Dropped] | None:
    return _current


def dropped_by(layer: Any) -> Dropped | None:
    """What `layer` leaves out now."""
    return None if _current is None else _current.get(layer)
