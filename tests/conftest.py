"""What every test shares: a fixed seed, and uninitialised memory that shows."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # one thread a worker, in the processes that tests start too
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded_and_poisoned():
    """torch.empty returns NaN, so that an output nobody wrote cannot pass for a result."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
