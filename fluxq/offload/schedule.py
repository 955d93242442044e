"""In which order units are needed, in which slot each lies, and which copies that takes.

Blocks are visited in order, and each visit needs all units of its block at once. Some units are resident; the other S
are *streamed* through R slots: streamed unit i always lies in slot i mod R. So every unit has one address, and the
units of one block never share a slot. A slot can only be overwritten by the next unit that is needed in it, hence the
fewest copies are made if each slot keeps what it holds until another unit is needed in it. Where every block trains
those are 2 (S - R) a step and none at the turns: backward begins with the R units that forward ended with.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

Visit = tuple[str, ...]
"""The streamed units that are needed together."""


class Copy(NamedTuple):
    """`unit` goes into `slot`, for the visit of that number."""

    visit: int
    unit: str
    slot: int


@dataclass(frozen=True)
class Schedule:
    """The units of each block in forward order, which of them are resident, and the slots for the others.

    Units `extra` belong to no block. They are visited one by one in passes of their own, in this order.
    More slots than streamed units are no use and are not had. Raises ValueError for fewer than 2 (there would be
    nothing to copy into while a unit is used), fewer than a block needs, a resident unit that no block has, and a unit
    that two blocks have.
    """

    blocks: tuple[tuple[str, ...], ...]
    resident: frozenset[str]
    slots: int
    extra: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        units = self.units
        if len(set(units)) != len(units):
            raise ValueError("a unit belongs to one block, once")
        if unknown := sorted(self.resident.difference(units)):
            raise ValueError(f"no block has the resident units {', '.join(unknown)}")
        most = max((len(visit) for visit in self.forward), default=0)
        if self.slots < max(2, most):
            raise ValueError(f"at least {max(2, most)} slots are needed, not {self.slots}")
        object.__setattr__(self, "slots", min(self.slots, len(self.slot)))

    @property
    def units(self) -> list[str]:
        """All units: the blocks' in forward order, then those extra."""
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
        """The visits of one training step: forward, then back through the blocks in `backward`, by default all."""
        chosen = range(len(self.blocks)) if backward is None else backward
        return self.forward + self._visits(sorted(chosen, reverse=True))

    def copies(self, visits: Sequence[Visit]) -> list[Copy]:
        """The copies of one round of `visits` that is repeated for ever, in the order of need."""
        holds: dict[int, str] = {}
        for unit in (unit for visit in visits for unit in visit):  # what the round before leaves
            holds[self.slot[unit]] = unit
        found = []
        for number, visit in enumerate(visits):
            for unit in visit:
                if holds[self.slot[unit]] != unit:
                    holds[self.slot[unit]] = unit
                    found.append(Copy(number, unit, self.slot[unit]))
        return found

    def _visits(self, order: Collection[int]) -> tuple[Visit, ...]:
        """One visit for each block in `order` that streams anything."""
        visits = (tuple(unit for unit in self.blocks[i] if unit not in self.resident) for i in order)
        return tuple(visit for visit in visits if visit)


def spread(blocks: Sequence[Sequence[str]], count: int) -> frozenset[str]:
    """The `count` units to make resident so that the other units' copies have compute to hide behind.

    Blocks take about equally long, so each should move equally much: the blocks with most streamed units give one up
    first, those that do lie evenly spread among them, and so on.
    """
    if not 0 <= count <= (total := sum(map(len, blocks))):
        raise ValueError(f"of {total} units 0 to {total} can be resident, not {count}")
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
