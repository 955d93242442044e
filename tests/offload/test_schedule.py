"""The order of need and the resulting copies, against exhaustive search."""

from __future__ import annotations

import itertools

import pytest

from fluxq.offload.schedule import Schedule, spread

SINGLE = tuple((f"s{i}",) for i in range(7))
MIXED = (("d0.img", "d0.txt"), ("d1.img", "d1.txt"), ("s0",), ("s1",), ("s2",))


def fewest(visits, choices, slots: int) -> int:
    """The fewest copies in a round of `visits` that is repeated for ever, over all that slots may hold at each visit.

    `choices`: the units that may lie in each slot. A round must end with the slots as it began.
    """
    states = list(itertools.product(*choices))
    needed = [[state for state in states if set(visit) <= set(state)] for visit in visits]

    def cost(a, b) -> int:
        return sum(x != y for x, y in zip(a, b, strict=True))

    best = 10**9
    for start in needed[-1]:
        costs = {start: 0}
        for allowed in needed:
            costs = {b: min(c + cost(a, b) for a, c in costs.items()) for b in allowed}
        best = min(best, costs[start])
    return best


def own_slots(schedule: Schedule) -> list[list[str]]:
    """For each slot the units that have it."""
    return [[u for u, s in schedule.slot.items() if s == slot] for slot in range(schedule.slots)]


def rounds(schedule: Schedule):
    """Training steps with all blocks and with the last ones, one with odd ones, and sampling."""
    n = len(schedule.blocks)
    yield from (schedule.step(range(first, n)) for first in range(n + 1))
    yield schedule.step(range(0, n, 2))
    yield schedule.forward


@pytest.mark.parametrize("slots", [2, 3, 4])
@pytest.mark.parametrize("resident", [(), ("s1",), ("d0.txt", "s2")])
@pytest.mark.parametrize("blocks", [SINGLE[:5], MIXED])
def test_copies_are_the_fewest_possible_with_these_slots(blocks, resident, slots):
    units = [u for block in blocks for u in block]
    schedule = Schedule(blocks, frozenset(resident).intersection(units), slots)
    for visits in rounds(schedule):
        assert len(schedule.copies(visits)) == fewest(visits, own_slots(schedule), slots)


@pytest.mark.slow
@pytest.mark.parametrize("slots", [2, 3])
def test_if_all_blocks_train_no_other_slots_need_fewer_copies(slots):
    for blocks in (SINGLE[:5], MIXED[1:]):
        schedule = Schedule(blocks, frozenset(), slots)
        visits = schedule.step()
        copies = len(schedule.copies(visits))
        assert copies == 2 * (5 - slots) == fewest(visits, [list(schedule.slot)] * slots, slots)


@pytest.mark.parametrize("blocks", [SINGLE, MIXED])
@pytest.mark.parametrize("slots", [2, 3, 5, 6])
def test_a_step_copies_each_unit_without_a_slot_twice(blocks, slots):
    schedule = Schedule(blocks, frozenset(), slots)
    copies, streamed = schedule.copies(schedule.step()), len(schedule.slot)
    assert len(copies) == 2 * (streamed - slots)
    turn = len(schedule.forward)
    forward, backward = ({c.unit for c in copies if (c.visit < turn) == early} for early in (True, False))
    units = list(schedule.slot)
    assert forward == set(units[slots:]) and backward == set(units[: streamed - slots])


def test_fewer_copies_if_only_some_blocks_train():
    schedule = Schedule(SINGLE, frozenset(), 2)
    counts = [len(schedule.copies(schedule.step(range(first, 7)))) for first in range(8)]
    assert counts == [10, 10, 10, 9, 8, 7, 7, 7]  # those of the last two blocks are still there
    assert len(schedule.copies(schedule.forward)) == 7  # sampling needs each unit once


def test_no_copies_if_all_units_fit():
    for schedule in (Schedule(MIXED, frozenset(), 7), Schedule(MIXED, frozenset(), 100)):
        assert schedule.slots == 7 and schedule.copies(schedule.step()) == []
    assert Schedule(SINGLE, frozenset(u for (u,) in SINGLE), 2).forward == ()


@pytest.mark.parametrize("slots", [2, 3, 4])
@pytest.mark.parametrize("resident", [(), ("d0.img",), ("d0.txt", "s0")])
def test_units_that_are_needed_together_have_different_slots(resident, slots):
    schedule = Schedule(MIXED, frozenset(resident), slots)
    assert list(schedule.slot.values()) == [i % slots for i in range(len(schedule.slot))]
    for visit in schedule.step():
        assert len({schedule.slot[unit] for unit in visit}) == len(visit)


def test_impossible_schedules_raise_why():
    with pytest.raises(ValueError, match="at least 2 slots are needed, not 1"):
        Schedule(SINGLE, frozenset(), 1)
    with pytest.raises(ValueError, match="at least 3 slots are needed, not 2"):
        Schedule((("a", "b", "c"), ("d",)), frozenset(), 2)
    with pytest.raises(ValueError, match="resident units s9"):
        Schedule(SINGLE, frozenset({"s9"}), 2)
    with pytest.raises(ValueError, match="only once, in one block"):
        Schedule((("a",), ("a",)), frozenset(), 2)


FLUX = tuple((f"d{i}.img", f"d{i}.txt") for i in range(19)) + tuple((f"s{i}",) for i in range(38))


@pytest.mark.parametrize("count", range(77))
def test_residents_balance_what_blocks_copy(count):
    resident = spread(FLUX, count)
    assert len(resident) == count
    moved = [len(set(block) - resident) for block in FLUX]
    assert max(moved) - min(moved) <= 1
    alone = 1 if count <= 19 else 0
    chosen = [i for i, n in enumerate(moved[:19] if count <= 19 else moved) if n == alone]
    if count <= 19:
        assert moved[19:] == [1] * 38
    gaps = [b - a for a, b in itertools.pairwise(chosen)]
    assert not gaps or max(gaps) - min(gaps) <= 1
