"""The byte layout of a unit: the same in the quantized file, in the arena, and in a slot on the GPU.

An NF4 matrix is stored as `<layer>.codes` and `.absmax`, an 8-bit one as `<layer>.values` and `.scale`. Every other
tensor keeps its name and is bf16. Each starts at a multiple of ALIGNMENT bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from fluxq.kernels import FORMATS

from .units import REST, by_unit

ALIGNMENT = 256


@dataclass(frozen=True)
class TensorEntry:
    """A tensor in its unit: `start` in bytes, a multiple of ALIGNMENT."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def layout(shapes: Mapping[str, tuple[int, ...]], format: str) -> dict[str, tuple[list[TensorEntry], int]]:
    """unit -> (entries of its tensors, its length in bytes), for a transformer of these shapes stored as `format`.

    Raises ValueError for an unknown format.
    """
    units = {}
    for unit, names in by_unit(shapes).items():
        stored = (stored_parts(name, shapes[name], format if unit != REST else "bf16") for name in names)
        units[unit] = placed(part for parts in stored for part in parts)
    return units


def placed(parts: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> tuple[list[TensorEntry], int]:
    """The entries of tensors (name, dtype, shape) one after another, and their total length in bytes."""
    entries, end = [], 0
    for name, dtype, shape in parts:
        entries.append(TensorEntry(name, dtype, shape, end))
        end += -(-entries[-1].nbytes // ALIGNMENT) * ALIGNMENT
    return entries, end


def stored_parts(name: str, shape: tuple[int, ...], format: str) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    """(name, dtype, shape) of the stored tensors that hold `name`: one, or the two of a quantized container."""
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, not {format!r}")
    if len(shape) < 2 or format == "bf16":
        return [(name, torch.bfloat16, shape)]
    layer, (rows, columns) = name.removesuffix(".weight"), shape
    if format == "nf4":
        return [
            (f"{layer}.codes", torch.uint8, (rows, columns // 2)),
            (f"{layer}.absmax", torch.float32, (rows, columns // 64)),
        ]
    dtype = torch.int8 if format == "int8" else torch.float8_e4m3fn
    return [(f"{layer}.values", dtype, shape), (f"{layer}.scale", torch.float32, (rows,))]
