"""How much GPU and host memory a residency takes: for what, and when the peak is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .costs import BUFFERS, OWNERS, BlockCost, Costs
from .gpus import GIB

HOST = 3 * GIB
"""Bytes of RAM in addition to the weights: the program, its libraries, images read ahead."""


class Residency(NamedTuple):
    """The choices that do not depend on the policies: slots, resident units, and how many steps one pass ahead serves
    (0: none).
    """

    slots: int
    resident: tuple[str, ...]
    ahead: int


def peak_by_owner(costs: Costs, policies: Sequence[str], offload: bool, residency: Residency) -> dict[str, int]:
    """Owner -> bytes at the moment of the peak."""
    peak_bytes: dict[str, int] = dict.fromkeys(OWNERS, 0)
    peak_bytes["weights"] = costs.stays + sum(costs.units[u] for u in residency.resident)
    peak_bytes["slots"] = residency.slots * costs.slot
    peak_bytes["optimizer"] = costs.optimizer
    activations, workspace, gradients = max(memory_over_step(costs, policies, offload), key=sum)
    peak_bytes["lora"] = costs.lora + gradients
    peak_bytes["activations"] = activations
    peak_bytes["workspace"] = workspace + costs.scratch + costs.library + costs.ahead_step
    return peak_bytes


def fixed(costs: Costs, residency: Residency) -> int:
    """Bytes that are on the GPU all the time."""
    held = sum(costs.units[u] for u in residency.resident) + residency.slots * costs.slot
    return held + costs.stays + costs.lora + costs.optimizer + costs.scratch + costs.library + costs.ahead_step


def reserved(costs: Costs, residency: Residency, step: int) -> int:
    """Bytes that torch's allocator reserves if a step takes `step` bytes in addition to those of `fixed`.

    Those of cuBLAS are not among them: it has them before a plan is made, so they are no longer free.
    """
    more = costs.fragmentation.nbytes + int((1 + costs.fragmentation.fraction) * step)
    return fixed(costs, residency) - costs.library + more


def memory_over_step(costs: Costs, policies: Sequence[str], offload: bool) -> Iterator[tuple[int, int, int]]:
    """(activations, workspace, gradients) in bytes: while each block runs forward and backward, while results are
    computed ahead, and in the optimizer's step. Inputs in transit to or from the host take the space of `BUFFERS` more
    blocks.
    """
    total = costs.gradients + sum(b.gradients for b in costs.blocks)
    before, gradients = 0, total if costs.accumulates else 0
    in_transit = BUFFERS * max((b.inputs for b in costs.blocks), default=0) if offload else 0
    earlier = []
    for block, policy in zip(costs.blocks, policies, strict=True):
        cost = block.policies.get(policy)
        peak, own = (cost.forward_peak, cost.kept) if cost else (block.forward_peak, 0)
        outputs = min(block.inputs, peak - own) if cost else 0  # the next block keeps them
        yield before + own + outputs + in_transit, peak - own - outputs, gradients
        earlier.append(before)
        before += kept(block, policy, offload) if cost else 0
    for block, policy, held in reversed([*zip(costs.blocks, policies, earlier, strict=True)]):
        if cost := block.policies.get(policy):
            yield held + cost.kept + in_transit, cost.backward_peak - cost.kept, gradients
            gradients += 0 if costs.accumulates else block.gradients
    yield 0, costs.ahead_peak, total if costs.accumulates else 0
    yield 0, costs.optimizer_peak, total


def kept(block: BlockCost, policy: str, offload: bool) -> int:
    return block.policies[policy].kept - (block.inputs if offload else 0)


def host_bytes(costs: Costs, residency: Residency, offload: bool) -> int:
    """Bytes of RAM: the arena with the streamed units, and the inputs and results that are kept there."""
    arena = sum(costs.units.values()) - sum(costs.units[u] for u in residency.resident) + sum(costs.ahead.values())
    inputs = sum(b.inputs for b in costs.blocks if b.policies) if offload else 0
    return HOST + arena + residency.ahead * costs.ahead_step + inputs
