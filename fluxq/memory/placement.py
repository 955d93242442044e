"""What a run may use of GPU and host, and the plan that keeps to it.

On a GPU the plan is made before anything is loaded: by the planner (fluxq/offload/planner.py) from the model's costs,
the GPU as it was measured, and what the user pinned. On a CPU nothing is predicted: everything stays where it
is, unless streaming is asked for, which is how it is tried out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from fluxq.config import DEFAULT_RANK, DEFAULT_TARGETS, MemoryConfig, TrainConfig
from fluxq.errors import WrongRequest
from fluxq.formats.atomic import atomic_path
from fluxq.formats.quantized import cache_folder
from fluxq.kernels.cutting import chunk_of
from fluxq.model import Flux, FluxConfig
from fluxq.model.costs import flux_costs
from fluxq.models.parts import Models
from fluxq.offload import spread
from fluxq.offload.costs import Costs
from fluxq.offload.gpus import GPU, measure
from fluxq.offload.planner import plan
from fluxq.offload.plans import Pins, Plan, describe

from .machine import free_gpu_bytes, memory

SLOTS = 8
SMALLER_SIZES = (768, 512, 256)
UNITS = {"": 2**30, "g": 2**30, "gib": 2**30, "gb": 10**9, "m": 2**20, "mib": 2**20, "mb": 10**6}


@dataclass(frozen=True)
class Budget:
    """What a plan is made from beside the GPU's bytes: a step's costs, the GPU, bytes of RAM, the user's pins."""

    costs: Costs
    gpu: GPU
    ram: int | None
    pins: Pins


@dataclass(frozen=True)
class Placement:
    """Where frozen weights are and what blocks keep. resident: the units that stay on the GPU, None for all; slots:
    for the others; policies: one for every block, or one for each; offload: block inputs wait on the host.
    `plan` and `budget`: what they come from, if a plan was made.
    """

    resident: tuple[str, ...] | None = None
    slots: int = SLOTS
    policies: str | tuple[str, ...] = "recompute"
    offload: bool = False
    plan: Plan | None = None
    budget: Budget | None = None

    def save(self, folder: Path) -> None:
        """Write plan.json: the plan with its predictions, or the bare choices."""
        bare = {name: getattr(self, name) for name in ("resident", "slots", "policies", "offload")}
        content = self.plan.to_json() if self.plan else {"predicted": False, **bare}
        with atomic_path(folder / "plan.json") as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def place(config: TrainConfig, models: Models, notify: Callable[[str], None]) -> Placement:
    """Where the frozen weights of a resolved run go. Raises WrongRequest where nothing fits what it may use, and says
    what would.
    """
    wishes = config.memory
    vram, ram = nbytes(wishes.vram, "--vram"), nbytes(wishes.ram, "--ram")
    if models.device.type != "cuda":
        if vram or ram:
            raise WrongRequest("--vram and --ram plan for a CUDA GPU, and this machine has none; leave them out")
        policies = wishes.policy or ("keep_all" if models.is_nano else "recompute")
        resident = pinned_residents(wishes, models)
        return Placement(resident, wishes.slots or SLOTS, policies, bool(wishes.offload))
    pins = Pins(
        format=models.format,
        compute=models.compute,
        resident_units=wishes.resident_units,
        blocks_to_swap=wishes.blocks_to_swap,
        policy=wishes.policy or ("keep_all" if models.is_nano else None),
        slots=wishes.slots,
        offload=wishes.offload,
    )
    size = config.data.resolution or 0
    smaller = {f"--resolution {s}": [costs_of(config, models, s)] for s in SMALLER_SIZES if s < size}
    budget = Budget(costs_of(config, models, size), measure(cache_folder()), ram or (memory() or (0, None))[1], pins)
    found = plan([budget.costs], budget.gpu, vram or free_gpu_bytes(), budget.ram, pins, smaller)
    notify(describe(found))
    return placed(found, budget)


def placed(found: Plan, budget: Budget) -> Placement:
    """The placement that a plan says."""
    return Placement(found.placed, found.slots, found.policies, found.offload, found, budget)


def choose_format(config: TrainConfig, models: Models) -> Plan:
    """The plan of a run whose format is left open: the most faithful of those that are as fast as any on this GPU.

    Candidates are nf4, 8 bits and bf16, as far as the disk has room for the quantized file. 8 bits are int8, which
    rounds a third as much as fp8 does and takes as much room, but where fp8 is what is multiplied.
    """
    wishes, eight_bits = config.memory, "fp8" if models.compute.startswith("fp8") else "int8"
    pins = Pins(
        resident_units=wishes.resident_units,
        blocks_to_swap=wishes.blocks_to_swap,
        policy=wishes.policy,
        slots=wishes.slots,
        offload=wishes.offload,
    )
    formats = [format for format in ("nf4", eight_bits, "bf16") if models.has_room_for(format)]
    tables = [costs_of(config, models, config.data.resolution or 0, format) for format in formats or ["nf4"]]
    vram, ram = nbytes(wishes.vram, "--vram"), nbytes(wishes.ram, "--ram")
    return plan(tables, measure(cache_folder()), vram or free_gpu_bytes(), ram or (memory() or (0, None))[1], pins)


def costs_of(config: TrainConfig, models: Models, size: int, format: str | None = None) -> Costs:
    """The table of costs of a run's steps with images of the area of size x size pixels, on the GPU at hand."""
    training = config.training
    return flux_costs(
        models.flux_config,
        format or models.format,
        models.compute,
        config.lora.rank or DEFAULT_RANK,
        config.lora.targets or DEFAULT_TARGETS,
        training.batch,
        (size // 16) ** 2,
        models.t5_length,
        training.optimizer,
        training.accumulate > 1,
        chunk_of(measure(cache_folder()).capability),
        models.open("clip_l").shapes if config.lora.text_encoder else None,
    )


def pinned_residents(wishes: MemoryConfig, models: Models) -> tuple[str, ...] | None:
    """The units that stay where the user said how many, None for all of them."""
    blocks = blocks_units(models.flux_config)
    total = sum(map(len, blocks))
    count = Pins(resident_units=wishes.resident_units, blocks_to_swap=wishes.blocks_to_swap).resident(total)
    return None if count in (None, total) else tuple(spread(blocks, count))


def blocks_units(config: FluxConfig) -> tuple[tuple[str, ...], ...]:
    with torch.device("meta"):
        return Flux(config).blocks_units


def nbytes(text: str | None, option: str) -> int | None:
    """Bytes from a text like 12GiB, 11.5 or 8000MB; a bare number is GiB."""
    if text is None:
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(text).lower())
    if found is None or found[2] not in UNITS:
        raise WrongRequest(f"{option} must be an amount of memory like 12GiB, not {text!r}")
    return int(float(found[1]) * UNITS[found[2]])
