"""Timesteps: densities against closed forms, sd-scripts' levels against a loop over its schedule, strata, addresses."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from fluxq.config import TrainingConfig
from fluxq.training.timesteps import NORMAL, sample_timesteps, timesteps_of

NAMES = [f"example {i}" for i in range(1500)]
SETTINGS = TrainingConfig(
    seed=7, sigmoid_scale=1.3, logit_mean=-0.4, logit_std=0.8, mode_scale=1.29, shift=3.1582, timesteps="uniform"
)
FLUX_SHIFT = math.exp(1.15)  # of 4096 tokens


def normal_cdf(z: float) -> float:
    return 0.5 * (1 + math.erf(z / math.sqrt(2)))


def logit(t: float) -> float:
    return math.log(t / (1 - t))


def inverse_shift(t: float, shift: float) -> float:
    return t / (shift - (shift - 1) * t)


def mode_cdf(t: float) -> float:
    """t = 1 - u - s (cos^2(pi u / 2) - 1 + u) falls with u, so P(T <= t) is 1 - the u that gives t, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(20):
        u = (low + high) / 2
        below = 1 - u - 1.29 * (math.cos(math.pi * u / 2) ** 2 - 1 + u) < t
        low, high = (low, u) if below else (u, high)
    return 1 - low


def cosmap_cdf(t: float) -> float:
    """The integral of 2 / (pi (1 - 2 t + 2 t^2)): 2 / pi times arctan(2 t - 1), plus a half."""
    return 0.5 + 2 / math.pi * math.atan(2 * t - 1)


CDFS = {  # of t before it is shifted, the shift
    "uniform": (lambda t: t, 1),
    "sigmoid": (lambda t: normal_cdf(logit(t) / 1.3), 1),
    "shift": (lambda t: normal_cdf(logit(t) / 1.3), 3.1582),
    "flux_shift": (lambda t: normal_cdf(logit(t) / 1.3), FLUX_SHIFT),
    "sigma": (lambda t: t, 3.1582),
    "logit_normal": (lambda t: normal_cdf((logit(t) - 0.4) / 0.8), 3.1582),  # mean -0.4 is +0.4 toward noise
    "mode": (mode_cdf, 3.1582),
    "cosmap": (cosmap_cdf, 3.1582),
}


@pytest.mark.parametrize(("mode", "strata"), [*((mode, 1) for mode in CDFS), ("uniform", 8), ("logit_normal", 8)])
def test_timesteps_follow_their_closed_form(mode, strata):
    """Kolmogorov-Smirnov at 1,500 samples: one seed in a thousand exceeds 1.95 / sqrt(n) by chance; ours is fixed.

    sd-scripts' levels are a thousandth apart, which the bound leaves room for.
    """
    settings = replace(SETTINGS, timesteps=mode, stratify=strata)
    t = sample_timesteps(settings, 0, NAMES, 4096, len(NAMES)).double().sort().values
    assert t.min() > 0 and t.max() <= 1
    cdf, shift = CDFS[mode]
    at = torch.tensor([cdf(min(inverse_shift(x, shift), 1 - 1e-9)) for x in t.tolist()])
    assert (at - (torch.arange(len(t)) + 0.5) / len(t)).abs().max() < 1.95 / len(t) ** 0.5


def test_modes_differ_from_each_other():
    draws = {m: sample_timesteps(replace(SETTINGS, timesteps=m), 0, NAMES[:50], 1024) for m in CDFS}
    for a in draws:
        assert sum(torch.equal(draws[a], draws[b]) for b in draws) == 1


@pytest.mark.parametrize("u", [0.0, 0.0004, 0.25, 0.5004, 0.9999])
@pytest.mark.parametrize("mode", ["sigma", "mode", "logit_normal"])
def test_levels_are_those_of_sd_scripts_scheduler(mode, u):
    """It makes 1,000 sigmas from 1 down to 0.001, shifts them, and takes the one at int(1000 density(u)).

    At u = 0 its mode takes a 1,001st, which it does not have.
    """
    sigmas = [3.0 * s / (1 + 2.0 * s) for s in ((1000 - i) / 1000 for i in range(1000))]
    density = {
        "sigma": u,
        "mode": 1 - u - 1.29 * (math.cos(math.pi * u / 2) ** 2 - 1 + u),
        "logit_normal": 1 / (1 + math.exp(-(-0.4 + 0.8 * u))),
    }[mode]
    expected = sigmas[min(int(density * 1000), 999)]
    t = timesteps_of(replace(SETTINGS, timesteps=mode, shift=3.0), torch.tensor([u]).double(), 64)
    assert t.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("mode", CDFS)
def test_a_range_holds_all_timesteps_and_is_filled(mode):
    settings = replace(SETTINGS, timesteps=mode, min_timestep=0.25, max_timestep=0.75)
    t, whole = (
        sample_timesteps(settings, 0, NAMES, 64),
        sample_timesteps(replace(SETTINGS, timesteps=mode), 0, NAMES, 64),
    )
    torch.testing.assert_close(t, 0.25 + 0.5 * whole)
    assert t.min() >= 0.25 and t.max() <= 0.75


@pytest.mark.parametrize("strata", [1, 4])
def test_draws_are_addressed_by_step_and_example_not_consumed(strata):
    settings = replace(SETTINGS, timesteps="shift", stratify=strata)
    alone = sample_timesteps(settings, 5, ["x", "y"], 64, 2)
    sample_timesteps(settings, 4, ["q", "r"], 64, 2)
    assert torch.equal(sample_timesteps(settings, 5, ["x", "y"], 64, 2), alone)
    assert not torch.equal(sample_timesteps(settings, 6, ["x", "y"], 64, 2), alone)
    assert not torch.equal(sample_timesteps(replace(settings, seed=8), 5, ["x", "y"], 64, 2), alone)


@pytest.mark.parametrize("mode", ["uniform", "sigmoid"])
def test_strata_each_have_one_of_the_images_in_a_row(mode):
    """Six parts of micro-steps of two images: every three micro-steps, none twice, in an order that changes."""
    settings = replace(SETTINGS, timesteps=mode, stratify=6, sigmoid_scale=1.0)
    orders = []
    for first in range(0, 30, 3):
        t = torch.cat([sample_timesteps(settings, first + i, ["x", "y"], 64, 2) for i in range(3)]).tolist()
        u = [normal_cdf(logit(x)) for x in t] if mode in NORMAL else [1 - x for x in t]
        orders.append([int(6 * x) for x in u])
        assert sorted(orders[-1]) == list(range(6))
    assert len(set(map(tuple, orders))) > 5


def test_unknown_mode_names_the_known_ones():
    with pytest.raises(ValueError, match="one of uniform, sigmoid, shift, flux_shift, sigma, .* cosmap, not 'beta'"):
        sample_timesteps(replace(SETTINGS, timesteps="beta"), 0, ["x"], 64)
