"""When GPU memory runs out: repeat the same work with the next smaller plan.

Plans differ in where data is stored and what is recomputed, never in the result; and all random numbers are addressed
by step. So repeated work gives bit for bit the result that it would have given with more memory. (Only keep_all8
rounds: a plan without it is never replaced by one with it.)

If memory ran out outside torch's allocator, which may hold memory that it does not use, the same plan gets a second try
with that given back. So does the smallest plan.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch

from fluxq.console import Notify
from fluxq.errors import WrongRequest, first_line, from_allocator, is_out_of_memory
from fluxq.formats.stream import expect_training
from fluxq.model.flux import Flux
from fluxq.models.parts import Models
from fluxq.offload import spread
from fluxq.offload.costs import Costs
from fluxq.offload.inputs import inputs_for
from fluxq.offload.planner import STEP_MARGIN, plan
from fluxq.offload.plans import Pins, Plan, counted

from .placement import Placement, placement_of

T = TypeVar("T")
LOWER_POLICY = {
    "keep_all": "keep_qkv",
    "keep_all8": "keep_qkv",
    "keep_qkv": "keep_attention",
    "keep_attention": "recompute",
}
"""Policy -> the next one that keeps less and does not round."""

SHRINK = 0.95
"""The next plan's predicted memory is at most this fraction of the last one's."""


def repeated_once(what: str, notify: Notify, work: Callable[..., T], *arguments: Any) -> T:
    """work(*arguments), which is repeated once if memory runs out, with what torch did not use given back.

    For work before the first step, which no smaller plan would help. It must not depend on what its failed attempt left
    behind.
    """
    try:
        return work(*arguments)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        notify(f"out of memory while {what} ({first_line(error)}); repeating with the memory that torch did not use")
    _empty_cache()
    return work(*arguments)


class OutOfMemoryRetry:
    """Runs work on `flux`, which `models` has loaded according to `placement`, with ever smaller placements if memory
    runs out. `ahead`: see Models.load_flux.

    placement: that of training, which work without a backward pass leaves alone: if a preview needs a smaller one, only
    previews and validation get it.
    """

    def __init__(self, placement: Placement, models: Models, flux: Flux, ahead: bool, notify: Notify) -> None:
        self.placement, self._models, self._flux, self._ahead, self._notify = placement, models, flux, ahead, notify
        self._placed: tuple | None = (placement.resident, placement.slots)
        self._forward_only: Placement | None = None  # if that is smaller than `placement`

    def run(self, what: str, work: Callable[[], T], training: bool = True) -> T:
        """The result of work(), repeated with smaller plans if memory runs out.

        training: the work has a backward pass. The work must not depend on what its failed attempt left behind;
        gradients are dropped. Raises torch.OutOfMemoryError if there is no smaller plan.
        """
        placement, repeated = (None if training else self._forward_only) or self.placement, False
        while True:
            try:
                self._apply(placement)
                return work()
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                reason, outside = first_line(error), not from_allocator(error)
            # After the except block the traceback is gone, and with it every tensor that the work had created.
            self._free()
            lower = None
            if repeated or not outside:
                lower = smaller_placement(placement, self._flux.blocks_units, training, self._models.can_stream)
            if lower is not None:
                described = describe_placement(lower, self._flux.blocks_units)
                self._notify(f"out of memory in {what} ({reason}); repeating with {described}")
                placement, repeated = lower, False
                if training:
                    self.placement, self._forward_only = lower, None
                else:
                    self._forward_only = lower
            elif not repeated:
                self._notify(f"out of memory in {what} ({reason}); repeating with the memory that torch did not use")
                repeated = True
            else:
                raise torch.OutOfMemoryError(
                    f"in {what} even the smallest plan needs too much memory; the last save is good, continue from it "
                    f"with --resume: {reason}"
                )

    def _apply(self, target: Placement) -> None:
        """Make the model match `target`."""
        flux = self._flux
        flux.set_policy(target.policies)
        if target.offload != (flux.inputs is not None):
            flux.inputs = inputs_for(flux.device, self._notify) if target.offload else None
        if self._placed != (target.resident, target.slots):
            self._placed = None  # if placing fails, the units are in no known state
            units = [unit for block in flux.blocks_units for unit in block]
            resident = units if target.resident is None else target.resident
            self._models.place_units(flux, resident, target.slots, self._ahead)
            expect_training(flux)
            self._placed = (target.resident, target.slots)

    def _free(self) -> None:
        for parameter in self._flux.parameters():
            parameter.grad = None
        if self._flux.inputs is not None:
            self._flux.inputs.release()
        _empty_cache()


def _empty_cache() -> None:
    """Give back to the driver what nothing uses, garbage included."""
    gc.collect()
    torch.cuda.empty_cache()  # does nothing without a GPU


def smaller_placement(
    placement: Placement, blocks: Sequence[Sequence[str]], training: bool, can_stream: bool
) -> Placement | None:
    """The next placement that needs less GPU memory; None if there is none. Format and compute do not change.

    A planned run gets a new, smaller plan. A pinned placement goes down a ladder: lower policies, block inputs in RAM,
    fewer resident units, fewer slots; without a backward pass blocks keep nothing, so only units and slots.
    can_stream: the units can be streamed.
    """
    if training and placement.plan and placement.budget:
        lower_plan = smaller_plan(placement, can_stream)
        return lower_plan and placement_of(lower_plan, placement.budget)
    unplanned = replace(placement, plan=None, budget=None)  # their predictions no longer apply
    if training:
        each = [placement.policies] * len(blocks) if isinstance(placement.policies, str) else placement.policies
        lower = tuple(LOWER_POLICY.get(policy, policy) for policy in each)
        if lower != tuple(each):
            return replace(unplanned, policies=lower)
        if not placement.offload:
            return replace(unplanned, offload=True)
    count = sum(map(len, blocks)) if placement.resident is None else len(placement.resident)
    if can_stream and count:
        return replace(unplanned, resident=tuple(spread(blocks, count // 2)))
    if can_stream and placement.slots > (fewest := max(2, *map(len, blocks))):
        return replace(unplanned, slots=max(fewest, placement.slots // 2))
    return None


def smaller_plan(placement: Placement, can_stream: bool) -> Plan | None:
    """The fastest plan that needs less GPU memory: with the user's pins if possible, else without; or None."""
    old, budget = placement.plan, placement.budget
    assert old is not None and budget is not None
    costs, all_units = budget.costs, None if can_stream else len(budget.costs.units)
    if "keep_all8" not in old.policies:
        costs = without_rounding(costs)
    for pins in (budget.pins, Pins(old.format, old.compute)):
        if all_units is not None:
            pins = replace(pins, resident_units=all_units, blocks_to_swap=None)
        try:
            return plan([costs], budget.gpu, STEP_MARGIN + int(SHRINK * old.reserved), budget.ram, pins)
        except WrongRequest:
            continue
    return None


def without_rounding(costs: Costs) -> Costs:
    """`costs` without the policies that round."""
    blocks = (replace(b, policies={n: p for n, p in b.policies.items() if p.exact}) for b in costs.blocks)
    return replace(costs, blocks=tuple(blocks))


def describe_placement(placement: Placement, blocks: Sequence[Sequence[str]]) -> str:
    """`placement` in one line for the user."""
    total = sum(map(len, blocks))
    count = total if placement.resident is None else len(placement.resident)
    each = [placement.policies] * len(blocks) if isinstance(placement.policies, str) else placement.policies
    kept = ", ".join(f"{n} x {name}" for name, n in counted(each).items())
    units = f"{count} of {total} units resident" + (f" and {placement.slots} slots" if count < total else "")
    return f"{units}; blocks keep {kept or 'nothing'}, their inputs {'in RAM' if placement.offload else 'on the GPU'}"
