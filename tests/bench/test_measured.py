"""`PeakWatch` says which gradients and activations exist when memory peaks. The allocator's figures are made up."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fluxq.bench.measured import PeakWatch


class Chain(nn.Module):
    """Two layers, whose gradients are made in the order last, first: 4 bytes each."""

    def __init__(self):
        super().__init__()
        self.first, self.last = (nn.Parameter(torch.ones(1)) for _ in range(2))

    def forward(self, x):
        return self.last * (self.first * x)


@pytest.mark.parametrize(
    ("peaks", "gradients", "activations"),
    [
        ((900, 900, 900, 900), 0, 500),  # in the forward pass, which leaves 600 of which 100 were there before
        ((900, 950, 950, 950), 0, 500),  # while the last layer runs backward
        ((900, 950, 960, 960), 4, 296),  # then the last layer's gradient exists; 400 are left, 100 not the step's
        ((900, 950, 960, 999), 8, 92),  # in the update
    ],
)
def test_gradients_count_only_if_they_exist_at_the_peak(peaks, gradients, activations, monkeypatch):
    allocated, at_most = iter((100, 600, 400, 200)), iter(peaks)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: next(allocated))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: next(at_most))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    model = Chain()
    watch = PeakWatch(model, torch.device("cpu"))
    watch.watched(lambda: model(torch.ones(1)).backward())
    assert (watch.gradients, watch.activations) == (gradients, activations)
    watch.close()
    model(torch.ones(1)).backward()  # nobody looks any more
