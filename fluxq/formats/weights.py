"""A source's tensors as numbers to compute with: on a device, in one dtype.

`StoredWeights` reads each from its file when it is asked for. `StreamedWeights` has the same tensors come through a
ring: they travel as they are stored, a thread reads the next unit while the one before is computed with, and the values
are made on the device. Only pieces of a unit lie on the host, none of it for long: the files are read once for many
captions, mostly once in all, so an arena of them would only be one more copy, and 10 GB of RAM.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fluxq.formats.files import refuse
from fluxq.formats.quantized import Place, placed, view
from fluxq.formats.source import Source
from fluxq.model.text_layers import Units
from fluxq.offload import Piece, Ring, Schedule, Stored, StreamingRing, Streams
from fluxq.offload.arena import streams_from_files


@dataclass(frozen=True)
class StoredWeights:
    """The tensors of `source`, given on `device` in `dtype`; 8-bit ones are scaled in fp32 first."""

    source: Source[Any]
    device: torch.device
    dtype: torch.dtype

    def resident(self, unit: str) -> AbstractContextManager[None]:
        return nullcontext()

    def read(self, name: str) -> Tensor:
        return self.source.value(name, self.dtype, self.device)

    def rows(self, name: str, indices: Tensor) -> Tensor:
        """The rows of a matrix at `indices` (n,). Raises WrongRequest if it has fewer."""
        if (count := self.source.shapes[name][0]) <= int(indices.max()):
            what = f"has {count:,} rows in {name}, but the tokenizer gives the number {int(indices.max()):,}"
            refuse(self.source.path, what, "use the tokenizer that belongs to it")
        return self.source.rows(name, indices.tolist(), self.dtype, self.device)


@dataclass(frozen=True)
class StreamedWeights(StoredWeights):
    """Those whose `units` come through `ring`; what belongs to none is read when it is asked for. views: name -> the
    tensor as it is stored, in its unit's slot.
    """

    ring: Ring
    views: Mapping[str, Tensor]

    def resident(self, unit: str) -> AbstractContextManager[None]:
        return self.ring.resident((unit,))

    def read(self, name: str) -> Tensor:
        if name not in self.views:
            return super().read(name)
        tensor, scale = self.views[name], self.views.get(_scale(name))
        if scale is None:
            return tensor.to(self.dtype)
        return tensor.to(torch.float32, copy=True).mul_(scale).to(self.dtype)


def streamed(
    models: Sequence[tuple[StoredWeights, Units]],
    device: torch.device,
    slots: int,
    streams: Streams | None = None,
    poison: bool = False,
) -> list[StreamedWeights]:
    """These models' weights through one ring, which passes through them in this order, again and again. Unit names
    differ between them. `streams` and `poison`: see StreamingRing.
    """
    stored, places = dict[str, Stored](), dict[str, list[Place]]()
    for weights, units in models:
        for unit, layers in units.items():
            names = [name for own in layers.values() for name in own]
            places[unit], stored[unit] = _stored(weights.source, names)
    schedule = Schedule(tuple((unit,) for unit in stored), frozenset(), slots)
    views: dict[str, Tensor] = {}

    def place(unit: str, flat: Tensor) -> None:
        views.update((p.name, view(flat, p)) for p in places[unit])

    longest = max(piece.length for unit in stored.values() for piece in unit.pieces)
    streams = streams or streams_from_files(longest, device)
    ring = StreamingRing(schedule, stored, place, device, streams, poison)
    ring.expect(backward=())
    return [StreamedWeights(w.source, w.device, w.dtype, ring, views) for w, _ in models]


def _stored(source: Source[Any], names: Sequence[str]) -> tuple[list[Place], Stored]:
    """How a unit of these tensors lies in its slot, each with the scale of its 8 bits behind it, and what reads it."""
    scales = {_scale(name): scale for name in names if (scale := source.scale(name)) is not None}
    parts = [(name, source.dtypes[name], source.shapes[name]) for name in names]
    parts += [(name, scale.dtype, tuple(scale.shape)) for name, scale in scales.items()]
    places, length = placed(parts)

    def read(name: str, out: Tensor) -> None:
        if name in scales:
            out.copy_(scales[name].reshape(-1).view(torch.uint8))
        else:
            source.read_into(name, out)

    return places, Stored(length, tuple(Piece(p.start, p.nbytes, partial(read, p.name)) for p in places))


def _scale(name: str) -> str:
    return f"{name}, scale"
