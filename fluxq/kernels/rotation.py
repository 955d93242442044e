"""Rotates a layer's input and weight together, to spread outlier channels before both are rounded to 8 bits.

x W^T = (x H)(W H)^T for any orthogonal H. Here H is block-diagonal with regular Hadamard matrices (ConvRot, arXiv
2512.03673), Kronecker products of the 4 x 4 matrix that has -1/2 on its diagonal and 1/2 elsewhere: all entries have
the same magnitude, and the matrix is symmetric and its own inverse. Stored weights are never rotated, only what is
decoded from them; the LoRA sees the unrotated input.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

BLOCKS = (256, 64)
"""Powers of 4, the better first: spreading over more channels leaves less in each."""


def rotation_block(width: int) -> int:
    """The block for vectors of that width: the largest of BLOCKS that divides it, or 0."""
    return next((block for block in BLOCKS if width % block == 0), 0)


def rotate(x: Tensor, block: int) -> Tensor:
    """x H for x (..., K), with the (block, block) matrix H applied to every `block` columns; its own inverse."""
    return (x.unflatten(-1, (-1, block)) @ _hadamard(block, x.dtype, x.device)).flatten(-2)


@cache
def _hadamard(block: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The matrix. Its entries are +-1 / sqrt(block), exact in every float dtype because block is a power of 4."""
    four, matrix = 0.5 - torch.eye(4, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < block:
        matrix = torch.kron(matrix, four)
    return matrix.to(device, dtype)
