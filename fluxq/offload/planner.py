"""Plans what to keep, stream, recompute or move to the host so that a step fits on the GPU and is fast: a pure
function.

`plan` reads a GPU and tables of bytes and FLOPs (fluxq/offload/costs.py), one for each allowed way of holding and
multiplying the weights. For each table it lists what the blocks can keep (mixtures.py) and combines that with every
number of slots and of resident units that fits (footprint.py). It tries the most promising candidates first: the ring
itself, under a virtual clock (simulation.py), says how long a step takes on the GPU; it takes no less than Python needs
to launch its kernels. It picks the fastest that fits; of the plans within 1 % of it, the one with the most accurate
weights. Every figure is a prediction.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import NamedTuple

from fluxq.errors import WrongRequest

from .costs import BUFFERS, Costs
from .footprint import Residency, fixed, host_bytes, peak_by_owner, reserved
from .gpus import GIB, GPU
from .mixtures import Point, points
from .plans import Pins, Plan, gib, gib_up
from .schedule import Schedule, spread
from .simulation import Timeline, run_steps

SLOTS = (2, 3, 4, 8)
"""The numbers to try: a double block holds two units, and more than eight hide nothing more."""

RESIDENTS = 20
"""How many numbers of resident units to try; all of them if there are no more than that."""

OUTSIDE = int(0.4 * GIB)
"""Bytes of the GPU that torch's allocator leaves to cuBLAS, compiled kernels and CUDA (fluxq/memory/share.py)."""

STEP_MARGIN = OUTSIDE + int(0.15 * GIB)
"""Bytes of the GPU that no plan of a training step reserves: predictions of what the allocator reserves are up to 5 %
too low (benchmarks/results/emulated.md), but where less is free it gives back what it does not use. With 0.1 GiB
instead of 0.15, one default plan of a hundred made it do so.
"""

COPY_LAUNCHES = 2
"""A copy between GPU and host, with its events, takes as long as this many launches."""

AS_GOOD = 1.01
GRAIN = 1.002
"""Plans of one table that differ by less count as equally fast; `_rank` chooses between them."""

FREE = 0.1
"""The fraction of the memory to leave free if that costs no time."""


def plan(
    tables: Sequence[Costs],
    gpu: GPU,
    vram: int | None = None,
    ram: int | None = None,
    pins: Pins | None = None,
    smaller: Mapping[str, Sequence[Costs]] | None = None,
    margin: int = STEP_MARGIN,
) -> Plan:
    """The fastest plan of `tables` within `vram` and `ram` bytes, or one that is as good and more accurate.

    vram: by default, the GPU's; `margin` of it is not planned with. smaller: name -> tables of settings that the user
    could choose instead, for the error message if nothing fits. Raises WrongRequest then, and for pins that no plan can
    satisfy.
    """
    pins, vram = pins or Pins(), gpu.vram if vram is None else vram
    best: list[tuple[float, Plan]] = []
    for costs in (allowed := _allowed(tables, gpu, pins)):
        limit = AS_GOOD * min((p.seconds for _, p in best), default=math.inf)
        if fastest := _Search(costs, gpu, vram, vram - margin, ram, pins).fastest(limit):
            best.append((costs.error, fastest))
    if not best:
        raise WrongRequest(_what_would_fit(allowed, vram, ram, pins, smaller or {}, margin))
    least_seconds = min(p.seconds for _, p in best)
    as_good = [(error, p.seconds, i) for i, (error, p) in enumerate(best) if p.seconds <= AS_GOOD * least_seconds]
    return best[min(as_good)[2]][1]


def least(costs: Costs, pins: Pins | None = None, margin: int = STEP_MARGIN) -> int:
    """The fewest bytes of a GPU that any plan of `costs` needs."""
    pins = pins or Pins()
    return margin + min(
        reserved(costs, residency, point.peak)
        for offload in _offloads(pins)
        for point in points(costs, None, pins.policy, offload)
        for residency in residencies(costs, pins)
    )


BlockSeconds = tuple[float, list[float], list[dict[str, float]]]


def block_seconds(costs: Costs, gpu: GPU) -> BlockSeconds:
    """Seconds outside the blocks, of each block forward, and of each block backward by policy."""
    forward = [gpu.seconds(b.forward) for b in costs.blocks]
    backward = [{n: gpu.seconds(p.replay + b.backward) for n, p in b.policies.items()} for b in costs.blocks]
    return gpu.seconds(costs.outside), forward, backward


