"""How long a step takes that streams its weights: a simulation of the copies and of the compute that waits for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

BUFFERS = 2
"""Block inputs that are on the card at once while they travel to the host or back."""


class Visit(NamedTuple):
    """One block's turn: its seconds, units, and bytes of its inputs that go to the host or have to come back."""

    seconds: float
    units: tuple[str, ...]
    store: int = 0
    fetch: int = 0


class Timing(NamedTuple):
    """A step in the long run: seconds, those in which compute waits, and bytes copied to the card."""

    seconds: float
    stall: float
    moved: int


def simulate(
    visits: Sequence[Visit], nbytes: Mapping[str, int], resident: frozenset[str], slots: int, bytes_s: float
) -> Timing:
    """A step that repeats: `visits` in order, each waiting for its units.

    Streamed unit i lies in slot i mod slots. A copy begins when the copies before it are done and the slot's last
    reader is. Inputs that come back share the way with the units, those that go out have the other direction to
    themselves; of either `BUFFERS` are on the way at once.
    """
    streamed = list(dict.fromkeys(u for v in visits for u in v.units if u not in resident))
    slot = {unit: i % slots for i, unit in enumerate(streamed)}
    holds, read = dict[int, str](), dict[int, float]()
    compute = copies = out = begun = 0.0
    moved = waited = 0
    for _ in range(2):  # the second begins with what the first has left in the slots
        begun, moved, waited = compute, 0, 0.0
        stores, fetches = [0.0] * BUFFERS, [compute] * BUFFERS
        for visit in visits:
            ready = 0.0
            if visit.fetch:
                copies = max(copies, out, fetches[-BUFFERS]) + visit.fetch / bytes_s
                ready, moved = copies, moved + visit.fetch
            for unit in visit.units:
                if unit in resident:
                    continue
                place = slot[unit]
                if holds.get(place) != unit:
                    copies = max(copies, read.get(place, 0.0)) + nbytes[unit] / bytes_s
                    holds[place], ready, moved = unit, copies, moved + nbytes[unit]
            if visit.store:
                ready = max(ready, stores[-BUFFERS])
            start = max(compute, ready)
            if visit.store:
                out = max(out, start) + visit.store / bytes_s
                stores.append(out)
            waited += start - compute
            compute = start + visit.seconds
            if visit.fetch:
                fetches.append(compute)
            for unit in visit.units:
                if unit not in resident:
                    read[slot[unit]] = compute
    return Timing(compute - begun, waited, moved)
