"""Schedules in closed form, and optimisers that start from the same place."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fluxq.optim import build_optimizer, rate_factor


def test_warmup_rises_linearly_to_the_full_rate():
    assert [rate_factor("constant", s, 100, 4) for s in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]


def test_linear_and_cosine_fall_from_the_end_of_warmup_to_zero():
    for step, progress in ((10, 0.0), (55, 0.5), (100, 1.0)):
        assert rate_factor("linear", step, 100, 10) == pytest.approx(1 - progress)
        assert rate_factor("cosine", step, 100, 10) == pytest.approx((1 + math.cos(math.pi * progress)) / 2)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match="constant, linear, cosine, not 'step'"):
        rate_factor("step", 5, 10, 0)
    with pytest.raises(ValueError, match="adamw, adamw8bit, not 'sgd'"):
        build_optimizer("sgd", [], 1e-3, 0.0)


def test_adamw8bit_follows_adamw_closely():
    """On a quadratic bowl both land in the same place; 8 bits of state cost little."""
    ends = {}
    for name in ("adamw", "adamw8bit"):
        torch.manual_seed(3)
        target, p = torch.randn(64, 128), nn.Parameter(torch.randn(64, 128))
        optimizer = build_optimizer(name, [p], 0.05, 0.0)
        for _ in range(120):
            (p - target).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        ends[name] = ((p - target).norm() / target.norm()).item()
        if name == "adamw8bit":
            assert optimizer.state[p]["state1"].dtype == torch.uint8
    assert ends["adamw8bit"] < ends["adamw"] + 0.02 < 0.2
