"""A quantized file to a transformer that streams: a few units on the GPU, the others in host memory."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from fluxq.model.config import FluxConfig
from fluxq.model.flux import Flux
from fluxq.model.units import unit_of
from fluxq.offload import AllResident, Schedule, StreamingRing, Streams
from fluxq.offload.arena import Arena, streams_for

from .quantized import assign


class StoredUnits(Protocol):
    """Where units come from: a QuantizedFile, or what is drawn at random (fluxq/bench/random_model.py)."""

    @property
    def config(self) -> FluxConfig: ...

    @property
    def units(self) -> Iterable[str]: ...

    def length(self, unit: str) -> int: ...

    def read(self, unit: str) -> Tensor: ...

    def read_into(self, unit: str, out: Tensor) -> None: ...

    def tensors(self, unit: str, flat: Tensor) -> Iterator[tuple[str, Tensor]]: ...


def load_streamed(
    file: StoredUnits,
    device: torch.device,
    resident: Collection[str] = (),
    slots: int = 8,
    streams: Streams | None = None,
    poison: bool = False,
    notify: Callable[[str], None] = lambda line: None,
    ahead: bool = True,
    through: Callable[[Streams], Streams] = lambda streams: streams,
    into: Flux | None = None,
) -> Flux:
    """The transformer of `file`, whose blocks' units but `resident` are streamed to `device` through `slots` slots.

    What lies outside the blocks is on `device`. Modulation is streamed for passes of its own where it is computed
    `ahead` (fluxq/model/modulation.py), else in each step, before its block. `flux.ring.close()` before the model is
    let go. Tell the ring which blocks train with `expect_training`. Frozen weights are then only to be read inside
    `resident`, and the model is not to be moved or cast. `streams` and `poison`: see StreamingRing. `through`
    may put something between the ring and its streams.

    into: a model of these weights, which holds them anew: what it had of streamed units goes before anything comes, so
    that it never takes more than before or after; what stays, stays where it is, and so does LoRA. Where that fails it
    can be done again.
    """
    with torch.device("meta"):
        flux = Flux(file.config).eval() if into is None else into
    modulations = tuple(block.modulation_unit for block in flux.blocks)
    if ahead:
        schedule = Schedule(flux.blocks_units, frozenset(resident), slots, modulations)
    else:
        visits = (v for unit, units in zip(modulations, flux.blocks_units, strict=True) for v in ((unit,), units))
        schedule = Schedule(tuple(visits), frozenset(resident), slots)

    def place(unit: str, flat: Tensor) -> None:
        assign(flux, dict(file.tensors(unit, flat)))

    leaving = set(schedule.slot)
    if isinstance(flux.ring, StreamingRing):
        leaving |= set(flux.ring.schedule.slot)
        flux.ring.close()
    flux.ring = AllResident()
    for unit in leaving:
        place(unit, torch.empty(file.length(unit), dtype=torch.uint8, device="meta"))
    absent = {unit_of(name) for name, buffer in flux.named_buffers() if buffer.is_meta}
    for unit in file.units:
        if unit in absent and unit not in schedule.slot:
            place(unit, file.read(unit).to(device))
    arena = Arena({unit: file.length(unit) for unit in schedule.slot}, file.read_into)
    streams = streams or streams_for(arena, device, notify)
    flux.ring = StreamingRing(schedule, arena, place, device, through(streams), poison)
    return flux


def expect_sampling(flux: Flux) -> None:
    """Tell the ring of a streamed model that forward passes are all that comes."""
    if isinstance(flux.ring, StreamingRing):
        flux.ring.expect(backward=())


def expect_training(flux: Flux) -> None:
    """Tell the ring of a streamed model which blocks have a backward pass, as LoRA is now."""
    if isinstance(flux.ring, StreamingRing):
        trained, visits = flux.units_with_backward, flux.ring.schedule.blocks
        flux.ring.expect([i for i, units in enumerate(visits) if trained.issuperset(units)])
