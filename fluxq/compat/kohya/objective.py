"""Timesteps and loss as flux_train_network.py computes them, from its options and the random numbers that it drew.

What it does with the velocity v that the model predicts at x = (1 - sigma) latents + sigma noise, by
model_prediction_type:

    raw            v
    additive       v + x
    sigma_scaled   x - sigma v, and only then weighting_scheme weighs the losses

All of it is compared with noise - latents, which only raw is made for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fluxq.config import TrainingConfig
from fluxq.errors import WrongRequest
from fluxq.training.losses import HUBER, pointwise_error, predicted, weight_at
from fluxq.training.timesteps import NORMAL, timesteps_of

DENSITIES = ("logit_normal", "mode")
"""The weighting schemes that are also densities of timestep_sampling = sigma; for all others it is uniform."""


def timesteps(
    options: Mapping[str, Any], z: Tensor, u: Tensor, latent_height: int, latent_width: int
) -> tuple[Tensor, Tensor]:
    """(sigmas (B,) in 0..1, timesteps (B,) in 0..1000), both fp32.

    options: as `read_command` gives them. z, u (B,): the normal and the uniform numbers that sd-scripts would have
    drawn, of which each mode uses one. latent_height and latent_width: of the latents, an 8th of the pixels.
    """
    mode = sampling_mode(options)
    settings = TrainingConfig(
        timesteps=mode,
        shift=options["discrete_flow_shift"],
        **{name: options[name] for name in ("sigmoid_scale", "logit_mean", "logit_std", "mode_scale")},
    )
    tokens = (latent_height // 2) * (latent_width // 2)
    drawn = z.float() if mode in NORMAL else u.float()
    sigmas = drawn if mode == "uniform" else timesteps_of(settings, drawn, tokens)
    return sigmas, sigmas * 1000


def sampling_mode(options: Mapping[str, Any]) -> str:
    """The options' mode of training/timesteps.py."""
    sampling, scheme = options["timestep_sampling"], options["weighting_scheme"]
    return scheme if sampling == "sigma" and scheme in DENSITIES else sampling


def loss(
    options: Mapping[str, Any],
    model_pred: Tensor,
    latents: Tensor,
    noise: Tensor,
    sigmas: Tensor,
    masks: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """The loss of a batch, a number (), of the velocities model_pred (B, C, H, W) at sigmas (B,).

    options: as `read_command` gives them. masks (B, H, W) or (B, 1, H, W) in 0..1, in pixels or in latents. weights
    (B,): --prior_loss_weight for regularization images, 1 for others. --ip_noise_gamma is taken for 0. Raises
    WrongRequest where sd-scripts raises: the schedule snr of huber and smooth_l1.
    """
    mix = sigmas.float().reshape(-1, 1, 1, 1)
    x = (1 - mix) * latents + mix * noise
    kind, scheme = options["model_prediction_type"], options["weighting_scheme"]
    difference = predicted(kind, model_pred.float(), x, mix) - (noise - latents)
    errors = pointwise_error(loss_settings(options), difference, mix.flatten())
    if kind == "sigma_scaled":
        if scheme == "sigma_sqrt":
            errors = errors * mix**-2
        elif scheme == "cosmap":
            errors = errors * weight_at("cosmap", mix)
    if masks is not None:
        masks = masks.to(errors).reshape(len(errors), 1, *masks.shape[-2:])
        errors = errors * F.interpolate(masks, size=errors.shape[-2:], mode="area")
    means = errors.mean(dim=(1, 2, 3))
    return (means if weights is None else means * weights.to(means)).mean()


def loss_settings(options: Mapping[str, Any]) -> TrainingConfig:
    """The options' loss_type and huber_*, in fluxq's settings."""
    kind, schedule = options["loss_type"], options["huber_schedule"]
    if kind in HUBER and schedule == "snr":
        raise WrongRequest(
            f"--loss_type {kind} with --huber_schedule snr, which is the default, does not work for FLUX.1 in "
            "sd-scripts either; add --huber_schedule constant or exponential"
        )
    return TrainingConfig(
        loss=kind, huber_schedule=schedule, huber_c=options["huber_c"], huber_scale=options["huber_scale"]
    )
