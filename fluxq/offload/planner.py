"""What to keep, stream, compute again or send to the host, so that a step fits on the card and is fast: a pure
function.

`plan` reads tables of bytes and FLOPs (fluxq/offload/costs.py), one for each way of holding and multiplying the weights
that is allowed, and a card. For each it draws up what the blocks can keep: the policies that no others beat in both
bytes and seconds. With every number of slots and of resident units it takes those that fit, and lets a small simulation
of the copies say how long the step takes, the most promising first. Of what fits, the fastest is taken; among plans
within 1 % of it the one whose weights are most faithful. Every figure is a prediction.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Any, NamedTuple

from fluxq.errors import WrongRequest
from fluxq.offload.cards import GIB, Card
from fluxq.offload.costs import OWNERS, BlockCost, Costs
from fluxq.offload.plans import Pins, Plan, gib, gib_up
from fluxq.offload.schedule import spread
from fluxq.offload.simulate import BUFFERS, Timing, Visit, simulate

SLOTS = (2, 3, 4, 8)
"""How many are tried: a double block holds two, and more than eight hide nothing more."""

RESIDENTS = 20
"""Of how many units are resident, so many numbers are tried, and all where there are no more."""

AHEAD = 64
"""Pictures whose modulation one pass computes."""

MARGIN = int(0.75 * GIB)
"""Bytes of the card that are not the program's tensors: CUDA's own, and what the allocator loses between them."""

HOST = 3 * GIB
"""Bytes of RAM beside the weights: the program, its libraries, pictures read ahead."""

AS_GOOD = 1.01
GRAIN = 1.002
"""Plans of one table that differ by less are as fast. Of those the one is taken that has no inputs on the host, then
the one that rounds less of what it keeps, then the leaner.
"""

POINTS = 250
"""So many mixtures of policies are looked at in drawing up the best of them, evenly apart in bytes; of those 64."""


class Point(NamedTuple):
    """One way for the blocks to keep things: seconds of the blocks' compute, the most bytes (activations and workspace
    and gradients that have come up by then), each block's policy, and how many blocks round what they keep.
    """

    seconds: float
    peak: int
    policies: tuple[str, ...]
    rounded: int = 0


def plan(
    tables: Sequence[Costs],
    card: Card,
    vram: int | None = None,
    ram: int | None = None,
    pins: Pins | None = None,
    smaller: Mapping[str, Sequence[Costs]] | None = None,
    margin: int = MARGIN,
) -> Plan:
    """The fastest plan of `tables` that keeps to `vram` and `ram` bytes, or as good as that and more faithful.

    vram: of the card by default; `margin` of it is not planned with. smaller: name -> tables of what the user could ask
    for instead, said where nothing fits. Raises WrongRequest then, and for pins that no plan can have.
    """
    pins, vram = pins or Pins(), card.vram if vram is None else vram
    best: list[Plan] = []
    for costs in (allowed := _allowed(tables, card, pins)):
        limit = AS_GOOD * min((p.seconds for p in best), default=math.inf)
        if found := _fastest(costs, card, vram, ram, pins, margin, limit):
            best.append(found)
    if not best:
        raise WrongRequest(_what_would_fit(allowed, card, vram, ram, pins, smaller or {}, margin))
    fastest = min(p.seconds for p in best)
    errors = {(t.format, t.compute): t.error for t in allowed}
    return min(
        (p for p in best if p.seconds <= AS_GOOD * fastest), key=lambda p: (errors[p.format, p.compute], p.seconds)
    )


def least(costs: Costs, pins: Pins | None = None, margin: int = MARGIN) -> int:
    """The fewest bytes of a card that any plan of `costs` needs."""
    pins = pins or Pins()
    return margin + min(
        _fixed(costs, setting) + point.peak
        for offload in _offloads(pins)
        for point in points(costs, None, pins.policy, offload)
        for setting in _settings(costs, pins)
    )


def peak_by_owner(costs: Costs, policies: Sequence[str], offload: bool, setting: Setting) -> dict[str, int]:
    """Owner -> bytes at the moment of the most."""
    found: dict[str, int] = dict.fromkeys(OWNERS, 0)
    found["weights"] = costs.stays + sum(costs.units[u] for u in setting.resident)
    found["slots"] = setting.slots * costs.slot
    found["optimiser"] = costs.optimiser
    activations, workspace, gradients = max(_moments(costs, policies, offload), key=sum)
    found["lora"] = costs.lora + gradients
    found["activations"] = activations
    found["workspace"] = workspace + costs.scratch + costs.ahead_step
    return found


Rank = tuple[int, bool, int, int]


class Setting(NamedTuple):
    """What does not depend on the policies: slots, resident units, and steps that modulation is ahead."""

    slots: int
    resident: tuple[str, ...]
    ahead: int


def _allowed(tables: Sequence[Costs], card: Card, pins: Pins) -> list[Costs]:
    """The tables that the pins and the card's arithmetic leave."""
    for name in ("format", "compute"):
        wanted, there = getattr(pins, name), sorted({getattr(t, name) for t in tables})
        if wanted is not None and wanted not in there:
            raise WrongRequest(f"{name} {wanted} is not among those that can be had: {', '.join(there)}")
    left = [t for t in tables if pins.format in (None, t.format) and pins.compute in (None, t.compute)]
    able = [t for t in left if math.isfinite(block_seconds(t, card)[0])]
    if not able:
        raise WrongRequest(f"{card.name} cannot multiply in {left[0].compute}; choose another --compute")
    return able


