"""Timesteps and losses are sd-scripts', written out here per number in fp64; training computes the same."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from helpers import randomize, tiny_config

from fluxq.bench.timed_step import SameBatch
from fluxq.caching import Batch
from fluxq.compat.kohya import loss, read_command, timesteps
from fluxq.config import TrainingConfig
from fluxq.data.randomness import generator, normal
from fluxq.errors import WrongRequest
from fluxq.flow import sample_noise, velocity
from fluxq.model import Flux
from fluxq.training.objective import Objective
from fluxq.training.timesteps import sample_timesteps

Z, U = [-2.1, 0.0, 0.4, 1.7], [1e-6, 0.2503, 0.4507, 0.9999]
HEIGHT, WIDTH = 33, 22  # of latents: 16 x 11 tokens


def options(**values: object) -> dict:
    return read_command([f"--{name}={value}" for name, value in values.items()])


def shifted(t: float, shift: float) -> float:
    return shift * t / (1 + (shift - 1) * t)


def sigma_of(mode: str, scheme: str, z: float, u: float) -> float:
    """With a shift of 2, a sigmoid_scale of 0.7, logit_mean 0.3, logit_std 1.4 and mode_scale 0.8."""
    if mode == "uniform":
        return u
    t = 1 / (1 + math.exp(-0.7 * z))
    if mode == "sigmoid":
        return t
    if mode == "shift":
        return shifted(t, 2)
    if mode == "flux_shift":
        mu = 0.5 + (16 * 11 - 256) * (1.15 - 0.5) / (4096 - 256)
        return math.exp(mu) / (math.exp(mu) + 1 / t - 1)
    if scheme == "logit_normal":
        u = 1 / (1 + math.exp(-(0.3 + 1.4 * z)))
    elif scheme == "mode":
        u = 1 - u - 0.8 * (math.cos(math.pi * u / 2) ** 2 - 1 + u)
    return shifted((1000 - int(1000 * u)) / 1000, 2)


SCHEMES = ("sigma_sqrt", "logit_normal", "mode", "cosmap", "none", "uniform")


@pytest.mark.parametrize("mode", ["sigma", "uniform", "sigmoid", "shift", "flux_shift"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_timesteps_are_those_of_the_draws(mode, scheme):
    shape = dict(sigmoid_scale=0.7, logit_mean=0.3, logit_std=1.4, mode_scale=0.8, discrete_flow_shift=2)
    given = options(timestep_sampling=mode, weighting_scheme=scheme, **shape)
    sigmas, steps = timesteps(given, torch.tensor(Z), torch.tensor(U), HEIGHT, WIDTH)
    wanted = torch.tensor([sigma_of(mode, scheme, z, u) for z, u in zip(Z, U, strict=True)])
    torch.testing.assert_close(sigmas, wanted, rtol=1e-5, atol=0)
    torch.testing.assert_close(steps, 1000 * wanted, rtol=1e-5, atol=0)


def test_levels_are_chosen_in_fp32_as_there():
    """0.017 in fp32 is a little less than 17 thousandths, and 1000 times that is 17 in fp32."""
    sigmas, _ = timesteps(options(discrete_flow_shift=1), torch.zeros(1), torch.tensor([0.017]), 8, 8)
    assert sigmas.item() == pytest.approx(0.983, rel=1e-6)


def error_of(kind: str, schedule: str, d: float, sigma: float) -> float:
    """With a huber_c of 0.03 and a huber_scale of 1.7."""
    c = 1.7 * (0.03 if schedule == "constant" else math.exp(math.log(0.03) / 1000 * 1000 * sigma))
    root = math.sqrt(d * d + c * c)
    return {"l1": abs(d), "l2": d * d, "huber": 2 * c * (root - c), "smooth_l1": 2 * (root - c)}[kind]


def loss_of(v, latents, noise, sigmas, prediction, scheme, kind, schedule, masks, weights) -> float:
    total = 0.0
    for b, sigma in enumerate(sigmas.double().tolist()):
        weight = {"sigma_sqrt": sigma**-2, "cosmap": 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))}.get(scheme, 1)
        sum_here = 0.0
        for i in itertools.product(*map(range, v.shape[1:])):
            of_v, image, eps = (float(x[b][i]) for x in (v, latents, noise))
            x = (1 - sigma) * image + sigma * eps
            of_v = {"raw": of_v, "additive": of_v + x, "sigma_scaled": x - sigma * of_v}[prediction]
            mask = masks[b, 8 * i[1] : 8 * i[1] + 8, 8 * i[2] : 8 * i[2] + 8].double().mean().item()
            sum_here += error_of(kind, schedule, of_v - (eps - image), sigma) * mask
        total += sum_here / v[b].numel() * float(weights[b]) * (weight if prediction == "sigma_scaled" else 1)
    return total / len(v)


@pytest.mark.parametrize("prediction", ["raw", "additive", "sigma_scaled"])
@pytest.mark.parametrize("kind", ["l1", "l2", "huber", "smooth_l1"])
def test_a_loss_is_that_of_its_options(prediction, kind):
    torch.manual_seed(0)
    v, latents, noise = torch.randn(3, 2, 1, 2, 3)
    sigmas, masks, weights = torch.tensor([4e-4, 0.97]), torch.rand(2, 16, 24), torch.tensor([1.0, 0.25])
    for scheme, schedule in itertools.product(SCHEMES, ("constant", "exponential")):
        given = options(model_prediction_type=prediction, weighting_scheme=scheme, loss_type=kind)
        given |= options(huber_schedule=schedule, huber_c=0.03, huber_scale=1.7) | {
            name: given[name] for name in ("model_prediction_type", "weighting_scheme", "loss_type")
        }
        wanted = loss_of(v, latents, noise, sigmas, prediction, scheme, kind, schedule, masks, weights)
        found = loss(given, v, latents, noise, sigmas, masks, weights)
        assert found.shape == () and found.item() == pytest.approx(wanted, rel=1e-5)
        assert loss(given, v, latents, noise, sigmas[:, None, None, None], masks[:, None], weights) == found


def test_the_default_huber_schedule_raises_as_there():
    x = torch.zeros(1, 1, 2, 2)
    with pytest.raises(WrongRequest, match="--huber_schedule constant"):
        loss(options(loss_type="huber"), x, x, x, torch.ones(1))
    assert loss(options(loss_type="l1"), x, x, x, torch.ones(1)) == 0


@pytest.mark.parametrize("prediction", ["raw", "additive", "sigma_scaled"])
@pytest.mark.parametrize("noisy", [0.0, 0.3])
def test_training_computes_that_loss_at_its_own_noise(prediction, noisy):
    torch.manual_seed(0)
    flux = randomize(Flux(tiny_config()))
    c = flux.config
    batch = Batch(torch.randn(2, c.in_channels // 4, 8, 6), torch.randn(2, 5, c.context_in_dim),
                  torch.randn(2, c.vec_in_dim), ["a.png", "b.png"])  # fmt: skip
    weighting = "cosmap" if prediction == "sigma_scaled" else "none"
    training = TrainingConfig(
        batch=2, prediction=prediction, weighting=weighting, loss="smooth_l1", huber_scale=1.7, input_noise=noisy
    )
    t = sample_timesteps(training, 3, batch.examples, 12, 2)
    noise = sample_noise(batch.latents.shape[1:], 42, 3, batch.examples)
    further = torch.stack([normal(noise.shape[1:], 42, "further noise", 3, name) for name in batch.examples])
    mix = t[:, None, None, None]

    def wanted(strength: float) -> float:
        x = (1 - mix) * batch.latents + mix * (noise + strength * further)
        v = velocity(flux, x, t, batch.txt, batch.pooled, 1.0)
        if prediction != "raw":  # what is compared is made of the x that the model sees, and the target is not
            v = v + x if prediction == "additive" else x - mix * v
        given = options(model_prediction_type="raw", loss_type="smooth_l1", huber_schedule="constant", huber_scale=1.7)
        losses = [loss(given, *(y[b : b + 1] for y in (v, batch.latents, noise, t))) for b in range(2)]
        weights = 2 / (math.pi * (1 - 2 * t + 2 * t**2)) if weighting == "cosmap" else torch.ones(2)
        return float((torch.stack(losses) * weights).mean())

    found = float(Objective(flux, SameBatch(batch, 64), training).loss(3))
    assert found == pytest.approx(wanted(noisy), rel=1e-4)
    if noisy:
        drawn = generator(42, "strength of further noise", 3).random()
        random = replace(training, input_noise_random=True)
        assert float(Objective(flux, SameBatch(batch, 64), random).loss(3)) == pytest.approx(
            wanted(noisy * drawn), rel=1e-4
        )
