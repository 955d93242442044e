"""What a plan takes in practice: training steps on this machine's GPU, with the bytes per owner and the bytes copied.

Weights, slots, LoRA and optimizer state are tensors that can be counted. What is allocated in addition at the end of
the forward pass are the activations; what the peak has on top of all that is the workspace. On a CPU neither is known.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fluxq.config import TrainingConfig
from fluxq.model import Flux, FluxConfig
from fluxq.offload.costs import OWNERS
from fluxq.offload.gpus import GIB
from fluxq.offload.plans import Plan
from fluxq.training.optim import build_optimizer

from .random_model import planned_flux
from .timed_step import OPTIMIZER, Setting, clock_steps, trainer


def measured_row(
    config: FluxConfig, setting: Setting, made: Plan, device: torch.device, steps: int, optimizer: str = OPTIMIZER
) -> dict[str, Any]:
    """Measures `steps` steps of the plan `made` with random weights: it/s, the loss, GB moved per step and per second,
    the peak and its bytes by owner; or says that it ran out of memory.
    """
    try:
        return _measured(config, setting, made, device, steps, optimizer)
    except torch.OutOfMemoryError as error:
        return {"out_of_memory": str(error).split(". ")[0]}
    finally:
        gc.collect()  # the error and the model may refer to each other
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _measured(
    config: FluxConfig, setting: Setting, made: Plan, device: torch.device, steps: int, optimizer: str
) -> dict[str, Any]:
    flux = planned_flux(config, made, setting.rank, device)
    training, copies, after_forward = TrainingConfig(), [0], [0]
    updates = build_optimizer(optimizer, list(flux.parameters()), training.learning_rate, training.weight_decay)
    step = trainer(flux, setting, updates=updates)

    def counted(index: int) -> float:
        before = _copied(flux)
        loss = step(index)
        copies.append(_copied(flux) - before)
        return loss

    def note_allocated(*_: Any) -> None:
        after_forward.append(_allocated(device))

    hook = flux.register_forward_hook(note_allocated)
    try:
        figures = clock_steps(counted, device, setting.batch, steps)
        owned = _owned(flux, updates)
        moved = sum(copies[-steps:]) / steps
        row = {
            "it_s": figures["it_s"],
            "ms": figures["ms"],
            "ok": figures["ok"],
            "loss": figures["loss"],
            "gb_moved_per_step": moved / 1e9,
            "gb_s": moved / 1e9 * figures["it_s"],
        }
        if (peak := figures.get("peak_gib")) is not None:
            owned["activations"] = max(after_forward) - sum(owned.values()) + owned["lora"] // 2  # no gradients yet
            owned["workspace"] = int(peak * GIB) - sum(owned.values())
            row |= {"peak_gib": peak, "reserved_gib": figures["reserved_gib"]}
        row["peak_gib_by_owner"] = {name: owned[name] / GIB for name in OWNERS if name in owned}
        return row
    finally:
        hook.remove()
        if hasattr(flux.ring, "close"):
            flux.ring.close()  # type: ignore[attr-defined]


def _owned(flux: Flux, updates: torch.optim.Optimizer) -> dict[str, int]:
    """Owner -> bytes, as far as tensors can be counted; LoRA with its gradients."""
    slots = {slot.memory.untyped_storage().data_ptr(): slot.memory for slot in getattr(flux.ring, "_slots", ())}
    weights = [b for b in flux.buffers() if b.untyped_storage().data_ptr() not in slots]
    states = [t for state in updates.state.values() for t in state.values() if isinstance(t, Tensor)]
    return {
        "weights": _nbytes(weights),
        "slots": _nbytes(slots.values()),
        "lora": 2 * _nbytes(flux.parameters()),
        "optimizer": _nbytes(t for t in states if t.device == flux.device),
    }


def _nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of `tensors`, each counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _copied(flux: Flux) -> int:
    return getattr(flux.ring, "bytes_copied", 0)


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
