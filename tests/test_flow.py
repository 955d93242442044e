"""Noise by address, the shift's anchors, Euler on a field with a known solution."""

from __future__ import annotations

import math

import pytest
import torch

from fluxq.flow import euler, euler_timesteps, resolution_shift, sample_noise, shift_time


def test_noise_is_addressed_by_step_and_example_not_consumed():
    assert torch.equal(sample_noise((16, 4, 6), 1, 5, ["y", "x"])[1], sample_noise((16, 4, 6), 1, 5, ["x"])[0])
    assert not torch.equal(sample_noise((16, 4, 6), 1, 5, ["x"]), sample_noise((16, 4, 6), 1, 6, ["x"]))


def test_resolution_shift_goes_through_its_two_anchors():
    assert resolution_shift(256) == pytest.approx(math.exp(0.5))
    assert resolution_shift(4096) == pytest.approx(math.exp(1.15))


def test_schedule_is_the_reference_schedule():
    """BFL: t' = e^mu / (e^mu + (1/t - 1)), from 1 to 0."""
    mu = 0.9
    expected = [math.exp(mu) / (math.exp(mu) + (1 / t - 1)) if t > 0 else 0.0 for t in torch.linspace(1, 0, 5).tolist()]
    assert euler_timesteps(4, math.exp(mu)) == pytest.approx(expected)
    assert euler_timesteps(4, 1.0) == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0])


def test_shift_of_one_changes_nothing():
    t = torch.rand(9)
    torch.testing.assert_close(shift_time(t, 1.0), t)


def test_euler_follows_a_straight_path_exactly():
    """A rectified flow between one image and one noise has constant velocity noise - image."""
    image, noise = torch.randn(2, 3), torch.randn(2, 3)
    end = euler(lambda x, t: noise - image, noise, euler_timesteps(7, 3.0))
    torch.testing.assert_close(end, image)


def test_euler_converges_at_first_order():
    """dx/dt = x from t = 1 to 0 ends at x / e; halving the step halves the error."""
    errors = []
    for steps in (50, 100):
        end = euler(lambda x, t: x, torch.ones(1, dtype=torch.float64), euler_timesteps(steps, 1.0))
        errors.append(abs(end.item() - math.exp(-1)))
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.05)
