"""Decides which frozen weights are on the GPU at each moment.

A *unit* is what is swapped together. Code that computes with frozen weights runs inside `with ring.resident(units)`.
That is a ring's only promise, and all that the model knows about it.

`StreamingRing` keeps it with a few slots. On leaving, each slot that was used gets the unit that the schedule needs in
it next, so copies run ahead of compute as far as the slots allow. The schedule is only a forecast: a unit that is
needed at another time is copied then.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .schedule import Schedule, Visit
from .streams import Bytes, Streams, drain


class Ring(Protocol):
    def resident(self, units: Sequence[str]) -> AbstractContextManager[None]:
        """Inside, the frozen weights of `units` are where their layers expect them."""
        ...

    def announce(self, visits: Sequence[Sequence[str]]) -> None:
        """Announce that the next calls of `resident` will be these, once, before continuing with the schedule."""
        ...


class AllResident:
    """The ring of a model that fits: every unit is always where its layers expect it."""

    def resident(self, units: Sequence[str]) -> AbstractContextManager[None]:
        return nullcontext()

    def announce(self, visits: Sequence[Sequence[str]]) -> None: ...


@dataclass
class _Slot:
    """Memory for one unit.

    `free` and `ready` are events: all compute that uses it has finished; its copy has arrived. `ready` is None once
    compute has waited for it. `users` counts the callers inside `resident` that use it.
    """

    memory: Tensor
    free: Any
    ready: Any = None
    holds: str | None = None
    users: int = 0


class StreamingRing:
    """Streams the units of `schedule` that are not resident through its slots, from host to device only.

    host: each streamed unit's bytes: flat uint8, pinned if `streams` are a GPU's own, or read from files while they are
    copied. `place(unit, flat)` is called once for each streamed unit with the memory where its bytes will always be.
    `poison` fills a slot with 0xFF (NaN in every float format) when its unit is evicted. Slots are allocated here,
    once.
    """

    def __init__(
        self,
        schedule: Schedule,
        host: Mapping[str, Bytes],
        place: Callable[[str, Tensor], None],
        device: torch.device,
        streams: Streams,
        poison: bool = False,
    ) -> None:
        self.schedule, self.copies, self.bytes_copied = schedule, 0, 0
        self.host, self._streams, self._poison = host, streams, poison
        self._known = set(schedule.units)
        length = max((len(host[unit]) for unit in schedule.slot), default=0)
        memory = [torch.empty(length, dtype=torch.uint8, device=device) for _ in range(schedule.slots)]
        free = streams.computed()  # the first copies wait for whatever used this memory before
        self._slots = [_Slot(m, free) for m in memory]
        for unit in schedule.slot:
            place(unit, self.memory(unit)[: len(host[unit])])
        weakref.finalize(self, streams.hold, (memory, host)).atexit = False  # memory that is being copied outlives it
        self.expect()

    def memory(self, unit: str) -> Tensor:
        """The slot of a streamed unit."""
        return self._slots[self.schedule.slot[unit]].memory

    @property
    def slot_bytes(self) -> int:
        """The slots' bytes on the device."""
        return sum(slot.memory.nbytes for slot in self._slots)

    def expect(self, backward: Collection[int] | None = None) -> None:
        """Set the blocks, by number, that training steps run backward through: by default, all of them."""
        self._rounds: tuple[tuple[Visit, ...], ...] = (self.schedule.step(backward), self.schedule.forward)
        self._announced: deque[Visit] = deque()
        self._last: Visit = ()
        self._round: tuple[Visit, ...] = self._rounds[0]
        self._next = 0 if self._round else None  # the index of the next visit in the round, None if unknown
        self._prefetch()

    def announce(self, visits: Sequence[Sequence[str]]) -> None:
        self._announced = deque(visit for visit in map(self._streamed, visits) if visit)
        self._prefetch()

    @contextmanager
    def resident(self, units: Sequence[str]) -> Iterator[None]:
        if unknown := [unit for unit in units if unit not in self._known]:
            raise KeyError(f"this ring has no unit {', '.join(unknown)}")
        visit = self._streamed(units)
        if visit:
            self._enter(visit)
        try:
            yield
        finally:
            if visit:
                self._leave(visit)

    def close(self) -> None:
        """Stop prefetching, and wait until no copy is running: then the host's bytes may be freed."""
        self._rounds, self._round, self._next = ((), ()), (), None
        self._announced.clear()
        drain(self._streams)

    def _streamed(self, units: Sequence[str]) -> Visit:
        return tuple(unit for unit in units if unit in self.schedule.slot)

    def _enter(self, visit: Visit) -> None:
        slots = [self._slots[self.schedule.slot[unit]] for unit in visit]
        for unit, slot in zip(visit, slots, strict=True):
            if (slot.users and slot.holds != unit) or sum(other is slot for other in slots) > 1:
                raise RuntimeError(f"{unit} is needed together with a unit that has the same slot; use more slots")
        expected = self._follow(visit)
        for unit, slot in zip(visit, slots, strict=True):
            if slot.holds != unit:
                self._load(unit, slot)
            slot.users += 1
        for slot in slots:
            if slot.ready is not None:
                self._streams.compute_waits(slot.ready)  # compute(u) waits until copy(u) has arrived in slot s
                slot.ready = None
        if not expected:
            self._prefetch()

    def _leave(self, visit: Visit) -> None:
        left = self._streams.computed()
        for slot in (self._slots[self.schedule.slot[unit]] for unit in visit):
            slot.users -= 1
            slot.free = left
        self._prefetch()

    def _prefetch(self) -> None:
        """Start copying into every unused slot the unit that it needs next."""
        decided: set[int] = set()
        for unit in self._ahead():
            number = self.schedule.slot[unit]
            if number not in decided:
                decided.add(number)
                slot = self._slots[number]
                if slot.holds != unit and not slot.users:
                    self._load(unit, slot)
                if len(decided) == len(self._slots):
                    return

    def _ahead(self) -> Iterator[str]:
        """The units of the announced visits and of one whole round after them, in the order of need."""
        for visit in self._announced:
            yield from visit
        if self._next is not None:
            for visit in self._round[self._next :] + self._round[: self._next]:
                yield from visit

    def _load(self, unit: str, slot: _Slot) -> None:
        if self._poison:
            if slot.ready is not None:
                self._streams.compute_waits(slot.ready)  # poison(s) waits for a copy that nobody has waited for
            slot.memory.fill_(0xFF)
            slot.free = self._streams.computed()
        self._streams.copy_waits(slot.free)  # copy(u) waits until compute(v) has left slot s
        self._streams.copy(slot.memory, self.host[unit])
        slot.ready, slot.holds = self._streams.copied(), unit
        self.copies += 1
        self.bytes_copied += len(self.host[unit])

    def _follow(self, visit: Visit) -> bool:
        """Advance in the schedule. Returns whether `visit` was the expected one.

        If it was not, training has probably switched to sampling or back: continue at a place in a round that has this
        visit, preferably one whose preceding visit was also the last one. If no round has it, nothing is expected until
        one does.
        """
        if self._announced and self._announced[0] == visit:
            self._announced.popleft()
            return True
        self._announced.clear()
        last, self._last = self._last, visit
        if self._next is not None and self._round[self._next] == visit:
            self._next = (self._next + 1) % len(self._round)
            return True
        places = [(r, i) for r in self._rounds for i, other in enumerate(r) if other == visit]
        likely = [(r, i) for r, i in places if r[i - 1] == last] or places
        self._round, self._next = (likely[0][0], (likely[0][1] + 1) % len(likely[0][0])) if likely else ((), None)
        return False
