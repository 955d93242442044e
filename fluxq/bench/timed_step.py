"""The trainer's own step, timed on random images: what `fluxq bench steps` and `make gpu` measure.

A step is what fluxq/train.py does with a batch, by the CPU's clock: sample noise and times, move the batch to the GPU,
flow_loss, backward, clip, read the loss back, update. It leaves out reading the cache, previews, saving, and in int8
the search for outliers: with random weights no layer rotates its input. Modulation is computed ahead for 64 images at
a time, which falls into the warm-up and into one timed step of 64; the median does not show it.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fluxq.allocator import has_expandable_segments
from fluxq.caching.batches import Batch
from fluxq.config import TrainingConfig
from fluxq.kernels.chunks import chunk_of
from fluxq.model import Flux, FluxConfig
from fluxq.model.costs import flux_costs
from fluxq.offload.costs import Costs, Work
from fluxq.offload.gpus import GIB, GPU
from fluxq.training.libraries import library_of
from fluxq.training.objective import Objective
from fluxq.training.optim import FlatOptimizer, build_optimizer, optimizer_step

from .timing import spread, wall

WARM_UP, LEAST = 3, 3
TARGETS = "attention+mlp"
OPTIMIZER = TrainingConfig().optimizer


@dataclass(frozen=True)
class Setting:
    """What one row measures. The planner chooses policy, resident_units, blocks_to_swap and slots where they are None,
    as in training. N blocks to swap are 2 N streamed units.
    """

    format: str = "nf4"
    compute: str = "bf16"
    policy: str | None = None
    resolution: int = 512
    batch: int = 1
    rank: int = 16
    t5_length: int = 512
    resident_units: int | None = None
    blocks_to_swap: int | None = None
    slots: int | None = None


def measure_steps(
    flux: Flux, setting: Setting, steps: int, seconds: float = math.inf, optimizer: str = OPTIMIZER
) -> dict[str, Any]:
    """`clock_steps` of training `flux`."""
    try:
        return clock_steps(trainer(flux, setting, optimizer), flux.device, setting.batch, steps, seconds)
    finally:
        flux.zero_grad(set_to_none=True)


def clock_steps(
    step: Callable[[int], float], device: torch.device, batch: int, steps: int, seconds: float = math.inf
) -> dict[str, Any]:
    """Milliseconds, speed, peak memory and, if the driver reports it, energy per step, of `steps` training steps; or of
    as many as fit into `seconds`, but at least LEAST. WARM_UP untimed steps come first. `step(index)` returns the loss
    once all its work is done.
    """
    energy, cuda = energy_counter(device), device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    for index in range(WARM_UP):
        step(index)
    before, losses, times = energy(), [], []
    while len(times) < steps and (len(times) < LEAST or sum(times) < 1e3 * seconds):
        times.append(wall(lambda: losses.append(step(WARM_UP + len(times)))))
    after, figures = energy(), spread(times)
    it_s = 1e3 / figures["median"]
    row: dict[str, Any] = {"ok": math.isfinite(losses[-1]), "ms": figures, "it_s": it_s, "images_s": batch * it_s}
    row |= {"loss": losses[-1], "joules": None if before is None or after is None else (after - before) / len(times)}
    if cuda:
        row |= {
            "peak_gib": torch.cuda.max_memory_allocated(device) / GIB,
            "reserved_gib": torch.cuda.max_memory_reserved(device) / GIB,
        }
    return row


def trainer(
    flux: Flux, setting: Setting, optimizer: str = OPTIMIZER, updates: FlatOptimizer | None = None
) -> Callable[[int], float]:
    """A function that runs training step `index` on a random batch and returns its loss. updates: the optimizer of the
    LoRA's weights, by default a new one of kind `optimizer`.
    """
    training, device = TrainingConfig(batch=setting.batch), flux.device
    updates = updates or build_optimizer(
        optimizer, flux.parameters(), library_of(optimizer).default_rate()[0], training.weight_decay
    )
    objective = Objective(flux, SameBatch(random_batch(flux.config, setting), setting.resolution), training)

    def step(index: int) -> float:
        loss, _ = optimizer_step(updates, objective, index, 1, 1.0, training.clip)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # a measurement: the clock stops when the update is done
        return loss

    return step


@dataclass(frozen=True)
class SameBatch:
    """Micro-batches that are all `content`, of images of resolution x resolution pixels."""

    content: Batch
    resolution: int

    @property
    def largest(self) -> int:
        return len(self.content.examples)

    def batch(self, index: int) -> Batch:
        return self.content

    def seen_before(self, index: int) -> int:
        return index * self.largest

    def bucket_of(self, index: int) -> tuple[int, int]:
        return self.resolution, self.resolution

    def examples_of(self, index: int) -> list[str]:
        return self.content.examples

    def pooled_of(self, index: int) -> Tensor:
        return self.content.pooled


def random_batch(config: FluxConfig, setting: Setting) -> Batch:
    """Random images and captions of the right shapes."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(setting.batch, *shape, generator=generator)

    side = setting.resolution // 8
    txt = 0.1 * randn(setting.t5_length, config.context_in_dim)
    names = [f"random/{i}" for i in range(setting.batch)]
    return Batch(randn(config.in_channels // 4, side, side), txt.bfloat16(), 0.1 * randn(config.vec_in_dim), names)


def costs_of(setting: Setting, config: FluxConfig, gpu: GPU | None, optimizer: str = OPTIMIZER) -> Costs:
    """The table of the setting's steps on a GPU, or without one."""
    s, tokens = setting, (setting.resolution // 16) ** 2
    expandable = has_expandable_segments()
    return flux_costs(
        config,
        s.format,
        s.compute,
        s.rank,
        TARGETS,
        s.batch,
        tokens,
        s.t5_length,
        optimizer,
        chunk=chunk_of(gpu.capability) if gpu else 0,
        library=gpu.library if gpu else 0,
        expandable=expandable,
    )


def rates(costs: Costs, policies: Sequence[str], ms: float, gpu: GPU | None) -> dict[str, Any]:
    """TFLOP of a step (recomputation included), TFLOP/s, and the share of the GPU's measured peak: the time that its
    products would take at the rate of a large product of their type, over the time of the step.
    """
    work = costs.outside
    for block, policy in zip(costs.blocks, policies, strict=True):
        work += block.forward
        if kept := block.policies.get(policy):
            work += kept.replay + block.backward
    share = None if gpu is None else ideal_seconds(work, gpu) / (ms / 1e3)
    return {"tflop": work.flops / 1e12, "tflops": work.flops / (1e9 * ms), "share_of_peak": share}


def ideal_seconds(work: Work, gpu: GPU) -> float:
    pairs = (
        (work.bf16 + work.attention + work.attention_backward, gpu.bf16), (work.int8, gpu.int8), (work.fp8, gpu.fp8)
    )  # fmt: skip
    return sum(flops / (rate * 1e12) if rate else math.nan for flops, rate in pairs if flops)


def energy_counter(device: torch.device) -> Callable[[], float | None]:
    """A function that reads the GPU's energy counter in joules, or None without one (GPUs before Volta, WSL)."""
    if device.type != "cuda":
        return lambda: None
    try:
        nvml = ctypes.CDLL("nvml.dll" if hasattr(ctypes, "WinDLL") else "libnvidia-ml.so.1")
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
        handle = ctypes.c_void_p()
        if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByUUID(uuid, ctypes.byref(handle)):
            return lambda: None
    except (OSError, AttributeError):
        return lambda: None

    def read() -> float | None:
        millijoules = ctypes.c_ulonglong()
        error = nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules))
        return None if error else millijoules.value / 1e3

    return read
