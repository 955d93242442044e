"""The planner, on models small enough for brute force, and its promises on any model."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random

import pytest

from fluxq.errors import WrongRequest
from fluxq.offload import simulation
from fluxq.offload.clock import VirtualStreams
from fluxq.offload.costs import BlockCost, Costs, PolicyCost, Work
from fluxq.offload.footprint import Residency, peak_by_owner
from fluxq.offload.gpus import GPU, GPUS
from fluxq.offload.mixtures import points
from fluxq.offload.planner import SLOTS, least, plan, timeline
from fluxq.offload.plans import Pins, describe
from fluxq.offload.schedule import Schedule
from fluxq.offload.simulation import run_steps

TEST_GPU = GPU("test", 0, bf16=1.25, int8=5, fp8=0, memory_gb_s=1e9, memory_gib=1, bus_gb_s=1.0)  # 1 TFLOP = 1 s
TFLOP, MB = 1e12, 10**6


def model(
    seed: int = 0, doubles: int = 2, singles: int = 2, unit: int = 100 * MB, policies: int = 3, **changes
) -> Costs:
    """Blocks of two units and of one, with random seconds and bytes; all alike if `seed` is 0."""
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


def brute_force(costs: Costs, floor: int, extras: tuple[int, ...]) -> list[float]:
    """The fewest seconds of any policies, any resident units, any number of slots, inputs on the host or not, with so
    many bytes more than `floor`.
    """
    residencies = [
        Residency(slots, resident, 0)
        for number in range(len(costs.units) + 1)
        for resident in itertools.combinations(costs.units, number)
        for slots in ((2, 3, 4) if number < len(costs.units) else (0,))
    ]
    best = dict.fromkeys(extras, float("inf"))
    for chosen in itertools.product(*(list(b.policies) for b in costs.blocks)):
        backward = [b.policies[name].replay + b.backward for b, name in zip(costs.blocks, chosen, strict=True)]
        compute = sum(TEST_GPU.seconds(b.forward + w) for b, w in zip(costs.blocks, backward, strict=True))
        for offload, residency in itertools.product((False, True), residencies):
            needed = sum(peak_by_owner(costs, chosen, offload, residency).values()) - floor
            if any(needed <= extra and compute < best[extra] for extra in extras):
                seconds = timeline(costs, TEST_GPU, residency, chosen, offload).seconds
                best |= {extra: min(best[extra], seconds) for extra in extras if needed <= extra}
    return [best[extra] for extra in extras]


def test_plan_equals_brute_force_on_small_models():
    """Blocks that differ, a bus from far too slow to free, memory from next to none to plenty; but for the 0.2 % that a
    plan with other merits may take.
    """
    for seed in range(6):
        unit = (5, 60, 150)[seed % 3] * MB
        costs = model(seed, doubles=1, singles=2, unit=unit, policies=2 + seed % 2)
        floor, extras = least(costs, margin=0), tuple(n * MB for n in (0, 60, 150, 400))
        for extra, seconds in zip(extras, brute_force(costs, floor, extras), strict=True):
            found = plan([costs], TEST_GPU, floor + extra, margin=0)
            assert found.peak_bytes <= floor + extra
            assert found.seconds == pytest.approx(seconds, rel=2e-3), (seed, extra)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_more_memory_is_never_slower(seed):
    costs = model(seed, doubles=3, singles=4, unit=(20, 80, 200)[seed % 3] * MB)
    floor = least(costs, margin=0)
    seconds = [plan([costs], TEST_GPU, floor + extra * 25 * MB, margin=0).seconds for extra in range(40)]
    assert all(b <= a * 1.002 for a, b in itertools.pairwise(seconds))  # the leaner of those as fast is taken
    assert all(second <= min(seconds[: i + 1]) * 1.002 for i, second in enumerate(seconds))
    assert seconds[-1] < seconds[0]


def test_least_is_the_least_that_fits():
    costs = model(3)
    needed = least(costs, margin=0)
    assert plan([costs], TEST_GPU, needed, margin=0).peak_bytes == needed
    with pytest.raises(WrongRequest):
        plan([costs], TEST_GPU, needed - 1, margin=0)


def test_a_fast_bus_leaves_memory_to_activations_and_a_slow_one_to_residents():
    found = plan([model(unit=MB)], TEST_GPU, least(model(unit=MB), margin=0) + 250 * MB, margin=0)
    assert found.stall < 0.01 * found.seconds and set(found.policies) != {"recompute"}
    slow = plan([model(unit=1500 * MB)], TEST_GPU, 12_000 * MB, margin=0)
    assert slow.moved == slow.stall == 0 and len(slow.resident) >= 4  # two more may lie in two slots for good


def test_of_equally_fast_formats_the_more_accurate_wins():
    nf4, int8 = model(unit=5 * MB), model(unit=9 * MB, format="int8", error=0.01)
    assert plan([nf4, int8], TEST_GPU, 4000 * MB, margin=0).format == "int8"
    slow_bus = [model(unit=500 * MB), model(unit=900 * MB, format="int8", error=0.01)]
    assert plan(slow_bus, TEST_GPU, 2500 * MB, margin=0).format == "nf4"
    assert plan(slow_bus, TEST_GPU, 2500 * MB, pins=Pins(format="int8"), margin=0).format == "int8"


def test_pins_are_kept():
    costs = model()
    full = 4000 * MB
    assert set(plan([costs], TEST_GPU, full, pins=Pins(policy="keep_some"), margin=0).policies) == {"keep_some"}
    assert len(plan([costs], TEST_GPU, full, pins=Pins(resident_units=3), margin=0).resident) == 3
    assert plan([costs], TEST_GPU, full, pins=Pins(resident_units=0, slots=5), margin=0).slots == 5
    assert plan([costs], TEST_GPU, full, pins=Pins(offload=True), margin=0).offload
    swapped = plan([costs], TEST_GPU, full, pins=Pins(blocks_to_swap=2), margin=0)
    assert swapped.streamed == 4 and len(swapped.resident) == 2


@pytest.mark.parametrize(
    ("pins", "said"),
    [
        (Pins(format="fp8"), "format fp8 is not available here; choose one of nf4"),
        (Pins(compute="int8"), "compute int8 is not available"),
        (Pins(resident_units=7), "--resident-units must be 0 to 6, not 7"),
        (Pins(blocks_to_swap=4), "--blocks-to-swap must be 0 to 3, not 4"),
        (Pins(blocks_to_swap=1, resident_units=1), "set the same thing"),
        (Pins(policy="keep_nothing"), "the policy must be one of recompute, keep_some, keep_all, not 'keep_nothing'"),
        (Pins(slots=1), "--slots must be at least 2"),
    ],
)
def test_an_impossible_pin_is_refused(pins, said):
    with pytest.raises(WrongRequest, match=said):
        plan([model()], TEST_GPU, 4000 * MB, pins=pins, margin=0)


def test_if_nothing_fits_the_error_names_what_would():
    costs, smaller = model(), model(stays=0)
    needed = least(costs, Pins(policy="keep_all"), 0)
    vram = (needed + least(costs, margin=0)) // 2
    with pytest.raises(WrongRequest) as caught:
        plan([costs], TEST_GPU, vram, pins=Pins(policy="keep_all"), margin=0)
    assert "leave out --policy" in str(caught.value) and "--vram" in str(caught.value)
    assert plan([costs], TEST_GPU, vram, margin=0)
    vram = least(costs, margin=0) - MB
    with pytest.raises(WrongRequest, match=r"allowed; try --vram 0\.\dGiB, or --resolution 512"):
        plan([costs], TEST_GPU, vram, smaller={"--resolution 512": [smaller]}, margin=0)
    with pytest.raises(WrongRequest, match="of RAM in nf4"):
        plan([costs], TEST_GPU, 4000 * MB, ram=10**9, margin=0)


def test_the_vram_that_the_error_names_fits():
    """Passing the --vram of the message leads to a plan."""
    costs = model()
    with pytest.raises(WrongRequest) as caught:
        plan([costs], TEST_GPU, 10**8)
    gib = float(str(caught.value).split("--vram ")[1].split("GiB")[0])
    assert plan([costs], TEST_GPU, int(gib * 2**30))


def test_formats_that_the_gpu_cannot_multiply_are_skipped():
    eight = model(compute="fp8")
    blocks = tuple(
        BlockCost(b.name, b.units, Work(fp8=TFLOP), b.forward_peak, b.inputs, 0, b.backward, b.policies)
        for b in eight.blocks
    )
    eight = model(compute="fp8", blocks=blocks)
    assert plan([eight, model()], TEST_GPU, 4000 * MB, margin=0).compute == "bf16"
    with pytest.raises(WrongRequest, match="cannot multiply in fp8"):
        plan([eight], TEST_GPU, 4000 * MB, margin=0)


def test_seconds_and_stall_are_those_of_the_virtual_clock(monkeypatch):
    """Of the shipped ring, whose copies race with nothing, with a pass aside before every 16th step; the long run is
    worked out of a few steps as it is when all of them are made.
    """
    aside = ("m0", "m1", "m2")
    costs = model(3, doubles=3, singles=4, unit=90 * MB, ahead=dict.fromkeys(aside, 80 * MB), window=16)
    for pins in (Pins(offload=False), Pins(offload=True), Pins(slots=2, resident_units=3)):
        found = plan([costs], TEST_GPU, least(costs, margin=0) + 500 * MB, pins=pins, margin=0)
        blocks = tuple(b.units for b in costs.blocks)
        schedule = Schedule(blocks, frozenset(found.resident), found.slots, aside)
        back = {
            i: TEST_GPU.seconds(b.policies[name].replay + b.backward)
            for i, (b, name) in enumerate(zip(costs.blocks, found.policies, strict=True))
        }
        given = dict(
            ahead=dict.fromkeys(aside, 80 * MB / 1e18 / TEST_GPU.efficiency.memory),
            inputs={i: b.inputs for i, b in enumerate(costs.blocks)} if found.offload else {},
        )
        forward = [TEST_GPU.seconds(b.forward) for b in costs.blocks]
        sizes = {**costs.units, **costs.ahead}
        clock = run_steps(schedule, sizes, forward, back, lambda n: n / 1e9, every=16, streams=VirtualStreams, **given)
        assert (found.seconds, found.stall, found.moved) == (clock.seconds, clock.stalled, clock.copied)
        assert found.look_ahead == 16 and found.stall > 0
        with monkeypatch.context() as patch:
            patch.setattr(simulation, "SETTLES", 16)
            whole = run_steps(schedule, sizes, forward, back, lambda n: n / 1e9, every=16, **given)
        assert found.seconds == pytest.approx(whole.seconds, rel=1e-9)


def test_copies_of_inputs_take_time():
    """Five blocks of 1 s forward and backward, all weights resident, inputs of 1.5 s each."""
    blocks = tuple((f"{i}",) for i in range(5))
    schedule = Schedule(blocks, frozenset("01234"), 2)
    seconds, nbytes = [1.0] * 5, dict.fromkeys("01234", 0)
    back, inputs = dict(enumerate(seconds)), dict.fromkeys(range(5), 1500 * MB)
    step = run_steps(schedule, nbytes, seconds, back, lambda n: n / 1e9, warmup=0, inputs=inputs)
    # Stores end at 1.5, 3, 4.5, 6, 7.5. Three inputs may be there: block 3 waits for store 0, block 4 for store 1, and
    # runs until 5. Of 4, 3 and 2 the stores are waited for, no fetch: 4 runs at 7.5 to 8.5, 3 to 9.5, 2 to 10.5. Of 1
    # the fetch begins when 3 does, at 8.5, and ends at 10: no wait, until 11.5. Of 0 it begins at 10 and ends at 11.5.
    assert (step.seconds, step.stalled, step.copied) == (12.5, 2.5, 2 * 1500 * MB)
    free = run_steps(schedule, nbytes, seconds, back, lambda n: 0, inputs=inputs)
    assert (free.seconds, free.stalled) == (10, 0)


def test_inputs_and_units_share_one_bus():
    """Both at once take as long as one after the other."""
    schedule, nbytes = (
        Schedule(tuple((f"{i}",) for i in range(8)), frozenset(), 2),
        dict.fromkeys("01234567", 1000 * MB),
    )
    given = schedule, nbytes, [0.01] * 8, dict.fromkeys(range(8), 0.01), lambda n: n / 1e9, 3, 2
    alone, both = run_steps(*given), run_steps(*given, inputs=dict.fromkeys(range(8), 500 * MB))
    assert both.copied == alone.copied + 5 * 500 * MB
    assert both.seconds >= both.copied / 1e9


def test_of_equally_fast_plans_the_one_with_least_copies_and_a_tenth_free_wins():
    costs = model(unit=20 * MB)
    plenty, needed = plan([costs], TEST_GPU, 4000 * MB, margin=0), least(costs, margin=0)
    assert plenty.moved == 0 and len(plenty.resident) >= 4, "a bus that rests costs nothing"
    for vram in range(needed + 250 * MB, needed + 500 * MB, 20 * MB):
        found = plan([costs], TEST_GPU, vram, pins=Pins(offload=False), margin=0)
        same = [plan([costs], TEST_GPU, vram, pins=Pins(resident_units=n, offload=False), margin=0) for n in range(7)]
        same = [p for p in same if p.seconds <= found.seconds]
        free = [p for p in same if p.peak_bytes <= 0.9 * vram]
        if free:
            assert found.peak_bytes <= 0.9 * vram and found.moved <= min(p.moved for p in free)
        else:
            assert found.peak_bytes <= min(p.peak_bytes for p in same)


def test_ram_holds_streamed_units_and_more_vram_saves_ram():
    costs = model(unit=200 * MB)
    streamed = plan([costs], TEST_GPU, 4000 * MB, pins=Pins(resident_units=0, offload=False), margin=0)
    resident = plan([costs], TEST_GPU, 4000 * MB, pins=Pins(resident_units=6, offload=False), margin=0)
    assert streamed.host - resident.host == 6 * 200 * MB
    found = plan([costs], TEST_GPU, 4000 * MB, ram=resident.host + 250 * MB, margin=0)
    assert found.host <= resident.host + 250 * MB and len(found.resident) >= 5
    with pytest.raises(WrongRequest, match="of RAM in nf4, but only 3.0 GiB are allowed; raise --ram"):
        plan([costs], TEST_GPU, least(costs, margin=0), ram=resident.host, margin=0)


def test_the_workspaces_of_the_library_are_alive_and_were_never_free():
    plain, more = (plan([model(library=n)], TEST_GPU, 3 * 10**9) for n in (0, 64 * 2**20))
    assert more.peak_bytes - plain.peak_bytes == more.peak["workspace"] - plain.peak["workspace"] == 64 * 2**20
    assert more.reserved == plain.reserved and more.policies == plain.policies


def test_weights_that_cannot_stream_stay_resident_or_are_refused():
    whole = model(unit=200 * MB, format="bf16", error=0.002, streams=False)
    found = plan([whole], TEST_GPU, 4000 * MB, margin=0)
    assert len(found.resident) == 6 and found.slots == found.moved == 0 and found.placed is None
    lean = model(unit=50 * MB)
    assert plan([lean, whole], TEST_GPU, 4000 * MB, margin=0).format == "bf16", "as fast, and more faithful"
    assert plan([lean, whole], TEST_GPU, least(whole, margin=0) - MB, margin=0).format == "nf4"
    assert plan([lean, whole], TEST_GPU, 4000 * MB, pins=Pins(resident_units=2), margin=0).format == "nf4"
    with pytest.raises(WrongRequest, match="bf16 are not streamed yet; choose --format nf4, int8 or fp8"):
        plan([whole], TEST_GPU, 4000 * MB, pins=Pins(resident_units=2), margin=0)


def test_units_computed_ahead_use_slots_even_if_all_others_are_resident():
    costs = model(unit=MB, ahead={"m0": 80 * MB, "m1": 60 * MB, "m2": 60 * MB}, window=8, ahead_peak=3000 * MB)
    found = plan([costs], TEST_GPU, 8000 * MB, pins=Pins(resident_units=6), margin=0)
    assert (found.slots, found.look_ahead, found.placed) == (2, 8, found.resident) and found.peak["slots"] == 160 * MB
    assert found.peak["workspace"] == 3000 * MB, "the pass has the most at once"
    assert found.moved == (80 + 60) * MB // 8, "m1 stays in its slot, m0 and m2 share one"


def with_launches(costs: Costs, **by_policy: int) -> Costs:
    """`costs` whose blocks launch that many kernels under each policy."""
    blocks = [
        dataclasses.replace(
            b, policies={n: dataclasses.replace(p, launches=by_policy[n]) for n, p in b.policies.items()}
        )
        for b in costs.blocks
    ]
    return dataclasses.replace(costs, blocks=tuple(blocks), launches=10)


def test_if_python_is_the_limit_the_plan_says_so_and_launches_least():
    """keep_some launches less than keep_all, whose GPU time is less."""
    costs = with_launches(model(unit=MB), recompute=90, keep_some=60, keep_all=80)
    plenty = dict(vram=4000 * MB, margin=0)
    for us, policy, bound in ((1.0, "keep_all", "compute"), (1e5, "keep_some", "python")):
        found = plan([costs], dataclasses.replace(TEST_GPU, launch_us=us), **plenty)
        assert set(found.policies) == {policy} and found.bound == bound
        assert found.launches == 10 + 4 * {"keep_all": 80, "keep_some": 60}[policy] and found.moved == 0
        assert found.launching == pytest.approx(1e-6 * us * found.launches)
        assert found.seconds == max(found.gpu_seconds, found.launching)
        assert ("limited by Python" in describe(found)) == (bound == "python")
    slow = dataclasses.replace(TEST_GPU, launch_us=1e5)
    streamed = plan([costs], slow, pins=Pins(resident_units=0, policy="keep_some"), **plenty)
    assert streamed.launches > 10 + 4 * 60, "copies are launched too"


def test_plans_that_python_limits_equal_brute_force():
    costs = with_launches(model(3, doubles=1, singles=2, unit=60 * MB), recompute=40, keep_some=20, keep_all=30)
    floor = least(costs, margin=0)
    for us, extra in itertools.product((1e3, 1e4, 3e4), (0, 60, 150, 400)):
        gpu = dataclasses.replace(TEST_GPU, launch_us=us)
        best = min(
            plan([only_policies(costs, names)], gpu, floor + extra * MB, margin=0).seconds
            for names in itertools.product(("recompute", "keep_some", "keep_all"), repeat=3)
            if least(only_policies(costs, names), margin=0) <= floor + extra * MB
        )
        assert plan([costs], gpu, floor + extra * MB, margin=0).seconds == pytest.approx(best, rel=2e-3), (us, extra)


def only_policies(costs: Costs, names: tuple[str, ...]) -> Costs:
    """`costs` with one policy left for each block."""
    blocks = zip(costs.blocks, names, strict=True)
    left = tuple(dataclasses.replace(b, policies={name: b.policies[name]}) for b, name in blocks)
    return dataclasses.replace(costs, blocks=left)


def test_points_are_pareto_optimal():
    costs = model(5, doubles=3, singles=5)
    front = points(costs, TEST_GPU, None, False)
    assert all(a.seconds < b.seconds and a.peak > b.peak for a, b in itertools.pairwise(front))
    assert front[-1].policies == ("recompute",) * 8


def test_with_plenty_of_memory_nothing_is_rounded():
    def rounded(block: BlockCost) -> BlockCost:
        exact = block.policies["keep_all"]
        all8 = dataclasses.replace(
            exact, kept=exact.kept - MB, replay=exact.replay + Work(bf16=1e-5 * TFLOP), exact=False
        )
        return dataclasses.replace(block, policies={**block.policies, "keep_all8": all8})

    costs = model(unit=MB)
    costs = dataclasses.replace(costs, blocks=tuple(map(rounded, costs.blocks)))
    assert set(plan([costs], TEST_GPU, 4000 * MB, margin=0).policies) == {"keep_all"}


def test_blocks_that_are_not_trained_keep_nothing():
    costs = model(doubles=2, singles=2)
    idle = tuple(
        BlockCost(b.name, b.units, b.forward, b.forward_peak, b.inputs) if i < 2 else b
        for i, b in enumerate(costs.blocks)
    )
    found = plan([model(blocks=idle)], TEST_GPU, 2000 * MB, margin=0)
    assert found.policies[:2] == ("", "") and "" not in found.policies[2:]


def test_a_plan_prints_and_reads_as_json():
    found = plan([model(tiles=((None, 10**10), (64, 10**8)))], TEST_GPU, 1500 * MB, margin=0)
    text = describe(found)
    assert "predicted" in text and all(owner in text for owner in found.peak) and "64 rows" in text
    saved = json.loads(json.dumps(found.to_json()))
    assert saved["predicted"] and saved["peak_bytes"] == found.peak_bytes and saved["policies"] == list(found.policies)


def test_the_table_of_gpus_is_in_order():
    assert all(c.int8 >= c.bf16 > 0 and c.bus_gb_s > 0 for c in GPUS.values()) and 8 in SLOTS
