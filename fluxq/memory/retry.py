"""What a run does when memory runs out: the same work once more, under the next smaller plan.

Plans differ in where things lie and in what is computed again, never in what comes out; and whatever is random is
addressed by its step. So work that is repeated gives, bit for bit, what it would have given with more memory. (Only
keep_all8 rounds: a plan without it never turns into one with it.)
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch

from fluxq.errors import WrongRequest
from fluxq.formats.stream import expect_training
from fluxq.model.flux import Flux
from fluxq.models.parts import Models
from fluxq.offload import spread
from fluxq.offload.costs import Costs
from fluxq.offload.inputs import inputs_for
from fluxq.offload.planner import MARGIN, plan
from fluxq.offload.plans import Pins, Plan, counted

from .placement import Placement, placed

T = TypeVar("T")
LOWER = {"keep_all": "keep_qkv", "keep_all8": "keep_qkv", "keep_qkv": "keep_attention", "keep_attention": "recompute"}
"""Policy -> the next that keeps less and rounds nothing."""

SMALLER = 0.95
"""The next plan's predicted peak is at most so much of the last one's."""


class OutOfMemoryRetry:
    """The memory of a run: `flux`, which `models` has loaded as `placement` says, and what is done where that is too
    much. `ahead`: see Models.load_flux.
    """

    def __init__(
        self, placement: Placement, models: Models, flux: Flux, ahead: bool, notify: Callable[[str], None]
    ) -> None:
        self.placement, self._models, self._flux, self._ahead, self._notify = placement, models, flux, ahead, notify
        self._placed: tuple | None = (placement.resident, placement.slots)

    def run(self, what: str, work: Callable[[], T], training: bool = True) -> T:
        """work(), again under smaller plans where memory runs out. Raises torch.OutOfMemoryError when there is none.

        training: it has a backward pass. What it had made before must not matter to it: gradients are dropped.
        """
        while True:
            try:
                self._apply()
                return work()
            except torch.OutOfMemoryError as error:
                reason = str(error).split(". ")[0]
            # Out here the traceback is gone, and with it all that the work had made.
            self._free()
            found = smaller(self.placement, self._flux.blocks_units, training, self._models.streams)
            if found is None:
                raise torch.OutOfMemoryError(
                    f"in {what} even the smallest plan was too much; what was saved last is good, and --resume goes on "
                    f"from there: {reason}"
                )
            self._notify(f"out of memory in {what} ({reason}); again with {described(found, self._flux.blocks_units)}")
            self.placement = found

    def _apply(self) -> None:
        """Have the model as `placement` says, where it is not."""
        flux, to = self._flux, self.placement
        flux.set_policy(to.policies)
        if to.offload != (flux.inputs is not None):
            flux.inputs = inputs_for(flux.device, self._notify) if to.offload else None
        if self._placed != (to.resident, to.slots):
            self._placed = None  # should it fail, nothing is where it was
            units = [unit for block in flux.blocks_units for unit in block]
            self._models.place_units(flux, units if to.resident is None else to.resident, to.slots, self._ahead)
            expect_training(flux)
            self._placed = (to.resident, to.slots)

    def _free(self) -> None:
        for parameter in self._flux.parameters():
            parameter.grad = None
        if self._flux.inputs is not None:
            self._flux.inputs.release()
        gc.collect()
        if self._flux.device.type == "cuda":
            torch.cuda.empty_cache()


def smaller(placement: Placement, blocks: Sequence[Sequence[str]], training: bool, streams: bool) -> Placement | None:
    """The next placement that takes less of the GPU; None where there is none. Formats and arithmetic stay.

    A plan is made anew, for less. What was placed by hand goes down a ladder: policies, block inputs to the host, fewer
    resident units, fewer slots. Without a backward pass, where blocks keep nothing, units and slots alone. streams:
    units can be streamed.
    """
    if training and placement.plan and placement.budget:
        found = smaller_plan(placement, streams)
        return found and placed(found, placement.budget)
    bare = replace(placement, plan=None, budget=None)  # their figures are no longer its own
    if training:
        each = [placement.policies] * len(blocks) if isinstance(placement.policies, str) else placement.policies
        lower = tuple(LOWER.get(policy, policy) for policy in each)
        if lower != tuple(each):
            return replace(bare, policies=lower)
        if not placement.offload:
            return replace(bare, offload=True)
    count = sum(map(len, blocks)) if placement.resident is None else len(placement.resident)
    if streams and count:
        return replace(bare, resident=tuple(spread(blocks, count // 2)))
    if streams and placement.slots > (fewest := max(2, *map(len, blocks))):
        return replace(bare, slots=max(fewest, placement.slots // 2))
    return None


def smaller_plan(placement: Placement, streams: bool) -> Plan | None:
    """The fastest plan that needs less of the GPU, with what the user pinned if there is one, else without."""
    made, budget = placement.plan, placement.budget
    assert made is not None and budget is not None
    costs, everything = budget.costs, None if streams else len(budget.costs.units)
    if "keep_all8" not in made.policies:
        costs = exactly(costs)
    for pins in (budget.pins, Pins(made.format, made.compute)):
        if everything is not None:
            pins = replace(pins, resident_units=everything, blocks_to_swap=None)
        try:
            return plan([costs], budget.gpu, MARGIN + int(SMALLER * made.peak_bytes), budget.ram, pins)
        except WrongRequest:
            continue
    return None


def exactly(costs: Costs) -> Costs:
    """`costs` without policies that round."""
    blocks = (replace(b, policies={n: p for n, p in b.policies.items() if p.exact}) for b in costs.blocks)
    return replace(costs, blocks=tuple(blocks))


def described(placement: Placement, blocks: Sequence[Sequence[str]]) -> str:
    """In a line."""
    total = sum(map(len, blocks))
    count = total if placement.resident is None else len(placement.resident)
    each = [placement.policies] * len(blocks) if isinstance(placement.policies, str) else placement.policies
    kept = ", ".join(f"{n} x {name}" for name, n in counted(each).items())
    units = f"{count} of {total} units resident" + (f" and {placement.slots} slots" if count < total else "")
    return f"{units}; blocks keep {kept or 'nothing'}, their inputs on the {'host' if placement.offload else 'GPU'}"
