"""Optimizers, learning-rate schedules, and one step of an optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fluxq.console import quiet_imports
from fluxq.errors import WrongRequest

OPTIMIZERS = ("adamw", "adamw8bit")
SCHEDULES = ("constant", "linear", "cosine")

Optimizer = TypeVar("Optimizer", bound=torch.optim.Optimizer)


def build_optimizer(
    name: str, parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]], rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """`adamw` (states in fp32, 8 bytes a weight) or `adamw8bit` (bitsandbytes; 2 bytes a weight), at learning rate
    `rate`, or in groups with rates of their own ("params" and "lr", as torch has them). Its state is there from the
    start: a first step that has no room for it would stop half-way.
    """
    if name == "adamw":
        optimizer = _full_rates(torch.optim.AdamW(parameters, lr=rate, weight_decay=weight_decay))
        for p in parameters_of(optimizer):
            optimizer.state[p] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(p, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(p, requires_grad=False),
            }
        return optimizer
    if name == "adamw8bit":
        with quiet_imports():  # late: on some CPUs this import looks for kernels on a hub
            from bitsandbytes.optim import AdamW8bit

        optimizer = _full_rates(AdamW8bit(parameters, lr=rate, weight_decay=weight_decay))
        for g, group in enumerate(optimizer.param_groups):
            for i, p in enumerate(group["params"]):
                optimizer.init_state(group, p, g, i)
        return optimizer
    raise ValueError(f"the optimizer must be one of {', '.join(OPTIMIZERS)}, not {name!r}")


def _full_rates(optimizer: Optimizer) -> Optimizer:
    """Have every group remember its rate, which schedules multiply."""
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def optimizer_step(
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[int], Tensor],
    step: int,
    accumulate: int,
    factor: float,
    clip: float,
) -> tuple[float, float]:
    """Optimizer step `step`, from 0: its mean loss, and the norm of its gradient before that is clipped to `clip`.

    loss_of(index) is the loss of a micro-step; they are counted over the whole run, `accumulate` a step. Every rate is
    multiplied by `factor`. clip 0: no limit. Whatever fails before the update leaves weights and state as they were.
    Raises WrongRequest for a gradient that is not finite.
    """
    parameters, losses = parameters_of(optimizer), []
    optimizer.zero_grad()  # an attempt that ran out of memory may have left some
    for index in range(step * accumulate, (step + 1) * accumulate):
        loss = loss_of(index)
        (loss / accumulate).backward()
        losses.append(loss.detach())
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, clip or torch.inf))
    mean = float(torch.stack(losses).mean())  # nothing may fail once weights have been updated
    if not math.isfinite(norm):
        raise WrongRequest(f"the gradient of step {step + 1} is {norm}; the last save is good: lower --lr")
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    update(optimizer)
    optimizer.zero_grad()
    return mean, norm


def update(optimizer: torch.optim.Optimizer) -> None:
    """optimizer.step(), which out of memory changes nothing: what AdamW needs for a moment is asked for before.

    adamw8bit needs nothing. Should memory run out in the middle all the same, weights are half old and half new, and
    the run cannot go on from them: WrongRequest says so.
    """
    if isinstance(optimizer, torch.optim.AdamW):
        room = [torch.empty_like(p) for p in parameters_of(optimizer)]  # the roots of exp_avg_sq take its place
        del room
    before = _updates(optimizer)
    try:
        optimizer.step()
    except torch.OutOfMemoryError as error:
        if _updates(optimizer) == before:
            raise
        raise WrongRequest(
            "memory ran out while weights were being updated; the last save is good: close other programs and go on "
            "with --resume"
        ) from error


def _updates(optimizer: torch.optim.Optimizer) -> float:
    """How many updates all weights have had together; begun ones count."""
    return sum(float(state["step"]) for state in optimizer.state.values())


def parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def learning_rate_factor(name: str, step: int, steps: int, warmup: int) -> float:
    """What the learning rate is multiplied by at `step` (0-based) of `steps`: a linear warm-up, then the schedule,
    to 0 at the end.
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    if name == "constant":
        return 1.0
    if name == "linear":
        return 1 - progress
    if name == "cosine":
        return (1 + math.cos(math.pi * progress)) / 2
    raise ValueError(f"the schedule must be one of {', '.join(SCHEDULES)}, not {name!r}")
