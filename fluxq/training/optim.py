"""Optimizers, learning-rate schedules, and one optimizer step."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fluxq.console import quiet_imports
from fluxq.errors import WrongRequest

OPTIMIZERS = ("adamw", "adamw8bit")
SCHEDULES = ("constant", "linear", "cosine")

Optimizer = TypeVar("Optimizer", bound=torch.optim.Optimizer)


def build_optimizer(
    name: str, parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]], learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """The optimizer `name`: adamw (state in fp32, 8 bytes per weight) or adamw8bit (bitsandbytes; 2 bytes per weight).

    parameters: a list, or torch's groups ("params" and "lr"), which have their own learning rates. The state is
    allocated here, because a first step that runs out of memory for it would be left half done.
    """
    if name == "adamw":
        optimizer = _with_initial_lr(torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay))
        for p in parameters_of(optimizer):
            optimizer.state[p] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(p, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(p, requires_grad=False),
            }
        return optimizer
    if name == "adamw8bit":
        adamw8bit = import_bitsandbytes().optim.AdamW8bit
        optimizer = _with_initial_lr(adamw8bit(parameters, lr=learning_rate, weight_decay=weight_decay))
        for g, group in enumerate(optimizer.param_groups):
            for i, p in enumerate(group["params"]):
                optimizer.init_state(group, p, g, i)
        return optimizer
    raise ValueError(f"the optimizer must be one of {', '.join(OPTIMIZERS)}, not {name!r}")


def import_bitsandbytes() -> ModuleType:
    """bitsandbytes, without torch's compiler, which takes three seconds to load.

    bitsandbytes compiles Python versions of its kernels while it is imported. They are for devices that it has no
    kernels for, and fluxq runs on none of those: while it is imported, functions stay as they are.
    """
    compile = torch.compile
    torch.compile = lambda function=None, **_: (lambda f: f) if function is None else function
    try:
        with quiet_imports():
            return importlib.import_module("bitsandbytes")
    finally:
        torch.compile = compile


def _with_initial_lr(optimizer: Optimizer) -> Optimizer:
    """`optimizer` with the learning rate of each group stored as "initial_lr", which schedules multiply."""
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
    """Optimizer step `step` (0-based): its mean loss, and the norm of its gradient before clipping to `clip`.

    loss_of(index): the loss of a micro-step; the index counts over the whole run, `accumulate` per step. factor:
    multiplies every learning rate. clip 0: no limit. If anything fails before the update, weights and state are
    unchanged. Raises WrongRequest for a gradient that is not finite.
    """
    parameters, losses = parameters_of(optimizer), []
    optimizer.zero_grad()  # an attempt that ran out of memory may have left some
    for index in range(step * accumulate, (step + 1) * accumulate):
        loss = loss_of(index)
        (loss / accumulate).backward()
        losses.append(loss.detach())
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, clip or torch.inf))
    mean = float(torch.stack(losses).mean())  # before the update, since nothing may fail after it
    if not math.isfinite(norm):
        raise WrongRequest(f"the gradient of step {step + 1} is {norm}; the last save is intact; lower --lr")
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    update(optimizer)
    optimizer.zero_grad()
    return mean, norm


def update(optimizer: torch.optim.Optimizer) -> None:
    """optimizer.step(), with the temporary memory that AdamW needs tested first, so that running out changes nothing.

    adamw8bit needs no temporary memory. Raises WrongRequest if memory runs out in the middle all the same: then only
    some weights are updated, and the run cannot continue from them.
    """
    if isinstance(optimizer, torch.optim.AdamW):
        temporary = [torch.empty_like(p) for p in parameters_of(optimizer)]  # as large as the roots of exp_avg_sq
        del temporary
    before = _update_count(optimizer)
    try:
        optimizer.step()
    except torch.OutOfMemoryError as error:
        if _update_count(optimizer) == before:
            raise
        raise WrongRequest(
            "memory ran out while weights were being updated; the last save is intact; close other programs and "
            "continue with --resume"
        ) from error


def _update_count(optimizer: torch.optim.Optimizer) -> float:
    """The number of updates of all weights together, including unfinished ones."""
    return sum(float(state["step"]) for state in optimizer.state.values())


def parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def learning_rate_factor(name: str, step: int, steps: int, warmup: int) -> float:
    """The factor of the learning rate at `step` (0-based) of `steps`: a linear warm-up, then the schedule `name`.

    linear and cosine end at 0.
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
