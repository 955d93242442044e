"""How frozen weights are stored: plain containers of tensors, not tensor subclasses.

nf4    two 4-bit codes per byte, one fp32 scale per 64 weights: byte for byte bitsandbytes' format
fp8    e4m3 (4 exponent bits, 3 of mantissa), one fp32 scale per output row; fp8 files keep their bytes
int8   symmetric in -127..127, one fp32 scale per output row
bf16   a plain tensor
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

FORMATS = ("nf4", "fp8", "int8", "bf16")
NF4_BLOCK = 64


@dataclass(frozen=True, eq=False)
class NF4Weight:
    """An (N, K) matrix in NF4. bitsandbytes' bytes for the same matrix are `codes.flatten()` and `absmax.flatten()`.

    codes (N, K/2) uint8, high nibble first; absmax (N, K/64) fp32.
    """

    codes: Tensor
    absmax: Tensor

    @cached_property
    def shape(self) -> torch.Size:
        return torch.Size((self.codes.shape[0], self.codes.shape[1] * 2))

    @cached_property
    def words(self) -> Tensor:
        """The codes as (N, K/8) int32, as kernels read them."""
        return self.codes.view(torch.int32)

    def columns(self, start: int, stop: int) -> NF4Weight:
        """Some columns, from and to multiples of 64: a view, the same each time."""
        if (start, stop) not in self._columns:
            blocks = slice(start // NF4_BLOCK, stop // NF4_BLOCK)
            self._columns[start, stop] = NF4Weight(self.codes[:, start // 2 : stop // 2], self.absmax[:, blocks])
        return self._columns[start, stop]

    @cached_property
    def _columns(self) -> dict[tuple[int, int], NF4Weight]:
        return {}

    def __getitem__(self, rows: slice) -> NF4Weight:
        return NF4Weight(self.codes[rows], self.absmax[rows])

    def to(self, device: torch.device | str) -> NF4Weight:
        return NF4Weight(self.codes.to(device), self.absmax.to(device))


@dataclass(frozen=True, eq=False)
class RowScaled:
    """An (N, K) matrix in 8 bits: row n is values[n] * scale[n].

    values (N, K) int8 or float8_e4m3fn; scale (N,) fp32.
    """

    values: Tensor
    scale: Tensor

    @cached_property
    def shape(self) -> torch.Size:
        return self.values.shape

    def columns(self, start: int, stop: int) -> RowScaled:
        """Some columns: a view."""
        return RowScaled(self.values[:, start:stop], self.scale)

    def __getitem__(self, rows: slice) -> RowScaled:
        return RowScaled(self.values[rows], self.scale[rows])

    def to(self, device: torch.device | str) -> RowScaled:
        return RowScaled(self.values.to(device), self.scale.to(device))


Weight = Tensor | NF4Weight | RowScaled
"""An (N, K) matrix as it is stored; `weight[a:b]` are its rows a to b, a view."""


def parts_of(weight: Weight) -> tuple[Tensor, ...]:
    """The tensors of a weight, in the order of its fields."""
    return (weight,) if isinstance(weight, Tensor) else tuple(getattr(weight, field.name) for field in fields(weight))


def of_parts(like: Weight, parts: Sequence[Tensor]) -> Weight:
    """A weight of the same kind as `like`, made of `parts`."""
    return parts[0] if isinstance(like, Tensor) else type(like)(*parts)
