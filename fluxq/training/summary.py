"""What a run says about itself at its start and at its end: what trains, and why it is slower than it could be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fluxq.allocator import has_expandable_segments
from fluxq.config import TrainConfig
from fluxq.console import plural
from fluxq.memory.machine import notes, read_machine
from fluxq.model.flux import Flux
from fluxq.models import Models
from fluxq.offload import StreamingRing
from fluxq.offload.arena import Arena

from .defaults import Epoch, not_full
from .health import high_learning_rate
from .optim import FlatOptimizer, parameters_of


def summary(
    config: TrainConfig,
    models: Models,
    flux: Flux,
    epoch: Epoch,
    layers: int,
    optimizer: FlatOptimizer,
) -> list[str]:
    """A line on the model, what trains, and the images; then one for each thing that makes the run slow or risky.

    layers: those with LoRA.
    """
    weights, steps = sum(p.numel() for p in parameters_of(optimizer)), config.training.steps or 0
    name = "nano" if models.is_nano else f"FLUX.1 {models.variant}"
    first = (
        f"{name} in {config.model.format}: {weights:,} trainable parameters in {plural(layers, 'layer')}; "
        f"{plural(epoch.images, 'image')}, {plural(epoch.batches, 'batch')} per epoch, {plural(steps, 'step')}"
    )
    return [
        first,
        *not_full(epoch),
        *slow_lines(slower(flux)),
        *high_learning_rate(config.training.learning_rate or 0.0, config.training.optimizer),
    ]


def best_lines(validation: Mapping[str, Any] | None) -> list[str]:
    """Why a run stopped early, and which of its LoRAs is the best. validation: as in result.json."""
    if validation is None:
        return []
    lines, best, base = [validation["stopped_early"]], validation["best"], validation["base_model"]
    if best:
        last, beaten = validation["after"]["held_out"]["loss"], base and base["held_out"]["loss"] <= best["loss"]
        lines.append(
            f"best LoRA, of step {best['step']}: {best['lora']} (held-out loss {best['loss']:.4f}; last {last:.4f})"
        )
        lines += ["warning: no LoRA has a lower held-out loss than the base model"] if beaten else []
    return [line for line in lines if line]


def slow_lines(reasons: list[str]) -> list[str]:
    return [f"slower than it could be: {reason}" for reason in reasons]


def slower(flux: Flux) -> list[str]:
    """Why training `flux` here is slower than it could be, a line each."""
    on_gpu = next(flux.buffers()).device.type == "cuda"
    reasons = notes(read_machine())
    if on_gpu and not has_expandable_segments():
        reasons.append(
            "torch's allocator has no expandable segments (they are for Linux, and PYTORCH_ALLOC_CONF may turn them "
            "off), so the plan leaves more GPU memory unused"
        )
    if isinstance(flux.ring, StreamingRing) and isinstance(flux.ring.host, Arena) and (why := flux.ring.host.refused):
        reasons.append(
            f"weights are copied to the GPU from pageable memory: {why}; close other programs, or raise the "
            "limit of locked memory (ulimit -l)"
        )
    if flux.inputs is not None and (why := flux.inputs.refused):
        reasons.append(f"block inputs are copied from and to pageable memory: {why}")
    return reasons
