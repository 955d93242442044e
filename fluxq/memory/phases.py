"""Text encoders, transformer and autoencoder take turns on the GPU: what each of them may have of it.

None is there with another, but that a run's own transformer and its optimizer stay while it draws previews. Everything
here is worked out from a number of bytes before anything is loaded. Forward passes alone need each unit once, so that
the transformer gets as many resident units as fit beside them; the autoencoder works on as many rows at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from fluxq.config import MemoryConfig, TrainConfig
from fluxq.errors import WrongRequest
from fluxq.model.costs import AUTOENCODER, TILES, flux_costs
from fluxq.models.parts import Models
from fluxq.offload import spread
from fluxq.offload.costs import Costs
from fluxq.offload.footprint import fixed
from fluxq.offload.planner import MARGIN
from fluxq.offload.plans import gib, gib_up

from .machine import free_gpu_bytes
from .placement import SLOTS, Placement, nbytes, pinned_residents

TOKENS_PER_BATCH = 4608  # of one image of 1024 x 1024 pixels with 512 text tokens: so many are drawn at once
SAMPLING_SLOTS = 4  # hide copies nearly as well as eight (benchmarks/results/plans.md), and leave room for residents
AUTOENCODER_CHANNELS = 128


@dataclass(frozen=True)
class SamplingLimits:
    """How images are drawn: the tokens of those that the transformer has at once, but one at least, and the bytes
    that the autoencoder may take after it, None for any.
    """

    tokens: int = TOKENS_PER_BATCH
    autoencoder: int | None = None


def gpu_budget(wishes: MemoryConfig, device: torch.device) -> int | None:
    """The bytes of the GPU that one model may take when it is its turn; None on a CPU. Raises WrongRequest for
    an amount that makes no sense here.
    """
    vram = nbytes(wishes.vram, "--vram")
    if device.type != "cuda":
        if vram:
            raise WrongRequest("--vram is about a CUDA GPU, and this machine has none; leave it out")
        return None
    allowed = vram or free_gpu_bytes()
    return None if allowed is None else allowed - MARGIN


def band_for(pixels: int, budget: int | None) -> int | None:
    """How many rows of its maps the autoencoder works on at a time with images of `pixels` in all: None for all where
    that takes no more than `budget` bytes, else the most that do, else the fewest.
    """
    for band, maps in TILES:
        if budget is None or AUTOENCODER + int(maps * pixels * AUTOENCODER_CHANNELS * 4) <= budget:
            return band
    return TILES[-1][0]


def place_sampling(
    config: TrainConfig, models: Models, sizes: Collection[tuple[int, int]], ranks: Sequence[int], lora: int
) -> tuple[Placement, SamplingLimits]:
    """Where the transformer's weights are while `fluxq sample` draws images of these `sizes` (width, height), one for
    each image; and how many it draws at once. ranks and lora: of the LoRA files together, and their bytes.

    Raises WrongRequest where not even one image at a time fits.
    """
    wishes, budget = config.memory, gpu_budget(config.memory, models.device)
    pinned = None
    if wishes.resident_units is not None or wishes.blocks_to_swap is not None:
        pinned = pinned_residents(wishes, models)
    if budget is None:
        return Placement(pinned_residents(wishes, models), wishes.slots or SLOTS), SamplingLimits()
    needed = 0
    for tokens in (TOKENS_PER_BATCH, 0):
        tables = [
            flux_costs(
                models.flux_config,
                models.format,
                models.compute,
                rank=max(1, sum(ranks)),
                targets="attention+mlp" if ranks else (),
                batch=max(1, min(count, tokens // (image + models.t5_length))),
                img_tokens=image,
                txt_tokens=models.t5_length,
            )
            for image, count in Counter(width // 16 * (height // 16) for width, height in sizes).items()
        ]
        largest = max(tables, key=_forward)
        if found := sampling_residents(largest, lora, budget, wishes.slots, pinned):
            return Placement(*found), SamplingLimits(tokens, budget)
        needed = least_sampling_bytes(largest, lora, wishes.slots, len(pinned or ()))
    raise WrongRequest(
        f"drawing takes at least {gib(needed + MARGIN)} of the GPU, and {gib(budget + MARGIN)} may be used; allow "
        f"--vram {gib_up(needed + MARGIN)}, or draw smaller images by --width and --height"
    )


def sampling_residents(
    costs: Costs, lora: int, budget: int, slots: int | None = None, pinned: tuple[str, ...] | None = None
) -> tuple[tuple[str, ...] | None, int] | None:
    """(resident units, slots) of a forward pass of `costs` within `budget` bytes: the whole model, its modulation too,
    where it fits (None), else as many units as fit beside the slots; None where there is no room for slots.
    """
    everything = sum(costs.units.values()) + sum(costs.ahead.values())
    if pinned is None and slots is None and _forward(costs) + lora + everything <= budget:
        return None, 0
    blocks, largest = [block.units for block in costs.blocks], max(costs.units.values())
    for count in (slots,) if slots else (SAMPLING_SLOTS, *_fewest(blocks)):
        left = budget - least_sampling_bytes(costs, lora, count, len(pinned or ()))
        if left >= 0:
            chosen = pinned if pinned is not None else spread(blocks, min(len(costs.units), left // largest))
            return tuple(u for u in costs.units if u in set(chosen)), count
    return None


def least_sampling_bytes(costs: Costs, lora: int, slots: int | None, resident: int = 0) -> int:
    """The bytes of a forward pass with this number of slots, by default the fewest, and of resident units."""
    slots = slots or _fewest([block.units for block in costs.blocks])[0]
    return _forward(costs) + lora + slots * costs.slot + resident * max(costs.units.values())


def preview_limits(config: TrainConfig, models: Models, placement: Placement) -> SamplingLimits:
    """How a run draws previews beside what stays of it: no more images at once than a step has, and the autoencoder
    in the room of a step's activations.
    """
    if placement.plan is None or placement.budget is None:
        return SamplingLimits()
    size = config.data.resolution or 0
    step = config.training.batch * ((size // 16) ** 2 + models.t5_length)
    return SamplingLimits(
        min(step, TOKENS_PER_BATCH), placement.plan.peak_bytes - fixed(placement.budget.costs, placement.plan.setting)
    )


def _forward(costs: Costs) -> int:
    """The bytes of a forward pass without the units' and the LoRA's weights."""
    return costs.stays + costs.scratch + costs.ahead_step + max(block.forward_peak for block in costs.blocks)


def _fewest(blocks: Sequence[Sequence[str]]) -> tuple[int]:
    return (max(2, *map(len, blocks)),)
