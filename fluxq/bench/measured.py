"""What a plan takes in practice: training steps on this machine's GPU, with the bytes per owner and the bytes copied.

Weights, slots, LoRA and optimizer state are tensors that can be counted. `PeakWatch` finds the moment of the peak in
the untimed steps: the gradients that exist then belong to the LoRA, what the step has kept until then are the
activations, and all else is workspace. On a CPU neither is known.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fluxq.config import TrainingConfig
from fluxq.errors import is_out_of_memory
from fluxq.model import Flux, FluxConfig
from fluxq.offload.costs import OWNERS
from fluxq.offload.gpus import GIB
from fluxq.offload.plans import Plan
from fluxq.training.libraries import library_of
from fluxq.training.optim import FlatOptimizer, build_optimizer

from .random_model import planned_flux
from .timed_step import OPTIMIZER, WARM_UP, Setting, clock_steps, trainer


def measured_row(
    config: FluxConfig, setting: Setting, made: Plan, device: torch.device, steps: int, optimizer: str = OPTIMIZER
) -> dict[str, Any]:
    """Measures `steps` steps of the plan `made` with random weights: it/s, the loss, GB moved per step and per second,
    the peak and its bytes by owner; or says that it ran out of memory.
    """
    try:
        return _measured(config, setting, made, device, steps, optimizer)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return {"out_of_memory": str(error).split(". ")[0]}
    finally:
        gc.collect()  # the error and the model may refer to each other
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _measured(
    config: FluxConfig, setting: Setting, made: Plan, device: torch.device, steps: int, optimizer: str
) -> dict[str, Any]:
    flux = planned_flux(config, made, setting.rank, device)
    training, copies = TrainingConfig(), [0]
    updates = build_optimizer(
        optimizer, list(flux.parameters()), library_of(optimizer).default_rate()[0], training.weight_decay
    )
    step = trainer(flux, setting, updates=updates)
    watch = PeakWatch(flux, device) if device.type == "cuda" else None

    def counted(index: int) -> float:
        if watch and index == WARM_UP:
            watch.close()
        before = _copied(flux)
        loss = watch.watched(partial(step, index)) if watch and index < WARM_UP else step(index)
        copies.append(_copied(flux) - before)
        return loss

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
        if watch:
            owned["lora"] += watch.gradients
            owned["activations"] = watch.activations
            owned["workspace"] = int(figures["peak_gib"] * GIB) - sum(owned.values())
            row |= {"peak_gib": figures["peak_gib"], "reserved_gib": figures["reserved_gib"]}
        row["peak_gib_by_owner"] = {name: owned[name] / GIB for name in OWNERS if name in owned}
        return row
    finally:
        if watch:
            watch.close()
        if hasattr(flux.ring, "close"):
            flux.ring.close()  # type: ignore[attr-defined]


class PeakWatch:
    """What a training step of `flux` has allocated when its memory peaks: `gradients` of the LoRA, and `activations`,
    which is everything else that was not there before the step and was made before the block that runs then.

    Reads the allocator's figures when the forward pass ends and whenever a gradient is made, which takes time.
    """

    def __init__(self, flux: Flux, device: torch.device) -> None:
        self.gradients = self.activations = 0
        self._device, self._peak, self._base, self._made, self._before = device, 0, 0, 0, 0
        self._hooks = [p.register_post_accumulate_grad_hook(self._gradient) for p in flux.parameters()]
        self._hooks.append(flux.register_forward_hook(self._forward))

    def watched(self, step: Callable[[], float]) -> float:
        """The result of step()."""
        self._peak, self._made = 0, 0  # the first step is like no other: it allocates what stays
        self._base = self._before = torch.cuda.memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        loss = step()
        self._look()  # the peak may be in the update
        return loss

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _forward(self, *_: Any) -> None:
        self._before = torch.cuda.memory_allocated(self._device)
        self._look()

    def _gradient(self, parameter: Tensor) -> None:
        self._look()
        self._made += 0 if parameter.grad is None else parameter.grad.nbytes
        self._before = torch.cuda.memory_allocated(self._device)

    def _look(self) -> None:
        """Note what exists, if the peak has risen since the last look."""
        if (peak := torch.cuda.max_memory_allocated(self._device)) > self._peak:
            self._peak, self.gradients = peak, self._made
            self.activations = max(0, self._before - self._base - self._made)


def _owned(flux: Flux, updates: FlatOptimizer) -> dict[str, int]:
    """Owner -> bytes, as far as tensors can be counted; LoRA with its rounded copy, without gradients."""
    slots = {slot.memory.untyped_storage().data_ptr(): slot.memory for slot in getattr(flux.ring, "_slots", ())}
    weights = [b for b in flux.buffers() if b.untyped_storage().data_ptr() not in slots]
    states = [t for state in updates.state.values() for t in state.values() if isinstance(t, Tensor)]
    return {
        "weights": _nbytes(weights),
        "slots": _nbytes(slots.values()),
        "lora": _nbytes(t for flat in updates.flats for t in flat.tensors),
        "optimizer": _nbytes(t for t in states if t.device == flux.device),
    }


def _nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of `tensors`, each counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _copied(flux: Flux) -> int:
    return getattr(flux.ring, "bytes_copied", 0)
