"""Text encoders, transformer and autoencoder take turns on the card: what each of them may have of it.

None is there with another, but that a run's own transformer and its optimiser stay while it draws previews. Everything
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
from fluxq.memory.machine import free_on_card
from fluxq.memory.placement import SLOTS, Placement, nbytes, resident_by_hand
from fluxq.model.costs import AUTOENCODER, TILES, flux_costs
from fluxq.models.parts import Models
from fluxq.offload import spread
from fluxq.offload.costs import Costs
from fluxq.offload.footprint import fixed
from fluxq.offload.planner import MARGIN
from fluxq.offload.plans import gib, gib_up

TOKENS_PER_BATCH = 4608  # of one picture of 1024 x 1024 pixels with 512 text tokens: so many are drawn at once
DRAWING_SLOTS = 4  # hide copies nearly as well as eight (benchmarks/results/plans.md), and leave room for residents
AUTOENCODER_CHANNELS = 128


@dataclass(frozen=True)
class Turns:
    """How pictures are drawn: the tokens of those that the transformer has at once, but one at least, and the bytes
    that the autoencoder may take after it, None for any.
    """

    tokens: int = TOKENS_PER_BATCH
    room: int | None = None


def room_of(wishes: MemoryConfig, device: torch.device) -> int | None:
    """The bytes of the card that one model may take when it is its turn; None on a processor. Raises WrongRequest for
    an amount that makes no sense here.
    """
    vram = nbytes(wishes.vram, "--vram")
    if device.type != "cuda":
        if vram:
            raise WrongRequest("--vram is about a CUDA card, and this machine has none; leave it out")
        return None
    allowed = vram or free_on_card()
    return None if allowed is None else allowed - MARGIN


def band_for(pixels: int, room: int | None) -> int | None:
    """How many rows of its maps the autoencoder works on at a time with pictures of `pixels` in all: None for all where
    that takes no more than `room` bytes, else the most that do, else the fewest.
    """
    for band, maps in TILES:
        if room is None or AUTOENCODER + int(maps * pixels * AUTOENCODER_CHANNELS * 4) <= room:
            return band
    return TILES[-1][0]


def place_drawing(
    config: TrainConfig, models: Models, sizes: Collection[tuple[int, int]], ranks: Sequence[int], lora: int
) -> tuple[Placement, Turns]:
    """Where the transformer's weights are while `fluxq sample` draws pictures of these `sizes` (width, height), one for
    each picture; and how many it draws at once. ranks and lora: of the LoRA files together, and their bytes.

    Raises WrongRequest where not even one picture at a time fits.
    """
    wishes, room = config.memory, room_of(config.memory, models.device)
    pinned = None
    if wishes.resident_units is not None or wishes.blocks_to_swap is not None:
        pinned = resident_by_hand(wishes, models)
    if room is None:
        return Placement(resident_by_hand(wishes, models), wishes.slots or SLOTS), Turns()
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
        if found := drawing(largest, lora, room, wishes.slots, pinned):
            return Placement(*found), Turns(tokens, room)
        needed = least_for_drawing(largest, lora, wishes.slots, len(pinned or ()))
    raise WrongRequest(
        f"drawing takes at least {gib(needed + MARGIN)} of the card, and {gib(room + MARGIN)} may be used; allow "
        f"--vram {gib_up(needed + MARGIN)}, or draw smaller pictures by --width and --height"
    )


def drawing(
    costs: Costs, lora: int, room: int, slots: int | None = None, pinned: tuple[str, ...] | None = None
) -> tuple[tuple[str, ...] | None, int] | None:
    """(resident units, slots) of a forward pass of `costs` within `room` bytes: the whole model, its modulation too,
    where it fits (None), else as many units as fit beside the slots; None where there is no room for slots.
    """
    everything = sum(costs.units.values()) + sum(costs.ahead.values())
    if pinned is None and slots is None and _forward(costs) + lora + everything <= room:
        return None, 0
    blocks, largest = [block.units for block in costs.blocks], max(costs.units.values())
    for count in (slots,) if slots else (DRAWING_SLOTS, *_fewest(blocks)):
        left = room - least_for_drawing(costs, lora, count, len(pinned or ()))
        if left >= 0:
            chosen = pinned if pinned is not None else spread(blocks, min(len(costs.units), left // largest))
            return tuple(u for u in costs.units if u in set(chosen)), count
    return None


def least_for_drawing(costs: Costs, lora: int, slots: int | None, resident: int = 0) -> int:
    """The bytes of a forward pass with this number of slots, by default the fewest, and of resident units."""
    slots = slots or _fewest([block.units for block in costs.blocks])[0]
    return _forward(costs) + lora + slots * costs.slot + resident * max(costs.units.values())


def preview_turns(config: TrainConfig, models: Models, placement: Placement) -> Turns:
    """How a run draws previews beside what stays of it: no more pictures at once than a step has, and the autoencoder
    in the room of a step's activations.
    """
    if placement.plan is None or placement.budget is None:
        return Turns()
    size = config.data.size or 0
    step = config.training.batch * ((size // 16) ** 2 + models.t5_length)
    return Turns(
        min(step, TOKENS_PER_BATCH), placement.plan.peak_bytes - fixed(placement.budget.costs, placement.plan.setting)
    )


def _forward(costs: Costs) -> int:
    """The bytes of a forward pass without the units' and the LoRA's weights."""
    return costs.stays + costs.scratch + costs.ahead_step + max(block.forward_peak for block in costs.blocks)


def _fewest(blocks: Sequence[Sequence[str]]) -> tuple[int]:
    return (max(2, *map(len, blocks)),)
