"""What every measurement records: machine, versions and commit; and the file it is written to."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from fluxq.allocator import VARIABLES
from fluxq.formats.atomic import atomic_path

PACKAGES = ("triton", "bitsandbytes", "peft", "diffusers", "torchao", "transformers")
SMI_FIELDS = (
    "name", "driver_version", "pstate", "temperature.gpu", "clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem",
    "power.draw", "power.limit", "power.max_limit",
)  # fmt: skip


def about(device: torch.device) -> dict[str, Any]:
    """Machine, GPU and versions of a measurement."""
    facts: dict[str, Any] = {
        "gpu": gpu_name(device),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "packages": {package: version(package) for package in PACKAGES},
        "commit": commit(),
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
        "allocator": next((f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ), None),
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


def gpu_name(device: torch.device) -> str:
    """From nvidia-smi: asking torch would open a context on the GPU."""
    if device.type != "cuda":
        return f"{device.type} {platform.machine()}"
    return nvidia_smi().get("name") or "cuda GPU"


def nvidia_smi() -> dict[str, str]:
    """The GPU's name, driver, clocks (MHz) and power (W) right now; empty if nvidia-smi does not answer."""
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
    """The commit, from the variable COMMIT (for a tree without git) or from git."""
    if os.environ.get("COMMIT"):
        return os.environ["COMMIT"]
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def conditions(*packages: str) -> str:
    """Commit and versions, in the words of a page."""
    versions = {"python": sys.version.split()[0]} | {package: version(package) for package in packages}
    return f"commit {commit()[:10]}; " + ", ".join(f"{name} {number}" for name, number in versions.items())


def result_path(out: Path, part: str, device: torch.device) -> Path:
    """<GPU>_<date>_<part>.json in the folder `out`, which is created."""
    out.mkdir(parents=True, exist_ok=True)
    gpu = "".join(c if c.isalnum() else "_" for c in gpu_name(device)).strip("_").lower()
    return out / f"{gpu}_{datetime.now(UTC):%Y-%m-%d}_{part}.json"


def write(path: Path, report: Mapping[str, Any]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
