"""The data that an op passes on to the linear layer after it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Wants:
    """The form in which a linear layer wants its input.

    padding: free columns behind each row. The layer puts x down^T there, so that base and LoRA are one matrix product
        (the K-extension, README.md).
    dtype: torch.int8 or torch.float8_e4m3fn if the layer multiplies in 8 bits. The producer then also returns the rows
        in 8 bits, each with its scale, and their product with `down` (R, K) if given, in the same pass.
    rotation: the block of columns in which 8-bit rows are rotated before they are rounded, 0 for none (rotation.py).
        Such a layer sets no `down`, because the LoRA needs the unrotated rows; it computes that product itself.
    """

    padding: int = 0
    dtype: torch.dtype | None = None
    down: Tensor | None = None
    rotation: int = 0


class Activations(NamedTuple):
    """A linear layer's input, rows of width K.

    x (..., K + padding) in the model's dtype; the padding is undefined. If the layer wants 8 bits: values (M, K) in 8
    bits and scale (M,) fp32, and with `down` also s = x down^T (M, R), summed in fp32. Gradients flow through x only.
    """

    x: Tensor
    values: Tensor | None = None
    scale: Tensor | None = None
    s: Tensor | None = None
