"""Timestep distributions against closed forms, the shift's anchors, Euler on a field with a known solution."""

from __future__ import annotations

import math

import pytest
import torch

from fluxq.flow import euler, euler_timesteps, resolution_shift, sample_noise, sample_timesteps, shift_time

NAMES = [f"example {i}" for i in range(4000)]


def normal_cdf(z: torch.Tensor) -> torch.Tensor:
    return 0.5 * (1 + torch.erf(z / math.sqrt(2)))


def inverse_shift(t: torch.Tensor, shift: float) -> torch.Tensor:
    return t / (shift - (shift - 1) * t)


CDFS = {
    "uniform": lambda t: t,
    "sigmoid": lambda t: normal_cdf(torch.logit(t)),
    "shift": lambda t: normal_cdf(torch.logit(inverse_shift(t, 3.1582))),
    "flux_shift": lambda t: normal_cdf(torch.logit(inverse_shift(t, math.exp(1.15)))),
}


@pytest.mark.parametrize("mode", CDFS)
def test_timesteps_follow_their_closed_form(mode):
    """Kolmogorov-Smirnov at 4,000 samples: one seed in a thousand exceeds 1.95 / sqrt(n) by chance; ours is fixed."""
    t = sample_timesteps(mode, seed=7, index=0, examples=NAMES, tokens=4096, shift=3.1582).double().sort().values
    assert t.dtype == torch.float64
    assert t.min() > 0 and t.max() < 1
    empirical = (torch.arange(len(t)) + 0.5) / len(t)
    assert (CDFS[mode](t) - empirical).abs().max() < 1.95 / len(t) ** 0.5


def test_modes_differ_from_each_other():
    draws = {m: sample_timesteps(m, 7, 0, NAMES[:50], tokens=1024, shift=2.0) for m in CDFS}
    for a in draws:
        assert sum(torch.equal(draws[a], draws[b]) for b in draws) == 1


def test_draws_are_addressed_by_step_and_example_not_consumed():
    def at(*addresses):
        return [sample_timesteps("shift", 1, i, names, 64, 3.0) for i, names in addresses]

    (a,), (_, b) = at((5, ["x"])), at((4, ["q", "r"]), (5, ["y", "x"]))
    assert torch.equal(a, b[1:])
    assert torch.equal(sample_noise((16, 4, 6), 1, 5, ["y", "x"])[1], sample_noise((16, 4, 6), 1, 5, ["x"])[0])
    assert not torch.equal(sample_noise((16, 4, 6), 1, 5, ["x"]), sample_noise((16, 4, 6), 1, 6, ["x"]))


def test_unknown_mode_names_the_known_ones():
    with pytest.raises(ValueError, match="uniform, sigmoid, shift, flux_shift, not 'cosmap'"):
        sample_timesteps("cosmap", 1, 0, ["x"], 64, 3.0)


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
