"""How much an error of the velocity counts, at each latent and each timestep: sd-scripts' losses and weightings.

d is velocity - target, t the timestep (1 is noise), c = huber_scale huber_c(t).

    l2, l1        d^2, |d|
    huber         2 c (sqrt(d^2 + c^2) - c), about d^2 near 0
    smooth_l1     2 (sqrt(d^2 + c^2) - c), about 2 |d| far from 0

    constant      c(t) = huber_c
    exponential   c(t) = huber_c^t, from 1 at the image to huber_c at noise
    snr           c(t) = (1 - huber_c) (1 - t)^2 + huber_c. sd-scripts has it for diffusion models only, where the ratio
                  r of noise to signal gives (1 - huber_c) / (1 + r)^2 + huber_c; in a flow r is t / (1 - t)

    sigma_sqrt    weight t^-2: one step at t = 0.1 counts as 100 at t = 1
    cosmap        weight 2 / (pi (1 - 2 t + 2 t^2)), twice as much at t = 0.5 as at 0 and 1
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fluxq.config import TrainingConfig

HUBER = ("huber", "smooth_l1")


def weighted_error(settings: TrainingConfig, difference: Tensor, t: Tensor) -> Tensor:
    """The error of each latent, weighted by its timestep, like `difference` (B, C, H, W), velocity - target; t (B,)."""
    error = pointwise_error(settings, difference, t)
    return error if settings.weighting == "none" else error * weight_at(settings.weighting, t)[:, None, None, None]


def predicted(prediction: str, velocity: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """What sd-scripts compares with noise - image: the velocity if "raw", velocity + x if "additive", x - t velocity if
    "sigma_scaled", at noisy latents x. All broadcast.
    """
    if prediction == "raw":
        return velocity
    return velocity + x if prediction == "additive" else x - t * velocity


LOWEST_SIGMA = 1e-3
"""Where sigma_sqrt stops growing: the lowest of sd-scripts' thousand levels."""


def pointwise_error(settings: TrainingConfig, difference: Tensor, t: Tensor) -> Tensor:
    kind = settings.loss
    if kind == "l2":
        return difference.square()
    if kind == "l1":
        return difference.abs()
    if kind not in HUBER:
        raise ValueError(f"the loss must be one of l2, l1, {', '.join(HUBER)}, not {kind!r}")
    c = settings.huber_scale * huber_c_at(settings.huber_schedule, settings.huber_c, t)[:, None, None, None]
    squared = difference.square()
    smooth = 2 * squared / ((squared + c.square()).sqrt() + c)  # the root minus c, without losing digits
    return c * smooth if kind == "huber" else smooth


def huber_c_at(schedule: str, c: float, t: Tensor) -> Tensor:
    """c(t) (B,) of huber and smooth_l1, where an error goes from being squared to being linear; t (B,)."""
    if schedule == "constant":
        return torch.full_like(t, c)
    if schedule == "exponential":
        return c**t
    if schedule == "snr":
        return (1 - c) * (1 - t).square() + c
    raise ValueError(f"the schedule of huber_c must be constant, exponential or snr, not {schedule!r}")


def weight_at(weighting: str, t: Tensor) -> Tensor:
    """The weight (B,) of the loss at timesteps t (B,)."""
    if weighting == "sigma_sqrt":
        return t.clamp(min=LOWEST_SIGMA) ** -2
    if weighting == "cosmap":
        return 2 / (math.pi * (1 - 2 * t + 2 * t.square()))
    raise ValueError(f"the weighting must be none, sigma_sqrt or cosmap, not {weighting!r}")
