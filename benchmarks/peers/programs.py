"""fluxq and the published QLoRA recipe as programs that take turns: a whole training step each, from random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import Skip
from benchmarks.peers import peft_lora, qlora_step
from benchmarks.peers.turns import Counters, Turn
from benchmarks.placed import planned
from fluxq.bench.random_model import planned_flux
from fluxq.bench.timed_step import OPTIMIZER, SameBatch, Setting, random_batch
from fluxq.config import TrainingConfig
from fluxq.model import FluxConfig
from fluxq.offload.plans import counted
from fluxq.training.objective import Objective
from fluxq.training.optim import build_optimizer, optimizer_step

FLUXQ, RECIPE = "fluxq", "recipe"
Step = Callable[[int], float]


def serve(program: str, setting: Setting, config: FluxConfig, device: torch.device, counters: Counters) -> None:
    """Run `program`, FLUXQ or RECIPE, in turns until its standard input ends."""
    turn = Turn()
    torch.manual_seed(0)
    try:
        step, facts = (fluxq if program == FLUXQ else recipe)(setting, config, device, turn.mark)
    except Skip as reason:
        turn.answer(skipped=str(reason))
        return
    index = 0
    while True:
        turn.begin(counters, **facts)
        step(index)
        index += 1


def fluxq(
    setting: Setting, config: FluxConfig, device: torch.device, mark: Callable[[str], None]
) -> tuple[Step, dict[str, Any]]:
    """fluxq's own step under the plan that training would make with the setting's policy."""
    made = planned(setting, config, device, OPTIMIZER, format=setting.format, compute=setting.compute)
    flux, training = planned_flux(config, made, setting.rank, device), TrainingConfig(batch=setting.batch)
    updates = build_optimizer(OPTIMIZER, flux.parameters(), training.learning_rate, training.weight_decay)
    objective = Objective(flux, SameBatch(random_batch(config, setting), setting.resolution), training)
    marked = Marked(objective, mark)

    def step(index: int) -> float:
        return optimizer_step(updates, marked, index, 1, 1.0, training.clip)[0]

    plan = {"resident": len(made.resident), "streamed": made.streamed, "policies": counted(made.policies)}
    return step, {"plan": plan} | trained(list(flux.parameters()))


def recipe(
    setting: Setting, config: FluxConfig, device: torch.device, mark: Callable[[str], None]
) -> tuple[Step, dict[str, Any]]:
    model: nn.Module = qlora_step.transformer(config, setting.rank, device)
    step = qlora_step.trainer(model, config, setting, OPTIMIZER, mark)
    return step, trained(peft_lora.trained(model))


def trained(parameters: list[nn.Parameter]) -> dict[str, int]:
    """How much a program trains; each layer has two tensors."""
    return {"layers": len(parameters) // 2, "trained": sum(p.numel() for p in parameters)}


class Marked:
    """An objective that marks the ends of the forward pass and, with the gradient's norm, of the backward pass."""

    def __init__(self, objective: Objective, mark: Callable[[str], None]) -> None:
        self._objective, self._mark = objective, mark

    def loss(self, index: int) -> Tensor:
        loss = self._objective.loss(index)
        self._mark("forward")
        return loss

    def prepare(self, index: int) -> None:
        self._mark("backward")
        self._objective.prepare(index)
