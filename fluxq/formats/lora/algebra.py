"""Operations on the low-rank change of a weight, scale * up @ down, without the full matrix.

`stacked` merges several changes of one matrix, each of some of its rows: the downs are stacked below each other, the
ups go to their rows and columns of a block matrix. That is exact; if the rows are disjoint and all downs are equal, the
rank does not grow. `split` is the inverse. Truncation uses the singular value decomposition of up @ down, computed from
two thin QR factorizations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

Rows = tuple[tuple[int, int], ...]  # ordered ranges of rows, each [begin, end)


@dataclass(frozen=True)
class Adapter:
    """The LoRA of one module: down (rank, in), up (out, rank), scale alpha / rank."""

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def change(self) -> Tensor:
        """The (out, in) matrix, fp32, that is added to the weight."""
        return (self.up.float() * self.scale) @ self.down.float()

    def norm(self) -> float:
        """The Frobenius norm of the change, from two rank x rank products in fp64."""
        up, down = self.up.double(), self.down.double()
        return abs(self.scale) * float(((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt())

    def folded(self) -> Adapter:
        """The same change with alpha = rank: up is multiplied by the scale, in fp32 or wider unless the scale is 1."""
        wide = torch.promote_types(self.up.dtype, torch.float32)
        up = self.up if self.scale == 1 else self.up.to(wide) * self.scale
        return Adapter(self.down, up, float(self.rank))

    def to(self, dtype: torch.dtype) -> Adapter:
        return Adapter(self.down.to("cpu", dtype), self.up.to("cpu", dtype), self.alpha)


class Part(NamedTuple):
    """A change of some rows of a module: up's rows are the module's `rows`, range after range."""

    rows: Rows
    adapter: Adapter


def stacked(parts: Sequence[Part], out: int) -> Adapter:
    """One adapter of `out` rows that makes the changes of all `parts`; rows in no part are unchanged.

    Exact, except that different scales are folded into up, rounded in fp32. The ranks add up, unless the rows are
    disjoint and all downs are equal.
    """
    first = parts[0]
    if len(parts) == 1 and first.rows == ((0, out),):
        return first.adapter
    adapters = [part.adapter for part in parts]
    scales = {adapter.scale for adapter in adapters}
    if len(scales) > 1:
        adapters = [adapter.folded() for adapter in adapters]
    shared = _are_disjoint(parts, out) and all(torch.equal(adapters[0].down, a.down) for a in adapters[1:])
    dtype = adapters[0].up.dtype
    for adapter in adapters[1:]:
        dtype = torch.promote_types(dtype, adapter.up.dtype)
    rank = adapters[0].rank if shared else sum(adapter.rank for adapter in adapters)
    up, column = torch.zeros(out, rank, dtype=dtype), 0
    for (rows, _), adapter in zip(parts, adapters, strict=True):
        taken = 0
        for start, end in rows:
            up[start:end, column : column + adapter.rank] = adapter.up[taken : taken + end - start]
            taken += end - start
        column += 0 if shared else adapter.rank
    down = adapters[0].down if shared else torch.cat([adapter.down for adapter in adapters])
    return Adapter(down, up, adapters[0].scale * rank)


def combined(loras: Sequence[tuple[Mapping[str, Adapter], float]]) -> dict[str, Adapter]:
    """One LoRA that equals several LoRAs (module -> adapter), each at its strength. Exact; the ranks add up."""
    parts: dict[str, list[Part]] = {}
    for adapters, strength in loras:
        for module, adapter in adapters.items():
            rows = ((0, adapter.up.shape[0]),)
            parts.setdefault(module, []).append(Part(rows, replace(adapter, alpha=adapter.alpha * strength)))
    return {module: stacked(some, some[0].rows[0][1]) for module, some in parts.items()}


def _are_disjoint(parts: Sequence[Part], out: int) -> bool:
    counts = torch.zeros(out, dtype=torch.int32)
    for rows, _ in parts:
        for start, end in rows:
            counts[start:end] += 1
    return int(counts.max()) <= 1


def split(adapter: Adapter, pieces: Mapping[str, Rows]) -> dict[str, Adapter]:
    """The adapters of the modules whose rows in this one are `pieces`, without loss and at the same scale.

    If every component changes at most one piece, as in a stacked adapter, each piece gets only its own components; else
    each gets a copy of down. Pieces that no component changes are left out, unless that is true of all pieces.
    """
    ups = {name: torch.cat([adapter.up[start:end] for start, end in rows]) for name, rows in pieces.items()}
    reached = {name: (up != 0).any(0) for name, up in ups.items()}
    if len(ups) == 1 or not any(mask.any() for mask in reached.values()):
        return {name: replace(adapter, up=up) for name, up in ups.items()}
    ups = {name: up for name, up in ups.items() if reached[name].any()}
    if int(torch.stack(list(reached.values())).sum(0).max()) > 1:
        return {name: replace(adapter, up=up) for name, up in ups.items()}
    own = {name: reached[name].nonzero()[:, 0] for name in ups}
    return {n: Adapter(adapter.down[own[n]], up[:, own[n]], adapter.scale * len(own[n])) for n, up in ups.items()}


def padded(adapter: Adapter, rank: int) -> Adapter:
    """The same change at a higher rank, padded with components of zero."""
    more = rank - adapter.rank
    return Adapter(pad(adapter.down, (0, 0, 0, more)), pad(adapter.up, (0, more)), adapter.scale * rank)


class Singular(NamedTuple):
    """scale * up @ down as left (out, n) * values (n,) @ right (n, in), with falling values, in fp64."""

    left: Tensor
    values: Tensor
    right: Tensor

    def first(self, rank: int) -> Adapter:
        """The best adapter of `rank` (Eckart and Young 1936), in fp32; up and down share its norm evenly."""
        root = self.values[:rank].sqrt()
        up, down = self.left[:, :rank] * root, self.right[:rank] * root[:, None]
        return Adapter(down.float(), up.float(), float(len(root)))

    def rank_for(self, energy: float) -> int:
        """The smallest rank, at least 1, whose components have this share of the sum of squares."""
        squares = self.values.square().cumsum(0)
        return min(len(squares), 1 + int((squares < energy * squares[-1]).sum()))


def singular(adapter: Adapter) -> Singular:
    """The singular value decomposition of the adapter's change."""
    q_up, r_up = torch.linalg.qr(adapter.up.double() * adapter.scale)
    q_down, r_down = torch.linalg.qr(adapter.down.double().T)
    left, values, right = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    return Singular(q_up @ left, values, right @ q_down.T)


class Resized(NamedTuple):
    """An adapter of another rank, the squared norm of the part that was cut off, and that of the whole change."""

    adapter: Adapter
    lost: float
    whole: float


def resized(adapter: Adapter, rank: int | None = None, energy: float | None = None) -> Resized:
    """`adapter` truncated to `rank`, or to `energy` of its sum of squares; unchanged if it is not above `rank`."""
    if rank is not None and rank >= adapter.rank:
        return Resized(adapter, 0.0, adapter.norm() ** 2)
    parts = singular(adapter)
    rank = parts.rank_for(energy) if energy is not None else rank
    squares = parts.values.square()
    return Resized(parts.first(rank or 1), float(squares[rank:].sum()), float(squares.sum()))
