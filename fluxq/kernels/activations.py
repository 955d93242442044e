"""What passes from the op that produces a linear layer's input to the layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Wants:
    """The form in which a linear layer wants its input.

    padding: columns left free behind each row, where the layer puts x down^T, so that base and LoRA are one matrix product
        (the K-extension, README.md).
    dtype: torch.int8 or torch.float8_e4m3fn where the layer multiplies in 8 bits: the producer gives those rows, each
        with its scale, and with `down` (R, K) their product with it, in the same pass.
    rotation: the block of columns in which 8-bit rows are rotated before they are rounded, 0 for none (rotation.py).
        Such a layer does not ask for a product with `down`, which sees rows as they are, but makes it itself.
    """

    padding: int = 0
    dtype: torch.dtype | None = None
    down: Tensor | None = None
    rotation: int = 0


class Activations(NamedTuple):
    """A linear layer's input, rows of width K.

    x (..., K + padding) in the model's dtype, what lies in the padding undefined; and where they were wanted values (M, K) in
    8 bits, scale (M,) fp32, and s = x down^T (M, R) fp32. Gradients flow through x alone.
    """

    x: Tensor
    values: Tensor | None = None
    scale: Tensor | None = None
    s: Tensor | None = None
