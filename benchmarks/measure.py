"""What every measurement shares: what it was made on, the clock, and the file that it goes into."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from fluxq.formats.files import atomic_path

PACKAGES = ("triton", "bitsandbytes", "peft", "diffusers", "torchao", "transformers")
SMI_FIELDS = (
    "name", "driver_version", "pstate", "temperature.gpu", "clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem",
    "power.draw", "power.limit", "power.max_limit",
)  # fmt: skip
FLUSH_BYTES = 256 << 20
"""More than any card's L2 holds."""
HEAD_START = 2_000_000
"""Cycles, about a millisecond, for which the card waits, so that what it is to run has been handed to it by then."""


def about(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on and with."""
    facts: dict[str, Any] = {
        "card": card_name(device),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "packages": {package: version(package) for package in PACKAGES},
        "commit": commit(),
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
            "vram_bytes": properties.total_memory,
            "nvidia_smi": nvidia_smi(),
        }
    return facts


def card_name(device: torch.device) -> str:
    """As nvidia-smi has it: asking torch would open a context on the card."""
    if device.type != "cuda":
        return f"{device.type} {platform.machine()}"
    return nvidia_smi().get("name") or "cuda card"


def nvidia_smi() -> dict[str, str]:
    """The card's name, driver, clocks (MHz) and power (W) at this moment; empty where nvidia-smi does not answer."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    query = ["nvidia-smi", "-i", visible, f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in done.stdout.splitlines()[0].split(",")]
    return dict(zip(SMI_FIELDS, values, strict=False))


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """What COMMIT says, for a tree without git; else git's answer."""
    if os.environ.get("COMMIT"):
        return os.environ["COMMIT"]
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def result_path(out: Path, part: str, device: torch.device) -> Path:
    """<card>_<date>_<part>.json in the folder `out`, which is made."""
    out.mkdir(parents=True, exist_ok=True)
    card = "".join(c if c.isalnum() else "_" for c in card_name(device)).strip("_").lower()
    return out / f"{card}_{datetime.now(UTC):%Y-%m-%d}_{part}.json"


def write(path: Path, report: Mapping[str, Any]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def timed(
    runs: Mapping[str, Callable[[], Any]],
    device: torch.device,
    seconds: float = 0.5,
    cold: bool = True,
    most: int = 50,
) -> dict[str, dict[str, float]]:
    """Milliseconds of each of `runs`, as median, p10 and p90; they alternate, so that all meet the same clocks.

    As many rounds as fit into `seconds`, 3 at least and `most` at most, after two that do not count. `cold`: an op by
    itself, on the card with its L2 flushed and the host's own work hidden. Else runs follow each other as they would in
    training, and a host that cannot keep up shows.
    """
    clock = _cuda_clock(device, cold) if device.type == "cuda" else _host_clock
    for run in (*runs.values(), *runs.values()):
        run()
    once = sum(ms for run in runs.values() for ms in clock([run])) / 1e3
    rounds = max(3, min(most, int(seconds / max(once, 1e-6))))
    names = list(runs)
    times = clock([runs[name] for _ in range(rounds) for name in names])
    return {name: spread(times[i :: len(names)]) for i, name in enumerate(names)}


def spread(times: list[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile of `times`, and their number."""
    ordered = sorted(times)
    at = lambda share: ordered[round(share * (len(ordered) - 1))]  # noqa: E731
    return {"median": at(0.5), "p10": at(0.1), "p90": at(0.9), "runs": len(ordered)}


def _host_clock(runs: list[Callable[[], Any]]) -> list[float]:
    times = []
    for run in runs:
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def _cuda_clock(device: torch.device, cold: bool) -> Callable[[list[Callable[[], Any]]], list[float]]:
    """Times between two events on the card."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device) if cold else None

    def clock(runs: list[Callable[[], Any]]) -> list[float]:
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
