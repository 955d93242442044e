"""Optimisers and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from fluxq.quiet import quiet_imports

OPTIMIZERS = ("adamw", "adamw8bit")
SCHEDULES = ("constant", "linear", "cosine")


def build_optimizer(
    name: str, parameters: Iterable[nn.Parameter], rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """`adamw` (states in fp32, 8 bytes a weight) or `adamw8bit` (bitsandbytes; 2 bytes a weight), at learning rate
    `rate`.
    """
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=weight_decay)
    if name == "adamw8bit":
        with quiet_imports():  # late: on some processors this import looks for kernels on a hub
            from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, lr=rate, weight_decay=weight_decay)
    raise ValueError(f"the optimizer must be one of {', '.join(OPTIMIZERS)}, not {name!r}")


def rate_factor(name: str, step: int, steps: int, warmup: int) -> float:
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
