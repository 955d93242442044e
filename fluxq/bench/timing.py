"""The clock of every measurement: medians and percentiles; on a GPU, the time between two events."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

FLUSH_BYTES = 256 << 20
"""More than any GPU's L2 holds."""
HEAD_START = 2_000_000
"""Cycles, about a millisecond, that the GPU sleeps, so that the work is queued before the clock starts."""


def timed(
    runs: Mapping[str, Callable[[], Any]],
    device: torch.device,
    seconds: float = 0.5,
    cold: bool = True,
    most: int = 50,
) -> dict[str, dict[str, float]]:
    """Milliseconds of each of `runs`, as median, p10 and p90. Runs alternate, so that all meet the same clock rates.

    As many rounds as fit into `seconds`, at least 3 and at most `most`, after two warm-up rounds. cold: each run alone,
    with the GPU's L2 flushed and the CPU's launch time hidden. Otherwise runs follow each other as in training, and a
    CPU that cannot keep up shows.
    """
    clock = _cuda_clock(device, cold) if device.type == "cuda" else _host_clock
    for run in (*runs.values(), *runs.values()):
        run()
    once = sum(ms for run in runs.values() for ms in clock([run])) / 1e3
    rounds = max(3, min(most, int(seconds / max(once, 1e-6))))
    names = list(runs)
    times = clock([runs[name] for _ in range(rounds) for name in names])
    return {name: spread(times[i :: len(names)]) for i, name in enumerate(names)}


def milliseconds(run: Callable[[], Any], device: torch.device, most: int = 20) -> float:
    """The median time of `run` alone, in at most `most` runs."""
    return timed({"": run}, device, most=most)[""]["median"]


def spread(times: Sequence[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile of `times`, and their count."""
    ordered = sorted(times)
    at = lambda share: ordered[round(share * (len(ordered) - 1))]  # noqa: E731
    return {"median": at(0.5), "p10": at(0.1), "p90": at(0.9), "runs": len(ordered)}


def wall(run: Callable[[], Any]) -> float:
    """Milliseconds of `run` by the CPU's clock; GPU work counts only if `run` waits for it."""
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def _host_clock(runs: Sequence[Callable[[], Any]]) -> list[float]:
    return [wall(run) for run in runs]


def _cuda_clock(device: torch.device, cold: bool) -> Callable[[Sequence[Callable[[], Any]]], list[float]]:
    """Measures times between two GPU events."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device) if cold else None

    def clock(runs: Sequence[Callable[[], Any]]) -> list[float]:
        pairs = []
        for run in runs:
            if flush is not None:
                flush.zero_()
                torch.cuda._sleep(HEAD_START)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize(device)
        return [start.elapsed_time(end) for start, end in pairs]

    return clock