def block_seconds(costs: Costs, card: Card) -> tuple[float, list[float], list[dict[str, float]]]:
    """Seconds outside the blocks and of each block forward, all of it; and backward by policy."""
    forward = [card.seconds(b.forward) for b in costs.blocks]
    backward = [{n: card.seconds(p.replay + b.backward) for n, p in b.policies.items()} for b in costs.blocks]
    outside = card.seconds(costs.outside)
    return outside + sum(forward) + sum(max(b.values(), default=0.0) for b in backward), forward, backward


def _fastest(
    costs: Costs, card: Card, vram: int, ram: int | None, pins: Pins, margin: int, limit: float
) -> Plan | None:
    """The fastest plan of one table, if one fits and takes at most `limit` seconds.

    The most promising first: a plan takes at least its compute and at least its copies, so that the search ends when no
    other can be faster.
    """
    _, forward, backward = block_seconds(costs, card)
    outside, bytes_s, room = card.seconds(costs.outside), card.bus_gb_s * 1e9, vram - margin
    number = count()
    heap: list[tuple[Rank, float, int, Iterator[Point], Point, Setting, bool]] = []

    def push(fitting: Iterator[Point], setting: Setting, offload: bool) -> None:
        point = next(fitting, None)
        if point is not None:
            bound = max(point.seconds + outside, _bytes_moved(costs, setting, offload) / bytes_s)
            bound += _ahead_seconds(costs, card, setting)
            rank = _rank(bound, offload, point, _fixed(costs, setting))
            heapq.heappush(heap, (rank, bound, next(number), fitting, point, setting, offload))

    for offload in _offloads(pins):
        known = points(costs, card, pins.policy, offload)
        for setting in _settings(costs, pins):
            if (ram is None or _host(costs, offload) <= ram) and costs.blocks:
                left = room - _fixed(costs, setting)
                push((p for p in known if p.peak <= left), setting, offload)

    best: tuple[Rank, float, Timing, Point, Setting, bool] | None = None
    while heap:
        rank, bound, _, fitting, point, setting, offload = heapq.heappop(heap)
        if best and rank >= best[0]:
            break
        visits = _visits(costs, forward, backward, point.policies, offload)
        visits.append(Visit(outside, ()))
        timing = simulate(visits, costs.units, frozenset(setting.resident), setting.slots, bytes_s)
        seconds = timing.seconds + _ahead_seconds(costs, card, setting)
        rank = _rank(seconds, offload, point, _fixed(costs, setting))
        if seconds <= limit and (best is None or rank < best[0]):
            best = rank, seconds, timing, point, setting, offload
        if seconds <= AS_GOOD * min(limit, best[1] if best else math.inf):  # what keeps less is not faster
            push(fitting, setting, offload)
    if best is None:
        return None
    _, seconds, timing, point, setting, offload = best
    ahead = _ahead_seconds(costs, card, setting)
    moved = timing.moved + (sum(costs.ahead.values()) // setting.ahead if setting.ahead else 0)
    peak = peak_by_owner(costs, point.policies, offload, setting)
    left = room - sum(v for k, v in peak.items() if k not in ("activations", "workspace"))
    tiles = next((band for band, size in costs.tiles if size <= left), costs.tiles[-1][0] if costs.tiles else None)
    return Plan(
        costs.format, costs.compute, setting.slots, setting.resident, len(costs.units) - len(setting.resident),
        point.policies, offload, tiles, setting.ahead, peak, seconds, timing.stall + ahead, moved,
        _host(costs, offload), card.name, vram, costs.about,
    )  # fmt: skip


def _rank(seconds: float, offload: bool, point: Point, fixed: int) -> Rank:
    """What is smaller is taken first."""
    return math.ceil(math.log(seconds, GRAIN) - 1e-6), offload, point.rounded, fixed + point.peak


def points(costs: Costs, card: Card | None, policy: str | None, offload: bool) -> list[Point]:
    """The ways for the blocks to keep things that none beats in both seconds and bytes, the fastest first.

    Blocks that cost the same are alike, so that it only counts how many of them have each policy; they are mixed
    evenly. Without a card only the leanest matters: seconds are FLOPs then.
    """
    classes: dict[tuple[Any, ...], list[int]] = {}
    options: dict[tuple[Any, ...], list[tuple[int, float, str]]] = {}
    for i, block in enumerate(costs.blocks):
        choices = []
        for name, cost in block.policies.items():
            work = cost.replay + block.backward
            choices.append((_kept(block, name, offload), card.seconds(work) if card else work.flops, name))
        names = {name for _, _, name in choices}
        if policy is not None and choices:
            if policy not in names:
                raise WrongRequest(f"the policy must be one of {', '.join(block.policies)}, not {policy!r}")
            choices = [c for c in choices if c[2] == policy]
        key = (*choices, block.forward_peak, *((p.forward_peak, p.backward_peak) for p in block.policies.values()))
        classes.setdefault(key, []).append(i)
        options[key] = choices

    front: list[tuple[int, float, Any]] = [(0, 0.0, None)]
    for key, members in classes.items():
        if options[key]:
            for _ in members:
                front = _unbeaten(
                    [(b + ob, s + os, (rest, name)) for b, s, rest in front for ob, os, name in options[key]]
                )

    constant = sum(card.seconds(b.forward) if card else b.forward.flops for b in costs.blocks)
    found = []
    for _, seconds, chain in front:
        names = []
        while chain is not None:
            chain, name = chain
            names.append(name)
        policies, names = [""] * len(costs.blocks), names[::-1]
        for key, members in classes.items():
            if options[key]:
                own, names = names[: len(members)], names[len(members) :]
                for i, name in zip(members, _mixed(own), strict=True):
                    policies[i] = name
        peak = max(sum(moment) for moment in _moments(costs, policies, offload))
        rounded = sum(n in b.policies and not b.policies[n].exact for b, n in zip(costs.blocks, policies, strict=True))
        found.append(Point(seconds + constant, peak, tuple(policies), rounded))
    found.sort()
    leanest, kept = math.inf, list[Point]()
    for point in found:  # the fastest first, then only what is leaner
        if point.peak < leanest:
            kept.append(point)
            leanest = point.peak
    last = len(kept) - 1
    return [kept[round(i * last / 63)] for i in range(64)] if last > 63 else kept


def _unbeaten(found: list[tuple[int, float, Any]]) -> list[tuple[int, float, Any]]:
    """Those that no other beats in both bytes and seconds; of very many about `POINTS`."""
    found.sort(key=lambda f: f[:2])
    kept, fastest = list[tuple[int, float, Any]](), math.inf
    for option in found:
        if option[1] < fastest - 1e-12:
            kept.append(option)
            fastest = option[1]
    if len(kept) <= POINTS:
        return kept
    step = (kept[-1][0] - kept[0][0]) / POINTS
    thinned = kept[:1]
    for option, after in zip(kept[1:], [*kept[2:], None], strict=True):
        if after is None or int(after[0] / step) > int(option[0] / step):
            thinned.append(option)
    return thinned


def _mixed(names: Sequence[str]) -> list[str]:
    """`names` in an order in which each lies evenly among the others."""
    places = []
    for name in dict.fromkeys(names):
        number = names.count(name)
        places += [((i + 0.5) / number, name) for i in range(number)]
    return [name for _, name in sorted(places)]


def _kept(block: BlockCost, policy: str, offload: bool) -> int:
    return block.policies[policy].kept - (block.inputs if offload else 0)


def _moments(costs: Costs, policies: Sequence[str], offload: bool) -> Iterator[tuple[int, int, int]]:
    """(activations, workspace, gradients) in bytes while each block runs, forward and backward, and in the optimiser's
    step. Inputs that are on their way to or from the host take `BUFFERS` more places.
    """
    total = costs.gradients + sum(b.gradients for b in costs.blocks)
    before, gradients = 0, total if costs.accumulates else 0
    travelling = BUFFERS * max((b.inputs for b in costs.blocks), default=0) if offload else 0
    kept = []
    for block, policy in zip(costs.blocks, policies, strict=True):
        cost = block.policies.get(policy)
        peak, own = (cost.forward_peak, cost.kept) if cost else (block.forward_peak, 0)
        outputs = min(block.inputs, peak - own) if cost else 0  # what comes next keeps them
        yield before + own + outputs + travelling, peak - own - outputs, gradients
        kept.append(before)
        before += _kept(block, policy, offload) if cost else 0
    for block, policy, held in reversed([*zip(costs.blocks, policies, kept, strict=True)]):
        if cost := block.policies.get(policy):
            yield held + cost.kept + travelling, cost.backward_peak - cost.kept, gradients
            gradients += 0 if costs.accumulates else block.gradients
    yield 0, costs.optimiser_peak, total


def _visits(
    costs: Costs,
    forward: Sequence[float],
    backward: Sequence[Mapping[str, float]],
    policies: Sequence[str],
    offload: bool,
) -> list[Visit]:
    visits = []
    for block, seconds, policy in zip(costs.blocks, forward, policies, strict=True):
        visits.append(Visit(seconds, block.units, block.inputs if offload and policy else 0))
    for block, seconds, policy in reversed([*zip(costs.blocks, backward, policies, strict=True)]):
        if policy:
            visits.append(Visit(seconds[policy], block.units, 0, block.inputs if offload else 0))
    return visits


def _offloads(pins: Pins) -> tuple[bool, ...]:
    return (False, True) if pins.offload is None else (pins.offload,)


def _settings(costs: Costs, pins: Pins) -> list[Setting]:
    """Every combination of slots, resident units and look-ahead that the pins leave."""
    units = len(costs.units)
    numbers: Sequence[int] = sorted({*range(0, units, max(1, units // RESIDENTS)), units})
    if pins.resident_units is not None and pins.blocks_to_swap is not None:
        raise WrongRequest("--resident-units and --blocks-to-swap say the same thing; give one of them")
    if pins.resident_units is not None:
        if not 0 <= pins.resident_units <= units:
            raise WrongRequest(f"--resident-units must be 0 to {units}, not {pins.resident_units}")
        numbers = (pins.resident_units,)
    if pins.blocks_to_swap is not None:
        if not 0 <= 2 * pins.blocks_to_swap <= units:
            raise WrongRequest(f"--blocks-to-swap must be 0 to {units // 2}, not {pins.blocks_to_swap}")
        numbers = (units - 2 * pins.blocks_to_swap,)
    batch = int(str(costs.about.get("batch", 1)))
    ahead = max(1, AHEAD // batch) if costs.ahead else 0
    blocks, found = [b.units for b in costs.blocks], []
    for number in numbers:
        chosen = spread(blocks, number)
        resident = tuple(u for u in costs.units if u in chosen)
        fewest = max(2, max((len(set(b) - set(resident)) for b in blocks), default=0))
        if pins.slots is not None and pins.slots < fewest:
            raise WrongRequest(f"--slots must be at least {fewest}: a block needs so many units at once")
        wanted = {max(s, fewest) for s in ((pins.slots,) if pins.slots else SLOTS)}
        streams = number < units
        slots = {min(s, max(units - number - 1, fewest)) for s in wanted} if streams else {2 if costs.ahead else 0}
        found += [Setting(s, resident, ahead) for s in sorted(slots)]
    return found


def _fixed(costs: Costs, setting: Setting) -> int:
    """Bytes on the card that are there all the time."""
    held = sum(costs.units[u] for u in setting.resident) + setting.slots * costs.slot
    return held + costs.stays + costs.lora + costs.optimiser + costs.scratch + costs.ahead_step


def _bytes_moved(costs: Costs, setting: Setting, offload: bool) -> int:
    """The fewest bytes that a step copies to the card: all streamed units each way, but for those that a turn finds in
    the slots.
    """
    resident = set(setting.resident)
    forward = sorted(size for u, size in costs.units.items() if u not in resident)
    trained = {u for b in costs.blocks if b.policies for u in b.units}
    back = sum(size for u, size in costs.units.items() if u not in resident and u in trained)
    spared = 2 * sum(forward[-setting.slots :]) if setting.slots else 0
    inputs = sum(b.inputs for b in costs.blocks if b.policies) if offload else 0
    return max(0, sum(forward) + back - spared) + inputs


def _ahead_seconds(costs: Costs, card: Card, setting: Setting) -> float:
    """A step's share of the pass that computes modulation ahead, which waits for the bus or for memory."""
    if not setting.ahead:
        return 0.0
    total = sum(costs.ahead.values())
    return total / min(card.bus_gb_s * 1e9, card.memory_gb_s * 1e9 * card.efficiency.memory) / setting.ahead


def _host(costs: Costs, offload: bool) -> int:
    """Bytes of RAM: the arena with all units, and the inputs that wait there."""
    inputs = sum(b.inputs for b in costs.blocks if b.policies) if offload else 0
    rows = AHEAD * costs.ahead_step // int(str(costs.about.get("batch", 1))) if costs.ahead else 0
    return HOST + sum(costs.units.values()) + sum(costs.ahead.values()) + rows + inputs


def _what_would_fit(
    tables: Sequence[Costs],
    card: Card,
    vram: int,
    ram: int | None,
    pins: Pins,
    smaller: Mapping[str, Sequence[Costs]],
    margin: int,
) -> str:
    """Why nothing fits, and what would."""
    hosts = {t.format: _host(t, False) for t in tables}
    if ram is not None and min(hosts.values()) > ram:
        lean = min(hosts, key=hosts.__getitem__)
        return (
            f"the frozen weights need {gib(hosts[lean])} of RAM in {lean}, and {gib(ram)} are allowed; raise --ram, "
            "or close other programs"
        )
    needed = min(least(t, pins, margin) for t in tables)
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
    return f"this needs at least {gib(needed)} of the card, and {gib(vram)} are allowed; what would do: {would}"
