"""Losses and weightings against sd-scripts' formulas, written out per number in fp64, with their gradients."""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch
from helpers import randomize, tiny_config

from fluxq.config import TrainingConfig
from fluxq.flow import flow_loss, velocity
from fluxq.model import Flux
from fluxq.training.losses import huber_c_at, weight_at, weighted_error

T = [0.03, 0.5, 0.97]


def c_of(schedule: str, c: float, t: float) -> float:
    if schedule == "constant":
        return c
    if schedule == "exponential":  # sd-scripts: t in thousandths, alpha = -log(c) / 1000
        return math.exp(math.log(c) / 1000 * (1000 * t))
    ratio = t / (1 - t)  # of noise to signal, ((1 - alphas_cumprod) / alphas_cumprod)^(1/2) in sd-scripts
    return (1 - c) / (1 + ratio) ** 2 + c


def loss_and_slope(kind: str, d: float, c: float) -> tuple[float, float]:
    root = math.hypot(d, c)
    return {
        "l2": (d * d, 2 * d),
        "l1": (abs(d), math.copysign(1, d)),
        "huber": (2 * c * (root - c), 2 * c * d / root),
        "smooth_l1": (2 * (root - c), 2 * d / root),
    }[kind]


def weight(weighting: str, t: float) -> float:
    return {"none": 1.0, "sigma_sqrt": t**-2, "cosmap": 2 / (math.pi * (1 - 2 * t + 2 * t * t))}[weighting]


@pytest.mark.parametrize("weighting", ["none", "sigma_sqrt", "cosmap"])
@pytest.mark.parametrize("schedule", ["constant", "exponential", "snr"])
@pytest.mark.parametrize("kind", ["l2", "l1", "huber", "smooth_l1"])
def test_a_loss_and_its_gradient_are_those_of_the_formula(kind, schedule, weighting):
    settings = TrainingConfig(loss=kind, huber_c=0.17, huber_schedule=schedule, weighting=weighting)
    d = torch.tensor([-3.0, -0.2, 1e-3, 0.6, 40.0]).double().expand(3, 2, 1, 5).clone().requires_grad_()
    error = weighted_error(settings, d, torch.tensor(T, dtype=torch.float64))
    error.sum().backward()
    for b, j in itertools.product(range(3), range(5)):
        value, slope = loss_and_slope(kind, d[b, 1, 0, j].item(), c_of(schedule, 0.17, T[b]))
        assert error[b, 1, 0, j].item() == pytest.approx(weight(weighting, T[b]) * value, rel=1e-9)
        assert d.grad[b, 1, 0, j].item() == pytest.approx(weight(weighting, T[b]) * slope, rel=1e-9)


@pytest.mark.parametrize("kind", ["huber", "smooth_l1"])
@pytest.mark.parametrize("schedule", ["constant", "exponential", "snr"])
def test_an_error_of_zero_has_no_gradient_at_either_end(kind, schedule):
    """Also in fp32, at the image and at pure noise, where the snr's ratio has no finite value."""
    settings = TrainingConfig(loss=kind, huber_c=1e-3, huber_schedule=schedule)
    d = torch.zeros(2, 1, 1, 1, requires_grad=True)
    error = weighted_error(settings, d, torch.tensor([0.0, 1.0]))
    error.sum().backward()
    assert error.tolist() == d.grad.tolist() == [[[[0.0]]], [[[0.0]]]]


@pytest.mark.parametrize("kind", ["huber", "smooth_l1"])
def test_a_small_error_beside_a_large_c_keeps_its_digits_in_fp32(kind):
    """sqrt(d^2 + c^2) - c would be 0 there."""
    error = weighted_error(TrainingConfig(loss=kind, huber_c=10), torch.full((1, 1, 1, 1), 1e-4), torch.ones(1))
    assert error.item() == pytest.approx(1e-8 * (1 if kind == "huber" else 0.1), rel=1e-5)


def test_training_minimizes_the_loss_that_is_asked_for_with_weights_of_latents_on_top():
    torch.manual_seed(0)
    flux = randomize(Flux(tiny_config()))
    c = flux.config
    latents, noise = torch.randn(2, 2, c.in_channels // 4, 8, 6)
    txt, pooled, t = torch.randn(2, 5, c.context_in_dim), torch.randn(2, c.vec_in_dim), torch.tensor([0.2, 0.9])
    weights = torch.rand(2, 1, 8, 6)
    settings = TrainingConfig(loss="huber", huber_c=0.3, huber_schedule="exponential", weighting="cosmap")
    given = flux, latents, noise, t, txt, pooled, 1.5, None, None, weights
    found = flow_loss(*given, partial(weighted_error, settings))
    mix = t[:, None, None, None]
    difference = velocity(flux, (1 - mix) * latents + mix * noise, t, txt, pooled, 1.5) - (noise - latents)
    for b in range(2):
        c_here, d = c_of("exponential", 0.3, t[b].item()), difference[b].double()
        errors = 2 * c_here * ((d**2 + c_here**2).sqrt() - c_here) * weights[b].double()
        assert found[b].item() == pytest.approx(weight("cosmap", t[b].item()) * errors.mean().item(), rel=1e-5)
    squares = flow_loss(*given)
    assert torch.equal(squares, flow_loss(*given, partial(weighted_error, TrainingConfig())))


def test_unknown_names_are_told_with_the_known_ones():
    t = torch.tensor([0.5])
    with pytest.raises(ValueError, match="one of l2, l1, huber, smooth_l1, not 'l3'"):
        weighted_error(TrainingConfig(loss="l3"), t, t)
    with pytest.raises(ValueError, match="constant, exponential or snr, not 'x'"):
        huber_c_at("x", 0.1, t)
    with pytest.raises(ValueError, match="none, sigma_sqrt or cosmap, not 'x'"):
        weight_at("x", t)
