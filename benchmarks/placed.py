"""One row of training steps under a plan: what the parts `steps`, `streaming`, `peaks` and `host` share.

The steps are the trainer's own, with random weights placed by the plan (fluxq/bench/measured.py). A row has the figures
under the names that all parts use, the plan, and its predicted peak next to the measured one.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch

from benchmarks.cases import target
from benchmarks.measure import version
from fluxq.bench.measured import measured_row
from fluxq.bench.timed_step import Setting, costs_of
from fluxq.formats.quantized import cache_folder
from fluxq.memory.machine import free_gpu_bytes, ram_bytes
from fluxq.model import FluxConfig
from fluxq.offload.gpus import GIB, GPU, GPUS, measure
from fluxq.offload.planner import plan
from fluxq.offload.plans import Pins, Plan, counted

RANK, T5_LENGTH, ENDLESS = 16, 512, 1 << 60


def config_of(tiny: bool) -> FluxConfig:
    return replace(FluxConfig.nano(), depth=1, depth_single_blocks=1) if tiny else FluxConfig.dev()


def optimizer_of() -> str:
    """The default one if bitsandbytes is installed."""
    return "adamw8bit" if version("bitsandbytes") else "adamw"


def gpu_of(device: torch.device) -> GPU:
    """This machine's GPU, measured once and cached; on a CPU, an arbitrary one."""
    return measure(cache_folder()) if device.type == "cuda" else GPUS["rtx3060"]


def planned(
    setting: Setting, config: FluxConfig, device: torch.device, optimizer: str, vram: int | None = None, **pins: Any
) -> Plan:
    """The plan that training would make. vram: bytes that it may use, by default what is free; pins: what is fixed in
    addition to the policy. Raises WrongRequest if nothing fits.
    """
    gpu = gpu_of(device)
    costs = costs_of(setting, config, gpu, optimizer)
    available = min(vram or ENDLESS, free_gpu_bytes() or ENDLESS)
    ram = (ram_bytes() or (0, None))[1]
    return plan([costs], gpu, available, ram, Pins(policy=setting.policy, **pins))


def row_of(
    made: Plan, setting: Setting, config: FluxConfig, device: torch.device, optimizer: str, steps: int
) -> dict[str, Any]:
    torch.manual_seed(0)  # for LoRA: rows of one setting have the same loss
    found = measured_row(config, setting, made, device, steps, optimizer)
    row: dict[str, Any] = {
        "setting": asdict(setting),
        "predicted_peak_bytes": made.peak_bytes,
        "predicted_s": made.seconds,
        "plan": {
            "resident": len(made.resident),
            "streamed": made.streamed,
            "slots": made.slots,
            "offload": made.offload,
            "policies": counted(made.policies),
        },
    }
    if "ms" not in found:
        return row | found
    row |= {"ok": found["ok"], "ms": {"step": found["ms"]}} | {name: found[name] for name in KEPT if name in found}
    if "peak_gib" in found:
        row |= {f"{name}_bytes": int(found[f"{name}_gib"] * GIB) for name in ("peak", "reserved")}
        row["targets"] = [target("measured over predicted peak", "<= 1.05", row["peak_bytes"] / made.peak_bytes)]
    return row


KEPT = ("it_s", "loss", "gb_moved_per_step", "gb_s", "peak_gib_by_owner")
