"""The planner on models that are small enough to try everything, and what it promises on any."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random

import pytest

from fluxq.errors import WrongRequest
from fluxq.offload.cards import CARDS, Card
from fluxq.offload.clock import run_steps
from fluxq.offload.costs import BlockCost, Costs, PolicyCost, Work
from fluxq.offload.planner import (
    SLOTS,
    Setting,
    least,
    peak_by_owner,
    plan,
    points,
)
from fluxq.offload.plans import Pins, describe
from fluxq.offload.schedule import Schedule, spread
from fluxq.offload.simulate import Visit, simulate

CARD = Card("test", "none", bf16=1.25, int8=5, fp8=0, memory_gb_s=1e9, memory_gib=1, bus_gb_s=1.0)  # 1 TFLOP = 1 s
TFLOP, MB = 1e12, 10**6


def model(
    seed: int = 0, doubles: int = 2, singles: int = 2, unit: int = 100 * MB, policies: int = 3, **changes
) -> Costs:
    """Blocks of two units and of one, with seconds and bytes drawn at random; alike where `seed` is 0."""
    draw = random.Random(seed)

    def vary(x: float) -> float:
        return x * draw.uniform(0.5, 2) if seed else x

    blocks, units = [], {}
    for i in range(doubles + singles):
        names = (f"{i}.img", f"{i}.txt") if i < doubles else (f"{i}",)
        units |= dict.fromkeys(names, unit)
        forward = vary(0.3)
        kept, replay, choices = int(vary(50)) * MB, 0.6 * forward, {}
        for name in ("recompute", "keep_some", "keep_all")[:policies]:
            choices[name] = PolicyCost(kept, Work(bf16=replay * TFLOP), kept + 150 * MB, kept + 200 * MB)
            kept, replay = kept + int(vary(100)) * MB, replay * vary(0.4)
        forward_work, backward = Work(bf16=forward * TFLOP), Work(bf16=forward * TFLOP)
        blocks.append(BlockCost(f"{i}", names, forward_work, 200 * MB, 30 * MB, 5 * MB, backward, choices))
    given = dict(
        format="nf4", compute="bf16", error=0.09, units=units, blocks=tuple(blocks), stays=20 * MB, lora=5 * MB
    )
    return Costs(**(given | changes))


def brute_force(costs: Costs, vram: int) -> float:
    """The fewest seconds of any policies, any resident units, any number of slots, inputs on the host or not."""
    best = float("inf")
    names = [list(b.policies) for b in costs.blocks]
    for chosen in itertools.product(*names):
        for offload in (False, True):
            visits = [Visit(CARD.seconds(b.forward), b.units, b.inputs if offload else 0) for b in costs.blocks]
            for b, name in reversed([*zip(costs.blocks, chosen, strict=True)]):
                seconds = CARD.seconds(b.policies[name].replay + b.backward)
                visits.append(Visit(seconds, b.units, 0, b.inputs if offload else 0))
            if sum(v.seconds for v in visits) >= best:
                continue
            for count in range(len(costs.units) + 1):
                for resident in itertools.combinations(costs.units, count):
                    for slots in (2, 3, 4, 6) if count < len(costs.units) else (0,):
                        peak = peak_by_owner(costs, chosen, offload, Setting(slots, resident, 0))
                        if sum(peak.values()) <= vram:
                            timing = simulate(visits, costs.units, frozenset(resident), slots, CARD.bus_gb_s * 1e9)
                            best = min(best, timing.seconds)
    return best


def test_it_equals_brute_force_on_small_models():
    """Blocks that differ, a bus from far too slow to free, memory from next to none to plenty; but for the 0.2 % that a
    leaner plan may take.
    """
    for seed in range(12):
        unit = (5, 60, 150)[seed % 3] * MB
        costs = model(seed, doubles=1 + seed % 2, singles=2 - seed % 2, unit=unit, policies=2 + seed % 2)
        floor = least(costs, margin=0)
        for extra in (0, 60, 150, 400):
            vram = floor + extra * MB
            found = plan([costs], CARD, vram, margin=0)
            assert found.peak_bytes <= vram
            assert found.seconds == pytest.approx(brute_force(costs, vram), rel=2e-3), (seed, extra)


@pytest.mark.parametrize("seed", range(6))
def test_more_memory_is_never_slower(seed):
    costs = model(seed, doubles=3, singles=4, unit=(20, 80, 200)[seed % 3] * MB)
    floor = least(costs, margin=0)
    seconds = [plan([costs], CARD, floor + extra * 25 * MB, margin=0).seconds for extra in range(40)]
    assert all(b <= a * 1.002 for a, b in itertools.pairwise(seconds))  # the leaner of those as fast is taken
    assert all(second <= min(seconds[: i + 1]) * 1.002 for i, second in enumerate(seconds))
    assert seconds[-1] < seconds[0]


def test_the_least_is_the_least():
    costs = model(3)
    needed = least(costs, margin=0)
    assert plan([costs], CARD, needed, margin=0).peak_bytes == needed
    with pytest.raises(WrongRequest):
        plan([costs], CARD, needed - 1, margin=0)


def test_a_free_bus_leaves_memory_to_what_blocks_keep_and_a_slow_one_to_residents():
    found = plan([model(unit=MB)], CARD, least(model(unit=MB), margin=0) + 250 * MB, margin=0)
    assert found.stall < 0.01 * found.seconds and set(found.policies) != {"recompute"}
    slow = plan([model(unit=1500 * MB)], CARD, 12_000 * MB, margin=0)
    assert slow.moved == slow.stall == 0 and len(slow.resident) >= 4  # two more may lie in two slots for good


def test_among_equals_the_more_faithful_format_is_taken():
    nf4, int8 = model(unit=5 * MB), model(unit=9 * MB, format="int8", error=0.01)
    assert plan([nf4, int8], CARD, 4000 * MB, margin=0).format == "int8"
    slow_bus = [model(unit=500 * MB), model(unit=900 * MB, format="int8", error=0.01)]
    assert plan(slow_bus, CARD, 2500 * MB, margin=0).format == "nf4"
    assert plan(slow_bus, CARD, 2500 * MB, pins=Pins(format="int8"), margin=0).format == "int8"


def test_what_is_pinned_stays():
    costs = model()
    full = 4000 * MB
    assert set(plan([costs], CARD, full, pins=Pins(policy="keep_some"), margin=0).policies) == {"keep_some"}
    assert len(plan([costs], CARD, full, pins=Pins(resident_units=3), margin=0).resident) == 3
    assert plan([costs], CARD, full, pins=Pins(resident_units=0, slots=5), margin=0).slots == 5
    assert plan([costs], CARD, full, pins=Pins(offload=True), margin=0).offload
    swapped = plan([costs], CARD, full, pins=Pins(blocks_to_swap=2), margin=0)
    assert swapped.streamed == 4 and len(swapped.resident) == 2


@pytest.mark.parametrize(
    ("pins", "said"),
    [
        (Pins(format="fp8"), "format fp8 is not among those that can be had: nf4"),
        (Pins(compute="int8"), "compute int8 is not among"),
        (Pins(resident_units=7), "--resident-units must be 0 to 6, not 7"),
        (Pins(blocks_to_swap=4), "--blocks-to-swap must be 0 to 3, not 4"),
        (Pins(blocks_to_swap=1, resident_units=1), "say the same thing"),
        (Pins(policy="keep_nothing"), "the policy must be one of recompute, keep_some, keep_all, not 'keep_nothing'"),
        (Pins(slots=1), "--slots must be at least 2"),
    ],
)
def test_a_pin_that_cannot_be_kept_is_said(pins, said):
    with pytest.raises(WrongRequest, match=said):
        plan([model()], CARD, 4000 * MB, pins=pins, margin=0)


def test_where_nothing_fits_it_says_what_would():
    costs, smaller = model(), model(stays=0)
    needed = least(costs, Pins(policy="keep_all"), 0)
    vram = (needed + least(costs, margin=0)) // 2
    with pytest.raises(WrongRequest) as caught:
        plan([costs], CARD, vram, pins=Pins(policy="keep_all"), margin=0)
    assert "leave out --policy" in str(caught.value) and "--vram" in str(caught.value)
    assert plan([costs], CARD, vram, margin=0)
    vram = least(costs, margin=0) - MB
    with pytest.raises(WrongRequest, match=r"what would do: --vram 0\.\dGiB, or --size 512"):
        plan([costs], CARD, vram, smaller={"--size 512": [smaller]}, margin=0)
    with pytest.raises(WrongRequest, match="of RAM in nf4"):
        plan([costs], CARD, 4000 * MB, ram=10**9, margin=0)


def test_what_it_names_does():
    """The --vram of the message, given, leads to a plan."""
    costs = model()
    with pytest.raises(WrongRequest) as caught:
        plan([costs], CARD, 10**8)
    gib = float(str(caught.value).split("--vram ")[1].split("GiB")[0])
    assert plan([costs], CARD, int(gib * 2**30))


def test_a_card_without_the_arithmetic_is_passed_over():
    eight = model(compute="fp8")
    blocks = tuple(
        BlockCost(b.name, b.units, Work(fp8=TFLOP), b.forward_peak, b.inputs, 0, b.backward, b.policies)
        for b in eight.blocks
    )
    eight = model(compute="fp8", blocks=blocks)
    assert plan([eight, model()], CARD, 4000 * MB, margin=0).compute == "bf16"
    with pytest.raises(WrongRequest, match="cannot multiply in fp8"):
        plan([eight], CARD, 4000 * MB, margin=0)


def test_the_simulation_by_hand():
    """Two blocks of 1 s, a unit each of 1 GB, at 1 GB/s."""
    nbytes = dict(a=10**9, b=10**9)
    forward = [Visit(1, ("a",)), Visit(1, ("b",))]
    step = [*forward, Visit(1, ("b",)), Visit(1, ("a",))]
    assert simulate(step, nbytes, frozenset("ab"), 0, 1e9) == (4, 0, 0)
    assert simulate(step, nbytes, frozenset(), 2, 1e9) == (4, 0, 0)  # both stay in their slots
    assert simulate(forward, nbytes, frozenset(), 1, 1e9) == (4, 2, 2 * 10**9)  # each waits for the other to go
    three = [Visit(1, (u,)) for u in "abccba"]
    # Two slots: c takes a's place when a is done, beside b (no stall); at the turn both are there; a comes back in
    # place of c while b runs: none. In the next step b and a are there.
    assert simulate(three, nbytes | dict(c=10**9), frozenset(), 2, 1e9) == (6, 0, 2 * 10**9)
    # At half the rate each of the two copies takes 2 s and 1 s of it has a block to hide behind.
    assert simulate(three, nbytes | dict(c=10**9), frozenset(), 2, 5e8) == (8, 2, 2 * 10**9)


@pytest.mark.parametrize("seed", range(20))
def test_the_simulation_is_the_virtual_clock_s(seed):
    """The ring itself under injected streams takes as long and copies as much."""
    draw = random.Random(seed)
    n = draw.randint(2, 8)
    blocks = tuple((f"{i}a", f"{i}b") if i < n // 2 else (f"{i}",) for i in range(n))
    units = [u for b in blocks for u in b]
    nbytes, rate = dict.fromkeys(units, 10**8), draw.choice([5e8, 1e9, 4e9])
    forward = [draw.uniform(0.02, 0.2) for _ in blocks]
    backward = {i: draw.uniform(0.05, 0.4) for i in range(draw.choice([0, n // 2]), n)}
    resident = spread(blocks, draw.randint(0, len(units) - 2))
    slots = draw.randint(2, min(4, len(units) - len(resident)))
    real = run_steps(
        Schedule(blocks, resident, slots), nbytes, forward, backward, lambda size: size / rate, 3, 2, tail=0.1
    )
    visits = [Visit(seconds, block) for seconds, block in zip(forward, blocks, strict=True)]
    visits += [Visit(backward[i], blocks[i]) for i in sorted(backward, reverse=True)]
    found = simulate([*visits, Visit(0.1, ())], nbytes, resident, slots, rate)
    assert found == pytest.approx((real.seconds, real.stalled, real.copied), rel=1e-9, abs=1e-9)


def test_inputs_that_travel_take_their_time():
    nbytes = dict(a=0, b=0)
    step = [Visit(1, ("a",), store=10**9), Visit(1, ("b",), store=10**9), Visit(1, ("b",), fetch=10**9)]
    step.append(Visit(1, ("a",), fetch=10**9))
    # b's input is out at 2 s, b runs until 2: it comes back until 3; then a's until 4, while b runs until 4.
    assert simulate(step, nbytes, frozenset("ab"), 0, 1e9) == (5, 1, 2 * 10**9)


def test_points_are_worth_having():
    costs = model(5, doubles=3, singles=5)
    front = points(costs, CARD, None, False)
    assert all(a.seconds < b.seconds and a.peak > b.peak for a, b in itertools.pairwise(front))
    assert front[-1].policies == ("recompute",) * 8


def test_where_memory_is_plenty_nothing_is_rounded():
    def rounded(block: BlockCost) -> BlockCost:
        exact = block.policies["keep_all"]
        all8 = dataclasses.replace(
            exact, kept=exact.kept - MB, replay=exact.replay + Work(bf16=1e-5 * TFLOP), exact=False
        )
        return dataclasses.replace(block, policies={**block.policies, "keep_all8": all8})

    costs = model(unit=MB)
    costs = dataclasses.replace(costs, blocks=tuple(map(rounded, costs.blocks)))
    assert set(plan([costs], CARD, 4000 * MB, margin=0).policies) == {"keep_all"}


def test_blocks_that_are_not_trained_keep_nothing():
    costs = model(doubles=2, singles=2)
    idle = tuple(
        BlockCost(b.name, b.units, b.forward, b.forward_peak, b.inputs) if i < 2 else b
        for i, b in enumerate(costs.blocks)
    )
    found = plan([model(blocks=idle)], CARD, 2000 * MB, margin=0)
    assert found.policies[:2] == ("", "") and "" not in found.policies[2:]


def test_a_plan_prints_and_reads_as_json():
    found = plan([model(tiles=((None, 10**10), (64, 10**8)))], CARD, 1500 * MB, margin=0)
    text = describe(found)
    assert "predicted" in text and all(owner in text for owner in found.peak) and "64 rows" in text
    saved = json.loads(json.dumps(found.to_json()))
    assert saved["predicted"] and saved["peak_bytes"] == found.peak_bytes and saved["policies"] == list(found.policies)


def test_the_table_of_cards_is_in_order():
    assert all(c.int8 >= c.bf16 > 0 and c.bus_gb_s > 0 for c in CARDS.values()) and 8 in SLOTS
