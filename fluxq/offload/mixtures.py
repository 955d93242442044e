"""Mixtures of policies over the blocks: those on the Pareto front of bytes and seconds.

Seconds are those of the GPU's work or those of Python's launches, whichever takes longer in the whole step. So there
are two fronts, one by each, and the best of both together.
"""

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
    """One assignment of policies to blocks: seconds of the blocks, on the GPU (gpu_seconds) or in Python, whichever
    takes longer; peak bytes (activations, workspace and the gradients that exist by then), each block's policy, and how
    many blocks round what they keep.
    """

    seconds: float
    peak: int
    policies: tuple[str, ...]
    rounded: int = 0
    gpu_seconds: float = 0.0


Option = tuple[int, float, float, str]
"""What a policy costs a block: bytes kept, seconds of the GPU backward, seconds of Python, and its name."""


def points(costs: Costs, gpu: GPU | None, policy: str | None, offload: bool) -> list[Point]:
    """The Pareto-optimal assignments in seconds and bytes, the fastest first.

    Blocks that cost the same form a group; only the number of blocks with each policy matters there, and policies are
    interleaved evenly. Without a GPU only the leanest assignment matters, and seconds are FLOPs.
    """
    groups = _groups(costs, gpu, policy, offload)
    forward = sum(gpu.seconds(b.forward) if gpu else b.forward.flops for b in costs.blocks)
    untrained = 1e-6 * gpu.launch_us * sum(b.launches for b in costs.blocks if not b.policies) if gpu else 0.0
    mixtures = _front(groups, 1)
    if any(s + forward < p + untrained for _, s, p, _ in mixtures):  # Python may be the limit
        mixtures += _front(groups, 2)
    leanest, best = math.inf, list[Point]()
    found = [
        _point(costs, groups, max(s + forward, p + untrained), s + forward, chain, offload)
        for _, s, p, chain in mixtures
    ]
    for point in sorted(found):
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
        own = list[Option]()
        for name, cost in block.policies.items():
            work, launch = cost.replay + block.backward, 1e-6 * gpu.launch_us * cost.launches if gpu else 0.0
            own.append((kept(block, name, offload), gpu.seconds(work) if gpu else work.flops, launch, name))
        if policy is not None and own:
            own = [option for option in own if option[-1] == policy]
            if not own:
                raise WrongRequest(f"the policy must be one of {', '.join(block.policies)}, not {policy!r}")
        key = (*own, block.forward_peak, *((p.forward_peak, p.backward_peak) for p in block.policies.values()))
        if own:
            members.setdefault(key, []).append(number)
            options[key] = own
    return [(members[key], options[key]) for key in members]


def _point(
    costs: Costs,
    groups: Sequence[tuple[list[int], list[Option]]],
    seconds: float,
    gpu_seconds: float,
    chain: Any,
    offload: bool,
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
    return Point(seconds, peak, tuple(policies), rounded, gpu_seconds)


Mixture = tuple[int, float, float, Any]
"""Bytes kept, seconds of the GPU and of Python, and the policies as `_point` reads them."""


def _front(groups: Sequence[tuple[list[int], list[Option]]], by: int) -> list[Mixture]:
    """The mixtures that no other beats in both bytes and seconds: of the GPU (`by` 1) or of Python (2)."""
    front: list[Mixture] = [(0, 0.0, 0.0, None)]
    for members, options in groups:
        for _ in members:
            front = [(b + ob, s + os, p + op, (rest, name)) for b, s, p, rest in front for ob, os, op, name in options]
            front = _pareto_front(front, by)
    return front


def _pareto_front(options: list[Mixture], by: int) -> list[Mixture]:
    """The options that no other beats in both bytes and seconds `by`, thinned to about `POINTS`."""
    options.sort(key=lambda option: (option[0], option[by], option[1]))
    front, fastest = list[Mixture](), math.inf
    for option in options:
        if option[by] < fastest - 1e-12:
            front.append(option)
            fastest = option[by]
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
