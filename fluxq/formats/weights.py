"""A source's tensors as numbers to compute with: on a device, in one dtype, each read when it is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fluxq.formats.files import refuse
from fluxq.formats.source import Source


@dataclass(frozen=True)
class StoredWeights:
    """The tensors of `source`, given on `device` in `dtype`; 8-bit ones are scaled in fp32 first."""

    source: Source[Any]
    device: torch.device
    dtype: torch.dtype

    def read(self, name: str) -> Tensor:
        return self.source.value(name, self.dtype, self.device)

    def rows(self, name: str, indices: Tensor) -> Tensor:
        """The rows of a matrix at `indices` (n,). Raises WrongRequest if it has fewer."""
        if (count := self.source.shapes[name][0]) <= int(indices.max()):
            what = f"has {count:,} rows in {name}, but the tokenizer gives the number {int(indices.max()):,}"
            refuse(self.source.path, what, "use the tokenizer that belongs to it")
        return self.source.rows(name, indices.tolist(), self.dtype, self.device)
