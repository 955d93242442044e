"""Learning-rate schedules: the factor of the learning rate at a step, a pure function of the settings."""

from __future__ import annotations

import math
from collections.abc import Callable

from fluxq.config import TrainingConfig

TIMESCALE = 10_000
"""Steps over which inverse_sqrt falls to 0.71 without a warm-up, as in transformers; with one, the warm-up's steps."""


def learning_rate_factor(training: TrainingConfig, step: int) -> float:
    """The factor of the learning rate at `step` (0-based): a linear warm-up, then the schedule.

    The schedule falls from 1 to `schedule_floor` by `steps`, which is filled in; constant stays at 1, and inverse_sqrt
    falls without regard to `steps`.
    """
    assert training.steps is not None, "resolve fills it in"
    if step < training.warmup:
        return (step + 1) / training.warmup
    after = step - training.warmup
    progress = min(1.0, after / max(1, training.steps - training.warmup))
    factor = SCHEDULES[training.schedule](training, progress, after)
    return training.schedule_floor + (1 - training.schedule_floor) * factor


def _cosine(training: TrainingConfig, progress: float, _: float) -> float:
    cycle = progress * training.schedule_cycles % 1 if progress < 1 else 1.0
    return (1 + math.cos(math.pi * cycle)) / 2


def _inverse_sqrt(training: TrainingConfig, _: float, after: float) -> float:
    timescale = training.warmup or TIMESCALE
    return math.sqrt(timescale / (timescale + after))


SCHEDULES: dict[str, Callable[[TrainingConfig, float, float], float]] = {
    "constant": lambda training, progress, after: 1.0,
    "linear": lambda training, progress, after: 1 - progress,
    "cosine": _cosine,
    "polynomial": lambda training, progress, after: (1 - progress) ** training.schedule_power,
    "wsd": lambda training, progress, after: min(1.0, (1 - progress) / training.schedule_decay),
    "inverse_sqrt": _inverse_sqrt,
    "rex": lambda training, progress, after: (1 - progress) / (1 - progress / 2),  # Chen et al. 2021
}
"""Name -> a function of the settings, the share of the steps after the warm-up that is done, and their number."""
