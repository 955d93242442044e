"""An optimizer that averages its weights, for tests without the packages that have some."""

from __future__ import annotations

import torch


class AveragingSGD(torch.optim.SGD):
    """Trains weights y; to evaluate, they are twice as far from z, where each started."""

    def __init__(self, params, lr: float = 0.1, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay)
        self.trains = False
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["z"] = p.detach().clone()

    def step(self, closure=None) -> None:  # type: ignore[override]
        assert self.trains
        super().step()

    def eval(self) -> None:
        self._move(2.0)
        self.trains = False

    def train(self) -> None:
        if not self.trains and self.param_groups[0].get("moved"):
            self._move(0.3)  # not the way back: whoever needs the bits that were there keeps them
        self.trains = True

    def _move(self, factor: float) -> None:
        for group in self.param_groups:
            group["moved"] = True
            for p in group["params"]:
                z = self.state[p]["z"]
                p.data.copy_(z + factor * (p.data - z))
