"""All weights that train as slices of one tensor, so that what is done to all of them is done once.

A LoRA of FLUX is 456 small tensors: rounding each for the products, taking the norm and updating them one by one costs
thousands of launches a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

BLOCK = 256
"""Every slice begins at a multiple of this: bitsandbytes scales its 8-bit state in blocks of 256."""


class Flat:
    """Parameters of one dtype on one device as slices of `values`, with zeros between them. They keep their values."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        ends = [0]
        for p in self.parameters:
            ends.append(ends[-1] + -(-p.numel() // BLOCK) * BLOCK)
        self.starts = ends[:-1]
        self.values = nn.Parameter(torch.zeros(ends[-1], dtype=parameters[0].dtype, device=parameters[0].device))
        self._gap = self.values.data.new_zeros(BLOCK)
        self._rounded: Tensor | None = None
        self._rounded_parts: list[Tensor] = []
        self._unchanged = self._is_rounded = False
        self._shown = self.values
        with torch.no_grad():
            for p, own in zip(self.parameters, self.parts(self.values.data), strict=True):
                own.copy_(p)
                p.data = own
        for index, p in enumerate(self.parameters):
            p.rounded = partial(self._rounded_part, index)  # type: ignore[attr-defined] - kernels/rounding.py asks for it

    @property
    def tensors(self) -> list[Tensor]:
        """What stays allocated: the values, and once they have been rounded the rounded ones."""
        return [self.values, *([] if self._rounded is None else [self._rounded])]

    def parts(self, flat: Tensor) -> list[Tensor]:
        """The slices of `flat`, which is laid out as `values`, each with the shape of its parameter."""
        return [flat[a : a + p.numel()].view(p.shape) for a, p in zip(self.starts, self.parameters, strict=True)]

    def blocks(self, flat: Tensor) -> list[Tensor]:
        """The slices of `flat`, which has one entry per BLOCK of `values`, or per divisor of BLOCK."""
        pairs, each = zip(self.starts, self.parameters, strict=True), self.values.numel() // flat.numel()
        return [flat[a // each : -(-(a + p.numel()) // each)] for a, p in pairs]

    def gather(self) -> None:
        """Move the gradients of the parameters into that of `values`; one that is missing counts as zero."""
        pieces = []
        for p in self.parameters:
            pieces.append((torch.zeros_like(p) if p.grad is None else p.grad).flatten())
            if gap := -p.numel() % BLOCK:
                pieces.append(self._gap[:gap])
        self.values.grad = torch.cat(pieces)
        for p in self.parameters:
            p.grad = None

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Inside, nobody writes the parameters, so they are rounded once, when a layer first asks for it."""
        self._unchanged, self._is_rounded = True, False
        try:
            yield
        finally:
            self._unchanged = False

    @contextmanager
    def showing(self, other: Tensor) -> Iterator[None]:
        """Inside, the parameters are the slices of `other`, which is laid out as `values`."""
        shown = self._shown
        self._show(other)
        try:
            yield
        finally:
            self._show(shown)

    def _show(self, values: Tensor) -> None:
        self._shown, self._is_rounded = values, False
        for p, own in zip(self.parameters, self.parts(values.detach()), strict=True):
            p.data = own

    def _rounded_part(self, index: int, dtype: torch.dtype) -> Tensor | None:
        if not self._unchanged:
            return None
        if self._rounded is None or self._rounded.dtype != dtype:
            self._rounded = torch.empty_like(self.values, dtype=dtype, requires_grad=False)
            self._rounded_parts, self._is_rounded = self.parts(self._rounded), False
        if not self._is_rounded:
            with torch.no_grad():
                self._rounded.copy_(self._shown)
            self._is_rounded = True
        return self._rounded_parts[index]