def launches(costs: Costs, residency: Residency, policies: Sequence[str], offload: bool) -> int:
    """How many kernels Python launches in a step, with what takes as long: copies of streamed units, once each way but
    for those in the slots when the direction changes, and of each block's inputs to the host and back.
    """
    kernels = costs.launches + sum(b.launched(policy) for b, policy in zip(costs.blocks, policies, strict=True))
    trained = [(b, policy) for b, policy in zip(costs.blocks, policies, strict=True) if policy]
    inputs, units = len(trained) if offload else 0, len(costs.units) - len(residency.resident) - residency.slots
    return kernels + 2 * COPY_LAUNCHES * (inputs + max(0, units))


def timeline(
    costs: Costs,
    gpu: GPU,
    residency: Residency,
    policies: Sequence[str],
    offload: bool = False,
    run_ahead: int | None = None,
    known: BlockSeconds | None = None,
) -> Timeline:
    """A step of `costs` on `gpu` in the long run, by the ring under a virtual clock (run_ahead: see TimedStreams).
    known: the result of `block_seconds`.
    """
    outside, forward, backward = known or block_seconds(costs, gpu)
    blocks = tuple(b.units for b in costs.blocks)
    return run_steps(
        Schedule(blocks, frozenset(residency.resident), max(2, residency.slots), tuple(costs.ahead)),
        {**costs.units, **costs.ahead},
        forward,
        {i: backward[i][policy] for i, policy in enumerate(policies) if policy},
        lambda nbytes: nbytes / (gpu.bus_gb_s * 1e9),
        tail=outside,
        run_ahead=run_ahead,
        ahead={unit: _reading(gpu, nbytes) for unit, nbytes in costs.ahead.items()},
        every=residency.ahead,
        inputs={i: b.inputs for i, b in enumerate(costs.blocks) if policies[i]} if offload else None,
    )


