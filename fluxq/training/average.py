"""The moving average of the LoRA over the steps (EMA), in fp32 beside the weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from .flat import Flat


class Average:
    """Of the parameters of `flats`, on their device, 4 bytes per weight.

    After update n it is d average + (1 - d) weights with d = min(decay, (1 + n) / (10 + n)), so that it soon forgets
    the LoRA that training starts from. count: of updates so far.
    """

    def __init__(self, flats: Sequence[Flat], decay: float) -> None:
        self.flats, self.decay, self.count = flats, decay, 0
        self.values = [flat.values.detach().clone() for flat in flats]

    @torch.no_grad()
    def update(self) -> None:
        self.count += 1
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        for average, flat in zip(self.values, self.flats, strict=True):
            average.lerp_(flat.values, 1 - decay)

    def of_parameters(self) -> dict[nn.Parameter, Tensor]:
        """Parameter -> its average, a slice that may be written to."""
        pairs = zip(self.values, self.flats, strict=True)
        return {p: own for values, flat in pairs for p, own in zip(flat.parameters, flat.parts(values), strict=True)}

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Inside, the parameters are the average."""
        with ExitStack() as stack:
            for values, flat in zip(self.values, self.flats, strict=True):
                stack.enter_context(flat.showing(values))
            yield
