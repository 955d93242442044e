"""The GPU memory for each phase: encoding, sampling and decoding.

Only one model is on the GPU at a time. Exception: during previews the run's own transformer and optimizer stay loaded.
Everything here is computed from a number of bytes before any model is loaded. Sampling needs each unit once per forward
pass, so the transformer keeps as many units resident as fit; the autoencoder works on as many rows at a time as fit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from fluxq.config import MemoryConfig, TrainConfig
from fluxq.errors import WrongRequest
from fluxq.formats.quantized import cache_folder
from fluxq.kernels.chunks import chunk_of
from fluxq.model.costs import AUTOENCODER, TILES, flux_costs
from fluxq.models.parts import Models
from fluxq.offload import spread
from fluxq.offload.costs import Costs
from fluxq.offload.footprint import fixed
from fluxq.offload.gpus import GIB, measure
from fluxq.offload.planner import OUTSIDE
from fluxq.offload.plans import gib, gib_up

from .machine import free_gpu_bytes
from .placement import SLOTS, Placement, largest_batch, parse_bytes, pinned_residents
from .share import take_share

TOKENS_PER_BATCH = 4608  # sampled at once: those of one 1024 x 1024 image with 512 text tokens
SAMPLING_SLOTS = 4  # hide copies nearly as well as 8 (benchmarks/results/plans.md) and leave memory for residents
AUTOENCODER_CHANNELS = 128
UNUSED = int(0.43 * GIB)
"""What the allocator reserves and does not use while TOKENS_PER_BATCH tokens are sampled: 0.30 to 0.41 GiB with
segments of fixed size, 0.1 with such that grow (benchmarks/results/emulated.md). More tokens take more in proportion.
"""
SAMPLING_MARGIN = OUTSIDE + UNUSED


@dataclass(frozen=True)
class SamplingLimits:
    """tokens: the most that the transformer samples at once (always at least one image). autoencoder: the bytes that
    decoding may take afterwards; None for no limit.
    """

    tokens: int = TOKENS_PER_BATCH
    decoding_bytes: int | None = None


def gpu_budget(config: MemoryConfig, device: torch.device) -> int | None:
    """The bytes of GPU memory that one model may take in its phase; None on a CPU.

    Raises WrongRequest if --vram is set but there is no CUDA GPU.
    """
    vram = parse_bytes(config.vram, "--vram")
    if device.type != "cuda":
        if vram:
            raise WrongRequest("--vram is for a CUDA GPU, and this machine has none; leave it out")
        return None
    if vram is None:
        take_share()
    allowed = vram or free_gpu_bytes()
    return None if allowed is None else allowed - SAMPLING_MARGIN


def band_for(pixels: int, budget: int | None) -> int | None:
    """The band for the autoencoder (rows of a feature map at a time) with images of `pixels` pixels in total.

    None (all rows) if that fits `budget` bytes, else the largest band that fits, else the smallest.
    """
    for band, maps in TILES:
        if budget is None or AUTOENCODER + int(maps * pixels * AUTOENCODER_CHANNELS * 4) <= budget:
            return band
    return TILES[-1][0]


def place_sampling(
    config: TrainConfig, models: Models, sizes: Collection[tuple[int, int]], ranks: Sequence[int], lora_bytes: int
) -> tuple[Placement, SamplingLimits]:
    """The transformer's placement while `fluxq sample` makes images, and how many images it samples at once.

    sizes: (width, height) of each image; ranks: of all LoRA files; lora_bytes: of all LoRA files together. Raises
    WrongRequest if not even one image at a time fits.
    """
    memory, budget = config.memory, gpu_budget(config.memory, models.device)
    pinned = None
    if memory.resident_units is not None or memory.blocks_to_swap is not None:
        pinned = pinned_residents(memory, models)
    if budget is None:
        return Placement(pinned_residents(memory, models), memory.slots or SLOTS), SamplingLimits()
    needed, chunk = 0, chunk_of(measure(cache_folder()).capability)
    images = Counter(width // 16 * (height // 16) for width, height in sizes)
    for tokens in (TOKENS_PER_BATCH, 0):
        batches = {n: max(1, min(count, tokens // (n + models.text_tokens))) for n, count in images.items()}
        tables = [
            flux_costs(
                models.flux_config,
                models.format,
                models.compute,
                rank=max(1, sum(ranks)),
                targets="attention+mlp" if ranks else (),
                batch=batch,
                img_tokens=image,
                txt_tokens=models.text_tokens,
                chunk=chunk,
            )
            for image, batch in batches.items()
        ]
        largest = max(tables, key=forward_bytes)
        beyond = unused_beyond(max(batch * (image + models.text_tokens) for image, batch in batches.items()))
        if placed := sampling_residents(largest, lora_bytes, budget - beyond, memory.slots, pinned):
            return Placement(*placed), SamplingLimits(tokens, budget)
        needed = beyond + least_sampling_bytes(largest, lora_bytes, memory.slots, len(pinned or ()))
    least, allowed = needed + SAMPLING_MARGIN, budget + SAMPLING_MARGIN
    raise WrongRequest(
        f"sampling needs at least {gib(least)} of GPU memory, but only {gib(allowed)} may be used; "
        f"pass --vram {gib_up(least)}, or make smaller images with --width and --height"
    )


def sampling_residents(
    costs: Costs, lora_bytes: int, budget: int, slots: int | None = None, pinned: tuple[str, ...] | None = None
) -> tuple[tuple[str, ...] | None, int] | None:
    """(resident units, slots) for a forward pass of `costs` within `budget` bytes; None if not even the slots fit.

    The units are None if the whole model fits, including its modulation; else as many as fit next to the slots.
    """
    everything = sum(costs.units.values()) + sum(costs.ahead.values())
    if pinned is None and slots is None and forward_bytes(costs) + lora_bytes + everything <= budget:
        return None, 0
    blocks, largest = [block.units for block in costs.blocks], max(costs.units.values())
    for count in (slots,) if slots else (SAMPLING_SLOTS, _fewest_slots(blocks)):
        left = budget - least_sampling_bytes(costs, lora_bytes, count, len(pinned or ()))
        if left >= 0:
            chosen = pinned if pinned is not None else spread(blocks, min(len(costs.units), left // largest))
            return tuple(u for u in costs.units if u in set(chosen)), count
    return None


def least_sampling_bytes(costs: Costs, lora_bytes: int, slots: int | None, resident: int = 0) -> int:
    """The bytes of a forward pass with this number of slots (by default the fewest possible) and of resident units."""
    slots = slots or _fewest_slots([block.units for block in costs.blocks])
    return forward_bytes(costs) + lora_bytes + slots * costs.slot + resident * max(costs.units.values())


def unused_beyond(tokens: int) -> int:
    """What the allocator reserves and does not use, in addition to UNUSED, if so many tokens are sampled at once."""
    return int(UNUSED * max(0.0, tokens / TOKENS_PER_BATCH - 1))


def preview_limits(config: TrainConfig, models: Models, placement: Placement) -> SamplingLimits:
    """The limits for a run's previews, while its transformer stays loaded: no more tokens at once than a training step
    has, and the autoencoder fits into the memory of a step's activations.
    """
    if placement.plan is None or placement.budget is None:
        return SamplingLimits()
    batch, side = largest_batch(config, models)
    step = batch * ((side // 16) ** 2 + models.text_tokens)
    return SamplingLimits(
        min(step, TOKENS_PER_BATCH), placement.plan.peak_bytes - fixed(placement.budget.costs, placement.plan.residency)
    )


def forward_bytes(costs: Costs) -> int:
    """The bytes of a forward pass without the weights of the units and the LoRA."""
    return costs.stays + costs.scratch + costs.ahead_step + max(block.forward_peak for block in costs.blocks)


def _fewest_slots(blocks: Sequence[Sequence[str]]) -> int:
    return max(2, *map(len, blocks))
