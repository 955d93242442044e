"""The order in which units are needed, the slot of each, and the copies that result.

Blocks are visited in order, and each visit needs all units of its block at once. Some units are resident; the other S
are *streamed* through R slots: streamed unit i always uses slot i mod R. So every unit has one address, and the units
of one block never share a slot. A slot can only be overwritten by the next unit that needs it, so keeping each unit
until another needs its slot makes the fewest copies. If every block trains, that is 2 (S - R) per step, with none when
the direction changes: the backward pass starts with the R units that the forward pass ended with.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

Visit = tuple[str, ...]
"""The streamed units that are needed together."""


class Copy(NamedTuple):
    """`unit` is copied into `slot`, for the visit of that number."""

    visit: int
    unit: str
    slot: int


@dataclass(frozen=True)
class Schedule:
    """The units of each block in forward order, which of them are resident, and the number of slots for the others.

    `extra` units belong to no block. They are visited one by one in separate passes, in this order. The number of slots
    is reduced to that of the streamed units. Raises ValueError for fewer than 2 slots (nothing could be copied while a
    unit is used), for fewer than a block needs, for a resident unit that no block has, and for a unit that two blocks
    have.
    """

    blocks: tuple[tuple[str, ...], ...]
    resident: frozenset[str]
    slots: int
    extra: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        units = self.units
        if len(set(units)) != len(units):
            raise ValueError("a unit may occur only once, in one block")
        if unknown := sorted(self.resident.difference(units)):
            raise ValueError(f"no block has the resident units {', '.join(unknown)}")
        most = max((len(visit) for visit in self.forward), default=0)
        if self.slots < max(2, most):
            raise ValueError(f"at least {max(2, most)} slots are needed, not {self.slots}")
        object.__setattr__(self, "slots", min(self.slots, len(self.slot)))

    @property
    def units(self) -> list[str]:
        """All units: the blocks' in forward order, then the extra ones."""
        return [*(unit for block in self.blocks for unit in block), *self.extra]

    @cached_property
    def slot(self) -> dict[str, int]:
        """Streamed unit -> its slot, in that order."""
        streamed = [unit for unit in self.units if unit not in self.resident]
        return {unit: i % min(self.slots, len(streamed)) for i, unit in enumerate(streamed)}

    @cached_property
    def forward(self) -> tuple[Visit, ...]:
        """The visits of one forward pass. Sampling repeats them."""
        return self._visits(range(len(self.blocks)))

    def step(self, backward: Collection[int] | None = None) -> tuple[Visit, ...]:
        """The visits of one training step: forward, then backward through the blocks in `backward`, by default all."""
        chosen = range(len(self.blocks)) if backward is None else backward
        return self.forward + self._visits(sorted(chosen, reverse=True))

    def copies(self, visits: Sequence[Visit]) -> list[Copy]:
        """The copies in one round of `visits`, repeated forever, in the order of need."""
        holds: dict[int, str] = {}
        for unit in (unit for visit in visits for unit in visit):  # left over from the round before
            holds[self.slot[unit]] = unit
        copies = []
        for number, visit in enumerate(visits):
            for unit in visit:
                if holds[self.slot[unit]] != unit:
                    holds[self.slot[unit]] = unit
                    copies.append(Copy(number, unit, self.slot[unit]))
        return copies

    def _visits(self, order: Collection[int]) -> tuple[Visit, ...]:
        """One visit for each block in `order` that streams anything."""
        visits = (tuple(unit for unit in self.blocks[i] if unit not in self.resident) for i in order)
        return tuple(visit for visit in visits if visit)


def spread(blocks: Sequence[Sequence[str]], count: int) -> frozenset[str]:
    """The `count` units to make resident so that the other units' copies can hide behind compute.

    Blocks take about equally long, so each should copy about as much: the blocks with the most streamed units give up
    one each, spread evenly, and so on.
    """
    if not 0 <= count <= (total := sum(map(len, blocks))):
        raise ValueError(f"of {total} units, 0 to {total} can be resident, not {count}")
    streamed = [list(block) for block in blocks]
    resident: set[str] = set()
    while count:
        most = max(map(len, streamed))
        widest = [block for block in streamed if len(block) == most]
        taken = min(count, len(widest))
        for i in range(taken):
            resident.add(widest[(2 * i + 1) * len(widest) // (2 * taken)].pop())
        count -= taken
    return frozenset(resident)
