"""Load a quantized file as a transformer that streams: some units are resident on the GPU, the others are in RAM."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from fluxq.console import Notify, silent
from fluxq.model.config import FluxConfig
from fluxq.model.flux import Flux
from fluxq.model.units import unit_of
from fluxq.offload import AllResident, Schedule, StreamingRing, Streams
from fluxq.offload.arena import Arena, streams_for

from .quantized import assign


class StoredUnits(Protocol):
    """The source of the units: a QuantizedFile, or random weights (fluxq/bench/random_model.py)."""

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
    notify: Notify = silent,
    ahead: bool = True,
    through: Callable[[Streams], Streams] = lambda streams: streams,
    into: Flux | None = None,
) -> Flux:
    """The transformer of `file`; its blocks' units, except `resident`, are streamed to `device` through slots.

    Everything outside the blocks is on `device`. Call `expect_training` or `expect_sampling` to set which blocks have a
    backward pass, and `flux.ring.close()` before you drop the model. Read frozen weights only inside `ring.resident`,
    and do not move or cast the model.

    slots            the number of slots
    streams, poison  see StreamingRing
    ahead            whether modulation is computed ahead and thus streamed in its own passes
                     (fluxq/model/modulation.py); else it is streamed in each step, before its block
    through          wraps the streams before the ring gets them
    into             a model with these weights to place again, instead of a new one. Its streamed units are freed
                     before anything is loaded, so it never takes more memory than before or after. Units that stay,
                     and LoRA, are not moved. If this fails, it can be repeated.
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
    """Tell the ring of a streamed model to expect forward passes only."""
    if isinstance(flux.ring, StreamingRing):
        flux.ring.expect(backward=())


def expect_training(flux: Flux) -> None:
    """Tell the ring of a streamed model which blocks have a backward pass with the model's current LoRA."""
    if isinstance(flux.ring, StreamingRing):
        trained, visits = flux.units_with_backward, flux.ring.schedule.blocks
        flux.ring.expect([i for i, units in enumerate(visits) if trained.issuperset(units)])
