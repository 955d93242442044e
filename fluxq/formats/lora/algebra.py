"""What can be done to the low-rank change of a weight, scale * up @ down, without ever writing it out.

Several changes of one matrix, each of some of its rows, become one by stacking: downs below each other, ups in their
rows and columns of a block matrix. That is exact, and of one rank where all have the same down. `split` is the way
back. Truncation is by the singular value decomposition of up @ down, found from two thin QR factorisations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

Rows = tuple[tuple[int, int], ...]  # (first, after the last) of each range, in the order in which they are meant


@dataclass(frozen=True)
class Adapter:
    """A LoRA of one module: down (rank, in), up (out, rank), strength alpha / rank."""

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
        """Its Frobenius norm: of two rank x rank products, in fp64."""
        up, down = self.up.double(), self.down.double()
        return abs(self.scale) * float(((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt())

    def folded(self) -> Adapter:
        """The same with alpha = rank: its strength goes into up, in fp32 or wider unless it is 1."""
        wide = torch.promote_types(self.up.dtype, torch.float32)
        up = self.up if self.scale == 1 else self.up.to(wide) * self.scale
        return Adapter(self.down, up, float(self.rank))

    def to(self, dtype: torch.dtype) -> Adapter:
        return Adapter(self.down.to("cpu", dtype), self.up.to("cpu", dtype), self.alpha)


class Part(NamedTuple):
    """A change of some rows of a module: up's rows are the module's `rows`, one range after the other."""

    rows: Rows
    adapter: Adapter


def stacked(parts: Sequence[Part], out: int) -> Adapter:
    """One adapter of `out` rows that changes a weight as all `parts` together; rows of no part stay as they are.

    Exact, but for the fold of strengths that differ, which is rounded in fp32. The ranks add up, unless the rows are
    apart and all downs the same.
    """
    first = parts[0]
    if len(parts) == 1 and first.rows == ((0, out),):
        return first.adapter
    adapters = [part.adapter for part in parts]
    scales = {adapter.scale for adapter in adapters}
    if len(scales) > 1:
        adapters = [adapter.folded() for adapter in adapters]
    shared = _apart(parts, out) and all(torch.equal(adapters[0].down, a.down) for a in adapters[1:])
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
    """Several LoRAs, adapters by module, each at its strength, as one: exact, and ranks add up."""
    parts: dict[str, list[Part]] = {}
    for adapters, strength in loras:
        for module, adapter in adapters.items():
            rows = ((0, adapter.up.shape[0]),)
            parts.setdefault(module, []).append(Part(rows, replace(adapter, alpha=adapter.alpha * strength)))
    return {module: stacked(some, some[0].rows[0][1]) for module, some in parts.items()}


def _apart(parts: Sequence[Part], out: int) -> bool:
    counts = torch.zeros(out, dtype=torch.int32)
    for rows, _ in parts:
        for start, end in rows:
            counts[start:end] += 1
    return int(counts.max()) <= 1


def split(adapter: Adapter, pieces: Mapping[str, Rows]) -> dict[str, Adapter]:
    """The adapters of the modules whose rows in this one are `pieces`, losslessly, at the strength of the whole.

    Each gets a copy of down, unless every component reaches one piece at most, as in what was stacked: then each gets
    its own. A piece that is not reached at all is left out.
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
    """The same change at a higher rank, by components of zero."""
    more = rank - adapter.rank
    return Adapter(pad(adapter.down, (0, 0, 0, more)), pad(adapter.up, (0, more)), adapter.scale * rank)


class Singular(NamedTuple):
    """scale * up @ down as left (out, n) * values (n,) @ right (n, in), values falling, in fp64."""

    left: Tensor
    values: Tensor
    right: Tensor

    def first(self, rank: int) -> Adapter:
        """The best adapter of `rank` (Eckart and Young 1936), its norm shared evenly by up and down, in fp32."""
        root = self.values[:rank].sqrt()
        up, down = self.left[:, :rank] * root, self.right[:rank] * root[:, None]
        return Adapter(down.float(), up.float(), float(len(root)))

    def rank_for(self, energy: float) -> int:
        """The least rank, 1 or more, whose components have this share of the sum of squares."""
        squares = self.values.square().cumsum(0)
        return min(len(squares), 1 + int((squares < energy * squares[-1]).sum()))


def singular(adapter: Adapter) -> Singular:
    q_up, r_up = torch.linalg.qr(adapter.up.double() * adapter.scale)
    q_down, r_down = torch.linalg.qr(adapter.down.double().T)
    left, values, right = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    return Singular(q_up @ left, values, right @ q_down.T)


class Resized(NamedTuple):
    """An adapter of another rank, the squared norm of what it lacks, and that of the whole."""

    adapter: Adapter
    lost: float
    whole: float


def resized(adapter: Adapter, rank: int | None = None, energy: float | None = None) -> Resized:
    """`adapter` at `rank`, or with `energy` of its sum of squares; as it is where that takes nothing away."""
    if rank is not None and rank >= adapter.rank:
        return Resized(adapter, 0.0, adapter.norm() ** 2)
    parts = singular(adapter)
    rank = parts.rank_for(energy) if energy is not None else rank
    squares = parts.values.square()
    return Resized(parts.first(rank or 1), float(squares[rank:].sum()), float(squares.sum()))
