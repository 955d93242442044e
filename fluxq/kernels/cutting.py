"""How rows are padded and weights are cut where weights are decoded: for the Triton kernels, and for who predicts their
memory without Triton.
"""

from __future__ import annotations

from collections.abc import Iterator

from .weights import NF4_BLOCK

FEW_ROWS = 64
"""Up to here (modulation, embedders) reading the weight is all the work: 8 bits would only cost accuracy."""

LANES = 32
"""The padding behind each row is a multiple of as many columns, so that every row begins on 64 bytes."""

MILLION = 1 << 20
CHUNKS = {80: 45 * MILLION, 86: 9 * MILLION, 89: 9 * MILLION, 90: 45 * MILLION, 120: 9 * MILLION}
"""Compute capability -> numbers of a weight that are decoded at a time; fluxq/kernels/triton/shipped.py says why."""


def padding(rank: int) -> int:
    """How many columns the Triton kernels want behind each row of the input of a bf16 layer with LoRA of that rank: one
    for each of x down^T, and one for the 1 that the bias is multiplied by.
    """
    return -(-(rank + 1) // LANES) * LANES


def parts(length: int, width: int, chunk: int) -> Iterator[slice]:
    """A side of a weight cut into parts of about `chunk` numbers, 0 for no cut, each `width` numbers wide: multiples of
    64, as even as these can be, so that no product is left with a sliver.
    """
    count = max(1, -(-length * width // chunk)) if chunk else 1
    step = -(-length // (count * NF4_BLOCK)) * NF4_BLOCK
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def chunk_of(capability: int) -> int:
    """The chunk of a GPU; an unknown one takes that of the nearest known, of two as near the older's."""
    return CHUNKS[min(CHUNKS, key=lambda known: (abs(known - capability), known))]
