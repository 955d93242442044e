"""A plan: all choices for a training step and its predictions, as data, as a table to read and as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fluxq.errors import WrongRequest

from .footprint import Residency
from .gpus import GIB


@dataclass(frozen=True)
class Pins:
    """What the user has pinned. resident_units, or blocks_to_swap N: 2 N units are streamed (sd-scripts' option)."""

    format: str | None = None
    compute: str | None = None
    resident_units: int | None = None
    blocks_to_swap: int | None = None
    policy: str | None = None
    slots: int | None = None
    offload: bool | None = None

    def resident(self, units: int) -> int | None:
        """How many of `units` stay on the GPU, None if unset. Raises WrongRequest for impossible numbers."""
        if self.resident_units is not None and self.blocks_to_swap is not None:
            raise WrongRequest("--resident-units and --blocks-to-swap set the same thing; pass only one of them")
        if self.resident_units is not None and not 0 <= self.resident_units <= units:
            raise WrongRequest(
                f"--resident-units must be 0 to {units}, not {self.resident_units}: the model has {units} units"
            )
        if self.blocks_to_swap is None:
            return self.resident_units
        if not 0 <= 2 * self.blocks_to_swap <= units:
            raise WrongRequest(
                f"--blocks-to-swap must be 0 to {units // 2}, not {self.blocks_to_swap}: this model has {units} units, "
                "two per block"
            )
        return units - 2 * self.blocks_to_swap


@dataclass(frozen=True)
class Plan:
    """All choices for a training step, and its predictions.

    resident: units that always stay on the GPU; slots: for the others; policies: of each block, "" if it has no
    backward pass; offload: block inputs are kept on the host; tiles: rows that the autoencoder decodes at a time for a
    preview, in the memory of a step's temporaries, None for all; look_ahead: steps whose modulation is computed in one
    pass, 0 if it is part of the step. peak: bytes by owner at the moment of the peak; reserved: bytes that torch's
    allocator takes for them; seconds: per step, on the GPU (gpu_seconds, of which `stall` are spent waiting for copies)
    or in Python (launching: it launches so many kernels), whichever takes longer; moved: bytes copied to the GPU per
    step; host: bytes of RAM.
    """

    format: str
    compute: str
    slots: int
    resident: tuple[str, ...]
    streamed: int
    policies: tuple[str, ...]
    offload: bool
    tiles: int | None
    look_ahead: int
    peak: Mapping[str, int]
    reserved: int
    seconds: float
    stall: float
    moved: int
    gpu_seconds: float
    launches: int
    launching: float
    host: int
    gpu: str
    vram: int
    about: Mapping[str, object] = field(default_factory=dict)

    @property
    def placed(self) -> tuple[str, ...] | None:
        """The resident units, or None if there are no slots and all weights stay on the GPU."""
        return self.resident if self.slots else None

    @property
    def residency(self) -> Residency:
        """The choices that do not depend on the policies."""
        return Residency(self.slots, self.resident, self.look_ahead)

    @property
    def peak_bytes(self) -> int:
        return sum(self.peak.values())

    @property
    def bound(self) -> str:
        """What limits the step: "compute", "bus" or "python"."""
        if self.launching > self.gpu_seconds:
            return "python"
        return "bus" if self.stall > 0.05 * self.seconds else "compute"

    def to_json(self) -> dict[str, Any]:
        """The content of plan.json."""
        return {"predicted": True, **asdict(self), "peak_bytes": self.peak_bytes, "bound": self.bound}


LIMITS = {
    "compute": "compute",
    "bus": "the bus",
    "python": "Python: the GPU would be faster, but waits for its kernels to be launched",
}


def gib(nbytes: float) -> str:
    return f"{nbytes / GIB:.1f} GiB"


def gib_up(nbytes: float) -> str:
    return f"{math.ceil(nbytes / GIB * 10) / 10:.1f}GiB"


def describe(plan: Plan) -> str:
    """The plan as a table for people to read."""
    units = len(plan.resident) + plan.streamed
    rows = [
        ("weights", f"{plan.format}, multiplied in {plan.compute}"),
        ("units", f"{len(plan.resident)} of {units} resident, {plan.streamed} streamed through {plan.slots} slots"),
        ("blocks keep", ", ".join(f"{n} x {name}" for name, n in counted(plan.policies).items()) or "nothing"),
        ("block inputs", "in RAM" if plan.offload else "on the GPU"),
        ("modulation", f"{plan.look_ahead} steps ahead" if plan.look_ahead else "in the step"),
        ("autoencoder", "whole" if plan.tiles is None else f"{plan.tiles} rows at a time"),
        ("peak, predicted", f"{gib(plan.peak_bytes)} of {gib(plan.vram)}"),
        *((f"  {owner}", gib(nbytes)) for owner, nbytes in plan.peak.items()),
        ("reserved, predicted", f"{gib(plan.reserved)}: the allocator needs more than is alive"),
        ("RAM, predicted", gib(plan.host)),
        ("copied per step", f"{plan.moved / 1e9:.1f} GB"),
        ("GPU, predicted", f"{plan.gpu_seconds:.2f} s on {plan.gpu}, {plan.stall / plan.gpu_seconds:.0%} of it waiting"
         " for copies"),
        ("Python, predicted", f"{plan.launching:.2f} s to launch {plan.launches:,} kernels"),
        ("step, predicted", f"{plan.seconds:.2f} s, limited by {LIMITS[plan.bound]}"),
    ]  # fmt: skip
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def counted(policies: Sequence[str]) -> dict[str, int]:
    """Policy -> how many blocks have it."""
    return {name: policies.count(name) for name in dict.fromkeys(policies) if name}
