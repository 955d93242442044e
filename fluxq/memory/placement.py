"""How much GPU memory and RAM a run may use, and a plan that fits.

On a GPU, the planner (fluxq/offload/planner.py) makes the plan before anything is loaded, from the model's costs, the
measured GPU, and the user's pins. On a CPU nothing is predicted: everything stays in place unless streaming is
requested, which allows trying it without a GPU.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fluxq.allocator import has_expandable_segments
from fluxq.config import DEFAULT_RANK, DEFAULT_TARGETS, MemoryConfig, TrainConfig, side_of
from fluxq.console import Notify, duration, plural
from fluxq.errors import WrongRequest
from fluxq.formats.atomic import atomic_path
from fluxq.formats.quantized import cache_folder
from fluxq.kernels.chunks import chunk_of
from fluxq.model import Flux, FluxConfig
from fluxq.model.costs import flux_costs
from fluxq.models.parts import Models
from fluxq.offload import spread
from fluxq.offload.costs import Costs
from fluxq.offload.gpus import GPU, measure
from fluxq.offload.planner import plan
from fluxq.offload.plans import Pins, Plan, describe

from .machine import free_gpu_bytes, ram_bytes
from .share import take_share

SLOTS = 8
PRESERVING = 2.4
"""How many times as long a step takes with --preserve-class, predicted: two steps, and the base model's forward pass,
which is a third of a step if blocks recompute, and half of one if they keep all."""
SMALLER_SIZES = (768, 512, 256)
UNITS = {"": 2**30, "g": 2**30, "gib": 2**30, "gb": 10**9, "m": 2**20, "mib": 2**20, "mb": 10**6}


@dataclass(frozen=True)
class Budget:
    """What a plan is made from, except the GPU memory: a step's costs, the GPU, bytes of RAM, and the user's pins."""

    costs: Costs
    gpu: GPU
    ram: int | None
    pins: Pins


@dataclass(frozen=True)
class Placement:
    """Where the frozen weights are, and what blocks keep for the backward pass.

    resident: the units that stay on the GPU, None for all; slots: for streaming the others; policies: one for all
    blocks, or one per block; offload: block inputs wait in RAM; plan and budget: where the above comes from, if a plan
    was made.
    """

    resident: tuple[str, ...] | None = None
    slots: int = SLOTS
    policies: str | tuple[str, ...] = "recompute"
    offload: bool = False
    plan: Plan | None = None
    budget: Budget | None = None

    def save(self, folder: Path) -> None:
        """Write plan.json: the plan with its predictions, or only the choices."""
        choices = {name: getattr(self, name) for name in ("resident", "slots", "policies", "offload")}
        content = self.plan.to_json() if self.plan else {"predicted": False, **choices}
        with atomic_path(folder / "plan.json") as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def place(config: TrainConfig, models: Models, notify: Notify) -> Placement:
    """The placement of a resolved run. Raises WrongRequest, with settings that would fit, if nothing fits."""
    memory_config = config.memory
    vram, ram = parse_bytes(memory_config.vram, "--vram"), parse_bytes(memory_config.ram, "--ram")
    if models.device.type != "cuda":
        if vram or ram:
            raise WrongRequest("--vram and --ram are for a CUDA GPU, and this machine has none; leave them out")
        policies = memory_config.policy or ("keep_all" if models.is_nano else "recompute")
        resident = pinned_residents(memory_config, models)
        return Placement(resident, memory_config.slots or SLOTS, policies, bool(memory_config.offload))
    if vram is None:
        take_share()
    pins = _pins(memory_config, format=models.format, compute=models.compute)
    if models.is_nano and pins.policy is None:
        pins = replace(pins, policy="keep_all")
    _, size = largest_batch(config, models)
    smaller = {f"--resolution {s}": [costs_of(config, models, s)] for s in SMALLER_SIZES if s < size}
    budget = Budget(costs_of(config, models, size), measure(cache_folder()), ram or (ram_bytes() or (0, None))[1], pins)
    chosen = plan([budget.costs], budget.gpu, vram or free_gpu_bytes(), budget.ram, pins, smaller)
    for line in describe(chosen).splitlines():
        notify(line)
    if steps := config.training.steps:
        preserves = config.training.preserve_class is not None
        took = duration(steps * config.training.accumulate * chosen.seconds * (PRESERVING if preserves else 1))
        notify(
            f"{plural(steps, 'step')} are predicted to take {took}, without previews, validation and saves"
            + (f"; without --preserve-class it would be {PRESERVING:g} times as fast" if preserves else "")
        )
    return placement_of(chosen, budget)


def placement_of(plan: Plan, budget: Budget) -> Placement:
    """The placement that `plan` describes."""
    return Placement(plan.placed, plan.slots, plan.policies, plan.offload, plan, budget)


def choose_format(config: TrainConfig, models: Models) -> Plan:
    """The plan of a run whose format is unset: the most accurate of the fastest formats on this GPU.

    Those that the disk has no room for are no candidates.
    """
    memory_config = config.memory
    pins = _pins(memory_config)
    formats = [format for format in candidates(models.compute) if models.fits_on_disk(format)]
    tables = [costs_of(config, models, largest_batch(config, models)[1], format) for format in formats or ["nf4"]]
    vram, ram = parse_bytes(memory_config.vram, "--vram"), parse_bytes(memory_config.ram, "--ram")
    if vram is None:
        take_share()
    return plan(tables, measure(cache_folder()), vram or free_gpu_bytes(), ram or (ram_bytes() or (0, None))[1], pins)


def _pins(config: MemoryConfig, **model: str) -> Pins:
    """What `config` says of a plan. model: the format and the compute, where they are fixed."""
    return Pins(
        resident_units=config.resident_units,
        blocks_to_swap=config.blocks_to_swap,
        policy=config.policy,
        slots=config.slots,
        offload=config.offload,
        **model,
    )


def candidates(compute: str) -> tuple[str, str, str]:
    """The formats to choose from: nf4, an 8-bit format and bf16. The 8-bit format is int8, which rounds a third as much
    as fp8 at the same size; it is fp8 if the matrix products are in fp8.
    """
    return "nf4", "fp8" if compute.startswith("fp8") else "int8", "bf16"


def largest_batch(config: TrainConfig, models: Models) -> tuple[int, int]:
    """The micro-batch with the most tokens: its images, and their side in pixels if they were squares."""
    batches = [(f.batch or config.training.batch, side_of(f.resolution)) for some in config.data.filled() for f in some]
    unset = config.training.batch, config.data.side
    return max(batches, key=lambda b: b[0] * ((b[1] // 16) ** 2 + models.text_tokens), default=unset)


def costs_of(config: TrainConfig, models: Models, size: int, format: str | None = None) -> Costs:
    """The costs of a run's steps on this machine's GPU, with images of the area of size x size pixels."""
    training, gpu = config.training, measure(cache_folder())
    return flux_costs(
        models.flux_config,
        format or models.format,
        models.compute,
        config.lora.rank or DEFAULT_RANK,
        config.lora.targets or DEFAULT_TARGETS,
        largest_batch(config, models)[0],
        (size // 16) ** 2,
        models.text_tokens,
        training.optimizer,
        training.accumulate > 1 or training.preserve_class is not None,  # gradients of one pass stay during another
        models.open("clip_l").shapes if config.lora.text_encoder else None,
        chunk=chunk_of(gpu.capability),
        library=gpu.library,
        expandable=has_expandable_segments(),
        adapted=config.lora.adapted(),
        start=config.lora.init,
        averaged=config.lora.ema > 0,
        drops=config.lora.drops,
    )


def pinned_residents(config: MemoryConfig, models: Models) -> tuple[str, ...] | None:
    """The units that stay on the GPU according to the user's pins; None for all."""
    blocks = blocks_units(models.flux_config)
    total = sum(map(len, blocks))
    count = Pins(resident_units=config.resident_units, blocks_to_swap=config.blocks_to_swap).resident(total)
    return None if count in (None, total) else tuple(spread(blocks, count))


def blocks_units(config: FluxConfig) -> tuple[tuple[str, ...], ...]:
    with torch.device("meta"):
        return Flux(config).blocks_units


def parse_bytes(text: str | None, option: str) -> int | None:
    """The bytes of an amount like 12GiB, 11.5 or 8000MB; a number without a unit is GiB. None for None."""
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(text).lower())
    if match is None or match[2] not in UNITS:
        raise WrongRequest(f"{option} must be an amount of memory like 12GiB, not {text!r}")
    return int(float(match[1]) * UNITS[match[2]])
