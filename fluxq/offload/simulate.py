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

    Streamed unit i lies in slot i mod slots. When a visit has left a slot, the unit that is needed in it next is
    copied, if it is another; copies run one after the other. Inputs that come back share the way with the units, those
    that go out have the other direction to themselves; of either `BUFFERS` are on the way at once.
    """
    after = _copies(visits, resident, slots)
    ready = [0.0] * len(visits)  # when what the visit waits for is there
    compute = copies = out = begun = 0.0
    moved = waited = 0
    for _ in range(2):  # the second begins with what the first has left in the slots
        begun, moved, waited = compute, 0, 0.0
        stores = [0.0] * BUFFERS
        for i, visit in enumerate(visits):
            start = max(compute, ready[i], stores[-BUFFERS] if visit.store else 0.0)
            if visit.store:
                out = max(out, start) + visit.store / bytes_s
                stores.append(out)
            waited += start - compute
            compute = start + visit.seconds
            for needed, unit in after[i]:
                size = nbytes[unit] if unit else visits[needed].fetch
                copies = max(copies, compute, 0.0 if unit else out) + size / bytes_s
                ready[needed], moved = copies, moved + size
    return Timing(compute - begun, waited, moved)


def _copies(visits: Sequence[Visit], resident: frozenset[str], slots: int) -> list[list[tuple[int, str]]]:
    """For each visit, the copies that can begin when it is done, in the order of need: (the visit that needs it, the
    unit), or "" for the visit's own inputs. Visits repeat.
    """
    after: list[list[tuple[int, str]]] = [[] for _ in visits]
    streamed = list(dict.fromkeys(u for v in visits for u in v.units if u not in resident))
    slot = {unit: i % slots for i, unit in enumerate(streamed)}
    uses: dict[int, list[tuple[int, str]]] = {}
    for i, visit in enumerate(visits):
        for unit in visit.units:
            if unit in slot:
                uses.setdefault(slot[unit], []).append((i, unit))
    for used in uses.values():
        for (i, before), (needed, unit) in zip(used, [*used[1:], used[0]], strict=True):
            if before != unit:
                after[i].append((needed, unit))
    fetching = [i for i, visit in enumerate(visits) if visit.fetch]
    for k, needed in enumerate(fetching):
        after[fetching[k - BUFFERS] if k >= BUFFERS else fetching[0] - 1].append((needed, ""))
    for i, found in enumerate(after):
        found.sort(key=lambda copy: (copy[0] - i - 1) % len(visits))
    return after
