"""How rows are padded and how weights are cut into chunks to be decoded.

Shared by the Triton kernels and by the code that predicts their memory without Triton.
"""

from __future__ import annotations

from collections.abc import Iterator

from .weights import NF4_BLOCK

FEW_ROWS = 64
"""Up to this many rows (modulation, embedders), reading the weight is all the work; 8 bits would only cost accuracy."""

LANES = 32
"""The padding behind each row is a multiple of this many columns, so that every row starts at a multiple of 64 bytes.
"""

MILLION = 1 << 20
WHOLE = 64 * MILLION
"""More weights than any layer of FLUX has."""

CHUNKS = {80: WHOLE, 86: WHOLE, 89: 27 * MILLION, 90: WHOLE, 120: 27 * MILLION}
"""Compute capability -> how many weights are decoded at a time; fluxq/kernels/triton/shipped.py says why."""


def padding(rank: int) -> int:
    """How many columns the Triton kernels need behind each row of the input of a bf16 layer with LoRA of that rank: one
    for each of x down^T, and one for the 1 that multiplies the bias.
    """
    return -(-(rank + 1) // LANES) * LANES


def parts(length: int, width: int, chunk: int) -> Iterator[slice]:
    """Cut a side of a weight into parts of about `chunk` weights each; the weight is `width` wide on its other side.

    chunk 0: do not cut. Parts are multiples of 64 and as even as possible, so that no product is left with a sliver.
    """
    count = max(1, -(-length * width // chunk)) if chunk else 1
    step = -(-length // (count * NF4_BLOCK)) * NF4_BLOCK
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def chunk_of(capability: int) -> int:
    """The chunk of a GPU. An unknown GPU uses that of the nearest known one; of two equally near, the older."""
    return CHUNKS[min(CHUNKS, key=lambda known: (abs(known - capability), known))]
