"""Mixtures of policies over the blocks: those on the Pareto front of bytes and seconds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from fluxq.errors import WrongRequest

from .costs import Costs
from .footprint import kept, memory_over_step
from .gpus import GPU

POINTS = 250
"""How many mixtures are kept while the front is built, spaced evenly in bytes; it is then thinned to 64."""


class Point(NamedTuple):
    """One assignment of policies to blocks: seconds of the blocks' compute, peak bytes (activations, workspace and the
    gradients that exist by then), each block's policy, and how many blocks round what they keep.
    """

    seconds: float
    peak: int
    policies: tuple[str, ...]
    rounded: int = 0


Option = tuple[int, float, str]
"""What a policy costs a block: bytes kept, seconds backward, and its name."""


def points(costs: Costs, gpu: GPU | None, policy: str | None, offload: bool) -> list[Point]:
    """The Pareto-optimal assignments in seconds and bytes, the fastest first.

    Blocks that cost the same form a group; only the number of blocks with each policy matters there, and policies are
    interleaved evenly. Without a GPU only the leanest assignment matters, and seconds are FLOPs.
    """
    groups = _groups(costs, gpu, policy, offload)
    front: list[tuple[int, float, Any]] = [(0, 0.0, None)]
    for members, options in groups:
        for _ in members:
            front = _pareto_front([(b + ob, s + os, (rest, name)) for b, s, rest in front for ob, os, name in options])

    forward = sum(gpu.seconds(b.forward) if gpu else b.forward.flops for b in costs.blocks)
    leanest, best = math.inf, list[Point]()
    for point in sorted(_point(costs, groups, s + forward, chain, offload) for _, s, chain in front):
        if point.peak < leanest:  # the fastest first, then only leaner ones
            best.append(point)
            leanest = point.peak
    last = len(best) - 1
    return [best[round(i * last / 63)] for i in range(64)] if last > 63 else best


def _groups(costs: Costs, gpu: GPU | None, policy: str | None, offload: bool) -> list[tuple[list[int], list[Option]]]:
    """The trained blocks, by number, grouped by equal cost, with their options."""
    members: dict[tuple[Any, ...], list[int]] = {}
    options: dict[tuple[Any, ...], list[Option]] = {}
    for number, block in enumerate(costs.blocks):
        own = []
        for name, cost in block.policies.items():
            work = cost.replay + block.backward
            own.append((kept(block, name, offload), gpu.seconds(work) if gpu else work.flops, name))
        if policy is not None and own:
            own = [option for option in own if option[2] == policy]
            if not own:
                raise WrongRequest(f"the policy must be one of {', '.join(block.policies)}, not {policy!r}")
        key = (*own, block.forward_peak, *((p.forward_peak, p.backward_peak) for p in block.policies.values()))
        if own:
            members.setdefault(key, []).append(number)
            options[key] = own
    return [(members[key], options[key]) for key in members]


def _point(
    costs: Costs, groups: Sequence[tuple[list[int], list[Option]]], seconds: float, chain: Any, offload: bool
) -> Point:
    """The point of a mixture. `chain`: (the mixture without its last name, that name), over all members in order."""
    names = []
    while chain is not None:
        chain, name = chain
        names.append(name)
    policies, names = [""] * len(costs.blocks), names[::-1]
    for members, _ in groups:
        own, names = names[: len(members)], names[len(members) :]
        for number, name in zip(members, _interleaved(own), strict=True):
            policies[number] = name
    peak = max(sum(moment) for moment in memory_over_step(costs, policies, offload))
    rounded = sum(n in b.policies and not b.policies[n].exact for b, n in zip(costs.blocks, policies, strict=True))
    return Point(seconds, peak, tuple(policies), rounded)


def _pareto_front(options: list[tuple[int, float, Any]]) -> list[tuple[int, float, Any]]:
    """The options that no other beats in both bytes and seconds, thinned to about `POINTS`."""
    options.sort(key=lambda option: option[:2])
    front, fastest = list[tuple[int, float, Any]](), math.inf
    for option in options:
        if option[1] < fastest - 1e-12:
            front.append(option)
            fastest = option[1]
    if len(front) <= POINTS:
        return front
    step = (front[-1][0] - front[0][0]) / POINTS
    thinned = front[:1]
    for option, after in zip(front[1:], [*front[2:], None], strict=True):
        if after is None or int(after[0] / step) > int(option[0] / step):
            thinned.append(option)
    return thinned


def _interleaved(names: Sequence[str]) -> list[str]:
    """`names`, reordered so that each is spread evenly among the others."""
    places = []
    for name in dict.fromkeys(names):
        number = names.count(name)
        places += [((i + 0.5) / number, name) for i in range(number)]
    return [name for _, name in sorted(places)]
