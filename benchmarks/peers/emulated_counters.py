"""What the emulated GPU counts during some training steps: launches, waits and copies, and the allocator's peaks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

WAITS = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize")


class GPUCounters:
    """The counters of this process, which runs under tests/emulated_gpu/run.py."""

    def reset(self) -> None:
        import emulated  # type: ignore[import-not-found] - run.py makes it importable

        self._emulated = emulated
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        emulated.reset()

    def report(self) -> dict[str, Any]:
        return self._emulated.report()