def residencies(costs: Costs, pins: Pins) -> list[Residency]:
    """Every combination of slots, resident units and look-ahead that the pins allow."""
    units, blocks, combinations = len(costs.units), [b.units for b in costs.blocks], []
    numbers: Sequence[int] = sorted({*range(0, units, max(1, units // RESIDENTS)), units})
    if (pinned := pins.resident(units)) is not None:
        numbers = (pinned,)
    if not costs.streams:
        numbers = (units,)
    for number in numbers:
        chosen = spread(blocks, number)
        resident = tuple(u for u in costs.units if u in chosen)
        fewest = max(2, max((len(set(b) - set(resident)) for b in blocks), default=0))
        if pins.slots is not None and pins.slots < fewest:
            raise WrongRequest(f"--slots must be at least {fewest}: a block needs that many units at once")
        wanted = {max(s, fewest) for s in ((pins.slots,) if pins.slots else SLOTS)}
        slots = {min(s, max(units - number - 1, fewest)) for s in wanted} if number < units else {0}
        if costs.ahead:  # these always pass through slots
            slots = {max(2, s) for s in slots}
        combinations += [Residency(s, resident, costs.window) for s in sorted(slots)]
    return combinations


Rank = tuple[int, bool, int, bool, int, int]


class _Candidate(NamedTuple):
    """One point with one residency. Its `rank` is a lower bound; the points that keep less follow in `rest`."""

    rank: Rank
    number: int
    point: Point
    residency: Residency
    offload: bool
    rest: Iterator[Point]


@dataclass(frozen=True)
class _Search:
    """Searches for the fastest plan of one table. `budget`: the bytes of `vram` to plan with."""

    costs: Costs
    gpu: GPU
    vram: int
    budget: int
    ram: int | None
    pins: Pins

    def fastest(self, limit: float) -> Plan | None:
        """The fastest plan, if one fits and takes at most `limit` seconds.

        Tries the most promising candidate first. A plan takes at least its compute and at least its copies, so the
        search ends when no other candidate can be better.
        """
        number, heap = count(), list[_Candidate]()
        for residency, offload, rest in self._fitting():
            self._push(heap, number, residency, offload, rest, limit)
        best: tuple[Rank, float, _Candidate] | None = None
        while heap:
            candidate = heapq.heappop(heap)
            if best and candidate.rank >= best[0]:
                break
            *_, point, residency, offload, rest = candidate
            steps, (pass_seconds, pass_bytes) = self._timeline(candidate, passes=False), self._pass_share(residency)
            seconds = max(steps.seconds + pass_seconds, self._launching(point, residency, offload))
            rank = self._rank(seconds, steps.copied + pass_bytes, point, residency, offload)
            if seconds <= limit and (best is None or rank < best[0]):
                best = rank, seconds, candidate
            if seconds <= AS_GOOD * min(limit, best[1] if best else math.inf):  # a point that keeps less is not faster
                self._push(heap, number, residency, offload, rest, limit)
        return None if best is None else self._plan(best[2])

    def _fitting(self) -> Iterator[tuple[Residency, bool, Iterator[Point]]]:
        """Every residency, with the points that fit with it, the fastest first."""
        for offload in _offloads(self.pins) if self.costs.blocks else ():
            known = points(self.costs, self.gpu, self.pins.policy, offload)
            for residency in residencies(self.costs, self.pins):
                if self.ram is None or host_bytes(self.costs, residency, offload) <= self.ram:
                    fitting = [p for p in known if reserved(self.costs, residency, p.peak) <= self.budget]
                    yield residency, offload, iter(fitting)

    def _push(
        self,
        heap: list[_Candidate],
        number: Iterator[int],
        residency: Residency,
        offload: bool,
        rest: Iterator[Point],
        limit: float,
    ) -> None:
        """Push the next point of `rest` that may take at most `limit` seconds, with a lower bound of its time."""
        pass_seconds, pass_bytes = self._pass_share(residency)
        moved = self._least_moved(residency, offload) + pass_bytes
        for point in rest:
            seconds = max(
                point.gpu_seconds + self._known[0] + pass_seconds,
                moved / (self.gpu.bus_gb_s * 1e9),
                self._launching(point, residency, offload),
            )
            if seconds <= limit:
                rank = self._rank(seconds, moved, point, residency, offload)
                heapq.heappush(heap, _Candidate(rank, next(number), point, residency, offload, rest))
                return

    def _rank(self, seconds: float, moved: int, point: Point, residency: Residency, offload: bool) -> Rank:
        """The smallest rank wins. Of equally fast plans, prefer one that keeps no inputs on the host; that rounds less
        of what it keeps; that leaves some memory free, for anything else that needs the GPU; that copies less, since
        copies take power and are hidden only if the predictions hold; that uses less memory.
        """
        nbytes = reserved(self.costs, residency, point.peak)
        crowded = nbytes > (1 - FREE) * self.budget
        grain = math.ceil(math.log(seconds, GRAIN) - 1e-6)
        return grain, offload, point.rounded, crowded, 0 if crowded else moved, nbytes

    @cached_property
    def _known(self) -> BlockSeconds:
        return block_seconds(self.costs, self.gpu)

    def _launching(self, point: Point, residency: Residency, offload: bool) -> float:
        """Seconds in which Python launches a step."""
        return 1e-6 * self.gpu.launch_us * launches(self.costs, residency, point.policies, offload)

    def _pass_share(self, residency: Residency) -> tuple[float, int]:
        """A lower bound of one step's share of a pass ahead, in seconds and bytes. The search uses it in place of the
        pass.

        The pass reads each unit and waits for their copies, except for those in the slots when it starts; afterwards
        the units that it evicted are copied back.
        """
        sizes, window = self.costs.ahead.values(), max(1, residency.ahead)
        copied = max(0, sum(sizes) - residency.slots * self.costs.slot)
        seconds = max(sum(_reading(self.gpu, size) for size in sizes), copied / (self.gpu.bus_gb_s * 1e9))
        streamed = sorted(size for unit, size in self.costs.units.items() if unit not in residency.resident)
        back = sum(streamed[: residency.slots]) if sizes else 0
        return seconds / window, (copied + back) // window

    def _least_moved(self, residency: Residency, offload: bool) -> int:
        """The fewest bytes that a step copies to the GPU: all streamed units each way, except those still in the slots
        when the direction changes.
        """
        costs, resident = self.costs, set(residency.resident)
        streamed = {unit: size for unit, size in costs.units.items() if unit not in resident}
        trained = {u for b in costs.blocks if b.policies for u in b.units}
        spared = residency.slots * costs.slot
        moved = sum(streamed.values()) + sum(size for unit, size in streamed.items() if unit in trained) - 2 * spared
        inputs = [b.inputs for b in costs.blocks if b.policies] if offload else []
        return max(0, moved) + sum(inputs[: -1 - BUFFERS])

    def _timeline(self, candidate: _Candidate, passes: bool = True) -> Timeline:
        residency = candidate.residency if passes else candidate.residency._replace(ahead=0)
        return timeline(self.costs, self.gpu, residency, candidate.point.policies, candidate.offload, None, self._known)

    def _plan(self, chosen: _Candidate) -> Plan:
        costs, residency, point, offload = self.costs, chosen.residency, chosen.point, chosen.offload
        timing, peak = self._timeline(chosen), peak_by_owner(costs, point.policies, offload, residency)
        left = sum(peak.values()) - fixed(costs, residency)  # previews are decoded in a step's temporaries
        tiles = next((band for band, size in costs.tiles if size <= left), costs.tiles[-1][0] if costs.tiles else None)
        kernels = launches(costs, residency, point.policies, offload)
        launching = 1e-6 * self.gpu.launch_us * kernels
        return Plan(
            costs.format, costs.compute, residency.slots, residency.resident,
            len(costs.units) - len(residency.resident), point.policies, offload, tiles, residency.ahead, peak,
            reserved(costs, residency, left), max(timing.seconds, launching),
            timing.stalled, timing.copied, timing.seconds, kernels, launching,
            host_bytes(costs, residency, offload), self.gpu.name, self.vram, costs.about,
        )  # fmt: skip


def _allowed(tables: Sequence[Costs], gpu: GPU, pins: Pins) -> list[Costs]:
    """The tables that the pins and the GPU's arithmetic allow."""
    for name in ("format", "compute"):
        wanted, there = getattr(pins, name), sorted({getattr(t, name) for t in tables})
        if wanted is not None and wanted not in there:
            raise WrongRequest(f"{name} {wanted} is not available here; choose one of {', '.join(there)}")
    left = [t for t in tables if pins.format in (None, t.format) and pins.compute in (None, t.compute)]
    able = [t for t in left if all(math.isfinite(gpu.seconds(b.forward + b.backward)) for b in t.blocks)]
    if not able:
        raise WrongRequest(f"{gpu.name} cannot multiply in {left[0].compute}; choose another --compute")
    placed = [t for t in able if t.streams or pins.resident(len(t.units)) in (None, len(t.units))]
    if not placed:
        raise WrongRequest(f"weights in {able[0].format} are not streamed yet; choose --format nf4, int8 or fp8")
    return placed


def _offloads(pins: Pins) -> tuple[bool, ...]:
    return (False, True) if pins.offload is None else (pins.offload,)


def _reading(gpu: GPU, nbytes: int) -> float:
    """Seconds of a product with few rows, which waits for its weights."""
    return nbytes / (gpu.memory_gb_s * 1e9 * gpu.efficiency.memory)


def _what_would_fit(
    tables: Sequence[Costs],
    vram: int,
    ram: int | None,
    pins: Pins,
    smaller: Mapping[str, Sequence[Costs]],
    margin: int,
) -> str:
    """Why nothing fits, and what would."""
    needed = min(least(t, pins, margin) for t in tables)
    if ram is not None and needed <= vram:
        hosts = {t.format: _least_host(t, pins, vram - margin) for t in tables}
        lean = min(hosts, key=hosts.__getitem__)
        return (
            f"the frozen weights need {gib(hosts[lean])} of RAM in {lean}, but only {gib(ram)} are allowed; "
            "raise --ram, or close other programs"
        )
    ways = [f"--vram {gib_up(needed)}"]
    free = Pins(format=pins.format, compute=pins.compute)
    if pins != free and (unpinned := min(least(t, free, margin) for t in tables)) <= vram:
        names = ("resident_units", "blocks_to_swap", "policy", "slots", "offload")
        given = [f"--{n.replace('_', '-')}" for n in names if getattr(pins, n) is not None]
        ways.append(f"leave out {' and '.join(given)} ({gib(unpinned)})")
    for name, others in smaller.items():
        usable = [t for t in others if pins.format in (None, t.format) and pins.compute in (None, t.compute)]
        if usable and (lean := min(least(t, pins, margin) for t in usable)) <= vram:
            ways.append(f"{name} ({gib(lean)})")
            break
    would = ", or ".join(ways)
    return f"this needs at least {gib(needed)} of GPU memory, but only {gib(vram)} are allowed; try {would}"


def _least_host(costs: Costs, pins: Pins, budget: int) -> int:
    """The fewest bytes of RAM of any plan that keeps to `budget` bytes of the GPU."""
    return min(
        (
            host_bytes(costs, residency, offload)
            for offload in _offloads(pins)
            for residency in residencies(costs, pins)
            if reserved(costs, residency, min(p.peak for p in points(costs, None, pins.policy, offload))) <= budget
        ),
        default=1 << 62,
    )
