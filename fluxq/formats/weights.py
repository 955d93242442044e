"""A source's tensors for computing: decoded, on a device, in one dtype.

`StoredWeights` reads each tensor from its file when it is needed. `StreamedWeights` streams the same tensors through a
ring: they are copied as they are stored and decoded on the device, and a thread reads the next unit during the
computation with the current one. Host memory only ever holds pieces of a unit. The files are read once for many
captions, usually only once, so an arena would just be another copy, of 10 GB.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fluxq.kernels import Weight, dequantize
from fluxq.model.layout import TensorEntry, placed
from fluxq.model.text_layers import Units
from fluxq.offload import ByteRange, Schedule, Stored, StreamingRing, Streams
from fluxq.offload.arena import streams_from_files

from .checkpoint.files import refuse
from .checkpoint.source import Source
from .quantized import view


@dataclass(frozen=True)
class StoredWeights:
    """The tensors of `source`, on `device` in `dtype`; 8-bit ones are scaled in fp32 first."""

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
            what = f"has {count:,} rows in {name}, but the tokenizer returns the id {int(indices.max()):,}"
            refuse(self.source.path, what, "use the tokenizer that belongs to it")
        return self.source.rows(name, indices.tolist(), self.dtype, self.device)


@dataclass(frozen=True)
class StreamedWeights(StoredWeights):
    """Weights whose units are streamed through `ring`; tensors outside the units are read when they are needed.

    views: name -> the tensor as it is stored, in its unit's slot.
    """

    ring: StreamingRing
    views: Mapping[str, Weight]

    def resident(self, unit: str) -> AbstractContextManager[None]:
        return self.ring.resident((unit,))

    def read(self, name: str) -> Tensor:
        return dequantize(self.views[name], self.dtype) if name in self.views else super().read(name)


@dataclass(frozen=True)
class _Part:
    """A tensor in its unit: its first byte, the entries of its stored parts relative to that, and its length in bytes.

    `kind` builds a weight from the stored parts.
    """

    begin: int
    entries: list[TensorEntry]
    length: int
    kind: Callable[..., Weight]

    def weight(self, flat: Tensor) -> Weight:
        own = flat[self.begin : self.begin + self.length]
        return self.kind(*(view(own, entry) for entry in self.entries))


def streamed(
    models: Sequence[tuple[StoredWeights, Units]],
    device: torch.device,
    slots: int,
    streams: Streams | None = None,
    poison: bool = False,
) -> list[StreamedWeights]:
    """The weights of these models, streamed through one ring that visits their units in this order, cyclically.

    No two units may have the same name. `streams` and `poison`: see StreamingRing.
    """
    stored, parts = dict[str, Stored](), dict[str, dict[str, _Part]]()
    for weights, units in models:
        for unit, layers in units.items():
            names = [name for own in layers.values() for name in own]
            parts[unit], stored[unit] = _stored(weights, names)
    schedule = Schedule(tuple((unit,) for unit in stored), frozenset(), slots)
    views: dict[str, Weight] = {}

    def place(unit: str, flat: Tensor) -> None:
        views.update((name, part.weight(flat)) for name, part in parts[unit].items())

    longest = max(piece.length for unit in stored.values() for piece in unit.pieces)
    streams = streams or streams_from_files(longest, device)
    ring = StreamingRing(schedule, stored, place, device, streams, poison)
    ring.expect(backward=())
    return [StreamedWeights(w.source, w.device, w.dtype, ring, views) for w, _ in models]


def _stored(weights: StoredWeights, names: Sequence[str]) -> tuple[dict[str, _Part], Stored]:
    """The layout of a unit with these tensors in its slot, and the pieces that read it."""
    parts, pieces, end = dict[str, _Part](), list[ByteRange](), 0
    for name in names:
        parts[name] = part = _part(weights, name, end)
        end += part.length
        pieces.append(ByteRange(part.begin, part.length, partial(_read, weights.source, name, part)))
    return parts, Stored(end, tuple(pieces))


def _part(weights: StoredWeights, name: str, begin: int) -> _Part:
    """The layout of one tensor, found by reading its first row.

    Tensors that come as fp32, like all that must be decoded on the host, are copied to the device in `weights.dtype`.
    """
    rows, first = weights.source.shapes[name][0], weights.source.get(name, range(1))
    dtypes = [
        weights.dtype if isinstance(first, Tensor) and t.dtype == torch.float32 else t.dtype for t in _tensors(first)
    ]
    kind = (lambda tensor: tensor) if isinstance(first, Tensor) else type(first)
    shapes = ((name, dtype, (rows, *t.shape[1:])) for dtype, t in zip(dtypes, _tensors(first), strict=True))
    entries, length = placed(shapes)
    return _Part(begin, entries, length, kind)


def _read(source: Source[Any], name: str, part: _Part, out: Tensor) -> None:
    """Fill `out`, flat uint8, with the stored parts of the tensor `name`."""
    targets = [view(out, entry) for entry in part.entries]
    if len(targets) == 1 and source.is_plain(name, targets[0].dtype):
        source.read_into(name, out[: targets[0].nbytes])
        return
    for rows in source.bands(name):
        for target, tensor in zip(targets, _tensors(source.get(name, rows)), strict=True):
            target[rows.start : rows.stop] = tensor


def _tensors(weight: Weight) -> list[Tensor]:
    return [weight] if isinstance(weight, Tensor) else [getattr(weight, field.name) for field in fields(weight)]
