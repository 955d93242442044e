"""Muon (Jordan et al. 2024) for matrices and convolutions: momentum with orthogonalized updates.

On nano it needs clearly fewer steps than AdamW. Matrices of equal shape are orthogonalized in one batch.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor


class Muon(torch.optim.Optimizer):
    """`lr` is a weight's RMS change per step divided by 0.2, so AdamW's learning rates carry over."""

    def __init__(self, parameters: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape[0], parameter[0].numel()].append(parameter)
            for (rows, columns), parameters in by_shape.items():
                momenta = [self._momentum(parameter, group["momentum"]) for parameter in parameters]
                updates = orthogonalize(torch.stack(momenta).reshape(-1, rows, columns))
                reach = 0.2 * max(rows, columns) ** 0.5 * group["lr"]
                for parameter, update in zip(parameters, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update.view_as(parameter), alpha=-reach)

    def _momentum(self, parameter: Tensor, momentum: float) -> Tensor:
        """The running mean of gradients, with Nesterov's look-ahead."""
        state = self.state[parameter]
        if not state:
            state["mean"] = torch.zeros_like(parameter)
        gradient = parameter.grad
        assert gradient is not None
        state["mean"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(state["mean"], momentum)


def orthogonalize(matrices: Tensor) -> Tensor:
    """(N, rows, columns) -> roughly the nearest semi-orthogonal matrices, by five Newton-Schulz steps in bf16."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)
