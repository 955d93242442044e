"""What a run may use of card and host, and the plan that keeps to it.

On a card the plan is made before anything is loaded: by the planner (fluxq/offload/planner.py) from the model's costs,
the card as it was measured, and what the user pinned. On a processor nothing is predicted: everything stays where it
is, unless streaming is asked for, which is how it is tried out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from fluxq.config import MemoryConfig, TrainConfig
from fluxq.errors import WrongRequest
from fluxq.formats.files import atomic_path
from fluxq.formats.quantized import cache_folder
from fluxq.machine import free_on_card, memory
from fluxq.model import Flux, FluxConfig
from fluxq.model.costs import flux_costs
from fluxq.models import Models
from fluxq.offload import spread
from fluxq.offload.cards import measure
from fluxq.offload.costs import Costs
from fluxq.offload.planner import plan
from fluxq.offload.plans import Pins, Plan, describe

SLOTS = 8
SMALLER_SIZES = (768, 512, 256)
UNITS = {"": 2**30, "g": 2**30, "gib": 2**30, "gb": 10**9, "m": 2**20, "mib": 2**20, "mb": 10**6}


@dataclass(frozen=True)
class Placement:
    """Where frozen weights are and what blocks keep. resident: the units that stay on the card, None for all; slots:
    for the others; policies: one for every block, or one for each. `plan`: what they come from, if it was made.
    """

    resident: tuple[str, ...] | None = None
    slots: int = SLOTS
    policies: str | tuple[str, ...] = "recompute"
    plan: Plan | None = None

    def save(self, folder: Path) -> None:
        """Write plan.json: the plan with its predictions, or the bare choices."""
        bare = {"predicted": False, "resident": self.resident, "slots": self.slots, "policies": self.policies}
        content = self.plan.to_json() if self.plan else bare
        with atomic_path(folder / "plan.json") as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def place(config: TrainConfig, models: Models, say: Callable[[str], None]) -> Placement:
    """Where the frozen weights of a resolved run go. Raises WrongRequest where nothing fits what it may use, and says
    what would.
    """
    wishes = config.memory
    vram, ram = nbytes(wishes.vram, "--vram"), nbytes(wishes.ram, "--ram")
    if models.device.type != "cuda":
        if vram or ram:
            raise WrongRequest("--vram and --ram plan for a CUDA card, and this machine has none; leave them out")
        policies = wishes.policy or ("keep_all" if models.is_nano else "recompute")
        return Placement(resident_by_hand(wishes, models), wishes.slots or SLOTS, policies)
    pins = Pins(
        format=config.model.format,
        compute=models.compute,
        resident_units=wishes.resident_units,
        blocks_to_swap=wishes.blocks_to_swap,
        policy=wishes.policy or ("keep_all" if models.is_nano else None),
        slots=wishes.slots,
        offload=False,  # inputs of blocks do not wait on the host yet
    )
    size = config.data.size or 0
    smaller = {f"--size {s}": [costs_of(config, models, s)] for s in SMALLER_SIZES if s < size}
    card = measure(cache_folder())
    found = plan(
        [costs_of(config, models, size)], card, vram or free_on_card(), ram or (memory() or (0, None))[1], pins, smaller
    )
    say(describe(found))
    whole = found.streamed == 0 and (not found.look_ahead or config.model.format == "bf16")  # bf16 is not streamed yet
    return Placement(None if whole else found.resident, found.slots, found.policies, found)


def costs_of(config: TrainConfig, models: Models, size: int) -> Costs:
    """The table of costs of a run's steps with pictures of the area of size x size pixels."""
    training = config.training
    return flux_costs(
        models.flux_config,
        config.model.format,
        models.compute,
        config.lora.rank,
        config.lora.targets,
        training.batch,
        (size // 16) ** 2,
        models.t5_length,
        training.optimizer,
        training.accumulate > 1,
    )


def resident_by_hand(wishes: MemoryConfig, models: Models) -> tuple[str, ...] | None:
    """The units that stay where the user said how many, None for all of them."""
    blocks = blocks_units(models.flux_config)
    total = sum(map(len, blocks))
    if wishes.resident_units is not None and wishes.blocks_to_swap is not None:
        raise WrongRequest("--resident-units and --blocks-to-swap say the same in two ways; give one of them")
    count = total if wishes.resident_units is None else wishes.resident_units
    if wishes.blocks_to_swap is not None:
        count = total - 2 * wishes.blocks_to_swap
    if not 0 <= count <= total:
        raise WrongRequest(f"this model has {total} units to keep or stream; {total - count} cannot be streamed")
    return None if count == total else tuple(spread(blocks, count))


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
