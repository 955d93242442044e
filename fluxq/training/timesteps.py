"""The timesteps t at which training sees its images: sd-scripts' densities, drawn by address. t = 1 is noise.

u is uniform in [0, 1), z standard normal; s(t) is t shifted by `shift` (flow.shift_time).

    uniform       t = 1 - u
    sigmoid       t = sigmoid(scale z); shift: s of that; flux_shift: the same, by the shift of the image's size
    sigma         t = s(1 - floor(1000 u) / 1000), sd-scripts' thousand sigmas
    logit_normal  as sigma, with sigmoid(mean + std z) in place of u, so a positive mean is less noise
    mode          as sigma, with 1 - u - scale (cos^2(pi u / 2) - 1 + u) in place of u
    cosmap        as sigma, with 1 - 1 / (tan(pi u / 2) + 1) in place of u

The last three are those of Esser et al. 2024. Whatever is drawn is then mapped linearly into min_timestep to
max_timestep. With `stratify`, the u of so many images in a row lie one in each of as many equal parts of [0, 1), in
random order; each for itself is still uniform.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import torch
from torch import Tensor

from fluxq.config import TrainingConfig
from fluxq.data.randomness import generator
from fluxq.flow import resolution_shift, shift_time

SIGMOIDS, SIGMAS = ("sigmoid", "shift", "flux_shift"), ("sigma", "logit_normal", "mode", "cosmap")
SHIFTED = ("shift", *SIGMAS)
"""The modes that use `shift`."""
NORMAL = (*SIGMOIDS, "logit_normal")
USED_BY = {
    "shift": SHIFTED,
    "sigmoid_scale": SIGMOIDS,
    "logit_mean": ("logit_normal",),
    "logit_std": ("logit_normal",),
    "mode_scale": ("mode",),
}
"""Setting -> the modes that use it."""
LEVELS = 1000


def sample_timesteps(
    settings: TrainingConfig, index: int, examples: Sequence[str], tokens: int, most: int = 1
) -> Tensor:
    """Timesteps t (B,) fp32 in (0, 1] for the `examples` of micro-step `index`.

    tokens: the length of one image. most: the most images of any micro-step, which number images for `stratify`.
    """
    parts, normal = settings.stratify, settings.timesteps in NORMAL
    drawn = []
    for place, example in enumerate(examples, index * most):
        draw = generator(settings.seed, "timestep", index, example)
        if parts == 1:
            drawn.append(draw.standard_normal() if normal else draw.random())
        else:
            order = generator(settings.seed, "strata", place // parts).permutation(parts)
            u = max((int(order[place % parts]) + draw.random()) / parts, 2**-53)
            drawn.append(NormalDist().inv_cdf(u) if normal else u)
    t = timesteps_of(settings, torch.tensor(drawn, dtype=torch.float64), tokens)
    return settings.min_timestep + (settings.max_timestep - settings.min_timestep) * t


def timesteps_of(settings: TrainingConfig, drawn: Tensor, tokens: int) -> Tensor:
    """t (B,) fp32 in (0, 1] of the numbers `drawn` (B,): z for the modes in NORMAL, u for the others.

    They are fp64, or fp32 as in sd-scripts, whose levels they then choose to the last digit.
    """
    mode, shift = settings.timesteps, settings.shift
    if mode == "uniform":
        return (1 - drawn).float().clamp(max=1 - 2**-24)
    if mode in SIGMOIDS:
        t = (settings.sigmoid_scale * drawn.float()).sigmoid()
        if mode == "sigmoid":
            return t
        return shift_time(t, shift if mode == "shift" else resolution_shift(tokens))
    if mode == "sigma":
        u = drawn
    elif mode == "logit_normal":
        u = (settings.logit_mean + settings.logit_std * drawn).sigmoid()
    elif mode == "mode":
        u = 1 - drawn - settings.mode_scale * ((math.pi * drawn / 2).cos() ** 2 - 1 + drawn)
    elif mode == "cosmap":
        u = 1 - 1 / ((math.pi * drawn / 2).tan() + 1)
    else:
        raise ValueError(f"the timestep mode must be one of uniform, {', '.join(SIGMOIDS + SIGMAS)}, not {mode!r}")
    levels = (LEVELS - (LEVELS * u).floor().clamp(0, LEVELS - 1)) / LEVELS
    return shift_time(levels, shift).float()
