"""The predicted GPU bytes of a training step, owner by owner, against the bytes that the step allocates.

The trainer's own step (fluxq/bench/timed_step.py) runs with full-width FLUX.1 on `meta`, on a backend that allocates
like the kernels but computes nothing (tests/hollow.py). The slots come from `load_streamed`'s ring, the scratch from
the kernels, and the optimizer's state from the optimizer.
"""

from __future__ import annotations

import gc
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest.mock import patch

import pytest
import torch
from hollow import hollow
from live_bytes import LiveBytes
from torch import Tensor

from fluxq.bench import timed_step
from fluxq.bench.random_model import RandomUnits
from fluxq.formats.quantized import assign
from fluxq.formats.stream import expect_training, load_streamed
from fluxq.kernels.chunks import chunk_of
from fluxq.kernels.dropout import Dropped, dropping
from fluxq.model import Flux, FluxConfig, add_lora
from fluxq.model.blocks import Scale
from fluxq.model.costs import flux_costs
from fluxq.model.lora import lora_layers
from fluxq.model.modulation import is_known_ahead
from fluxq.offload import spread
from fluxq.offload.costs import Costs
from fluxq.offload.footprint import Residency, peak_by_owner
from fluxq.offload.streams import Immediate
from fluxq.training import flat, objective
from fluxq.training.libraries import Uncompiled

META = torch.device("meta")


@dataclass(frozen=True)
class Case:
    """A setting at full width. blocks: double and single ones. resident: number of units; None: all. generation: the
    GPU's compute capability. mostly_kept: activations are half of the peak or more.
    """

    blocks: tuple[int, int]
    format: str
    policy: str
    resident: int | None
    size: int
    rank: int
    batch: int
    compute: str = "bf16"
    text: int = 512
    slots: int = 4
    targets: str = "attention+mlp"
    optimizer: str = "adamw8bit"
    accumulates: bool = False
    generation: int = 86
    mostly_kept: bool = False
    drops: bool = False


CASES = [
    Case((4, 6), "nf4", "recompute", 0, 1024, 16, 1, slots=8),
    Case((3, 5), "nf4", "recompute", 6, 512, 64, 4),
    Case((3, 5), "nf4", "keep_attention", 0, 768, 16, 2, text=256),
    Case((4, 8), "nf4", "keep_qkv", 0, 1024, 128, 1, slots=2, mostly_kept=True),
    Case((3, 6), "nf4", "keep_all8", 0, 1024, 16, 1, mostly_kept=True),
    Case((4, 8), "nf4", "keep_all", 5, 1024, 16, 1, mostly_kept=True),
    Case((3, 7), "nf4", "keep_all", 0, 768, 16, 4, text=77, generation=90, mostly_kept=True),
    Case((4, 8), "int8", "keep_all", 0, 512, 16, 4, compute="int8", mostly_kept=True),
    Case((2, 4), "int8", "recompute", None, 1024, 64, 2, compute="int8_dx"),
    Case((3, 6), "nf4", "keep_all8", 3, 768, 16, 2, compute="int8_dx", mostly_kept=True),
    Case((3, 5), "fp8", "keep_attention", 9, 1024, 16, 1, compute="fp8", generation=89),
    Case((2, 4), "fp8", "keep_all", None, 768, 32, 1),
    Case((2, 4), "bf16", "keep_all", None, 1024, 16, 1),
    Case((3, 6), "nf4", "keep_qkv", 4, 768, 16, 1, optimizer="adamw", accumulates=True),
    Case((3, 6), "nf4", "keep_all", 4, 768, 16, 1, targets="all", mostly_kept=True),
    Case((3, 6), "nf4", "keep_attention", 4, 768, 16, 1, targets=r"single_blocks\.[2-5]\.linear2"),
    Case((3, 5), "nf4", "recompute", 0, 768, 16, 2, drops=True),
    Case((3, 6), "nf4", "keep_all", 3, 768, 64, 2, compute="int8_dx", mostly_kept=True, drops=True),
]


class HollowUnits(RandomUnits):
    """A quantized file whose units have no contents."""

    def __init__(self, config: FluxConfig, format: str) -> None:
        super().__init__(config, format, torch.device("cpu"))

    def read(self, unit: str) -> Tensor:
        return torch.empty(self.length(unit), dtype=torch.uint8, device=META)

    def read_into(self, unit: str, out: Tensor) -> None: ...


def flux_of(case: Case, config: FluxConfig, resident: Collection[str]) -> Flux:
    units, ahead = HollowUnits(config, case.format), is_known_ahead(config, case.targets)
    with META:
        flux = Flux(config)
    if case.resident is None:
        for unit in units.units:
            assign(flux, dict(units.tensors(unit, units.read(unit))))
        flux.eval()
    else:
        flux = load_streamed(units, META, resident, case.slots, Immediate(), ahead=ahead)
    for module in flux.modules():
        if isinstance(module, Scale):
            module.__dict__["is_invertible"] = True  # it cannot be computed without values
    add_lora(flux, case.rank, case.rank, case.targets)
    flux.set_policy(case.policy)
    flux.set_compute(case.compute)
    expect_training(flux)
    return flux


@contextmanager
def a_meta_step(keeps_gradients: bool) -> Iterator[None]:
    """Inside, the trainer's step runs on meta, where no number can be read. keeps_gradients: gradients of an earlier
    micro-step exist, as in gradient accumulation.
    """
    to_host, zero_grad, gather = torch.Tensor.cpu, Uncompiled.zero_grad, flat.Flat.gather

    def host(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype) if tensor.is_meta else to_host(tensor)

    def gather_and_keep(self: flat.Flat) -> None:
        gradients = [p.grad for p in self.parameters]
        gather(self)
        for p, gradient in zip(self.parameters, gradients, strict=True):
            p.grad = gradient

    with (
        patch.object(flat.Flat, "gather", gather_and_keep if keeps_gradients else gather),
        patch.object(torch.Tensor, "tolist", lambda tensor: [0.0] * len(tensor)),
        patch.object(torch.Tensor, "cpu", host),
        patch.object(Uncompiled, "zero_grad", (lambda self: None) if keeps_gradients else zero_grad),
    ):
        yield


@contextmanager
def owners_reported(live: LiveBytes, flux: Flux) -> Iterator[None]:
    """Inside, a step reports the owners of its bytes: activations after forward, LoRA's gradients after backward."""
    loss = objective.flow_loss

    def reporting_loss(*arguments):
        live.belongs("workspace")
        value = loss(*arguments)
        live.belongs("activations")
        return value

    gather = flat.Flat.gather

    def reporting_gather(self: flat.Flat) -> None:
        live.belongs("lora", [p.grad for p in flux.parameters() if p.grad is not None])
        gather(self)

    with patch.object(objective, "flow_loss", reporting_loss), patch.object(flat.Flat, "gather", reporting_gather):
        yield


def counted(case: Case, config: FluxConfig, resident: Collection[str]) -> dict[str, int]:
    """Owner -> bytes at the peak of the second step: scratch and the optimizer's state exist by then, and modulation is
    computed ahead once more.
    """
    build, optimizers = timed_step.build_optimizer, []

    def building(*arguments):
        optimizers.append(build(*arguments))
        return optimizers[-1]

    with hollow(case.generation), LiveBytes(device="meta") as live:
        flux = flux_of(case, config, resident)
        live.belongs("weights")
        if case.resident is not None:
            live.belongs("slots", [slot.memory for slot in flux.ring._slots])
        setting = timed_step.Setting(
            case.format, case.compute, case.policy, case.size, case.batch, case.rank, case.text
        )
        masks = Dropped(
            torch.ones(case.batch, case.rank, device=META), 0.1, torch.zeros(1, dtype=torch.long, device=META)
        )
        by_layer = dict.fromkeys(lora_layers(flux).values(), masks) if case.drops else None
        with (
            patch.object(timed_step, "build_optimizer", building),
            patch.object(objective, "dropping", lambda _: dropping(by_layer)),
            a_meta_step(case.accumulates),
        ):
            step = timed_step.trainer(flux, setting, case.optimizer)
            step(0)
            gc.collect()
            states = optimizers[0].state.values()
            live.belongs("optimizer", [t for state in states for t in state.values() if isinstance(t, Tensor)])
            live.belongs("lora", [own for f in optimizers[0].flats for own in f.tensors])
            live.reset_peak()
            with owners_reported(live, flux):
                step(64)
        peak = live.peak_by_owner()
    peak["workspace"] = peak.get("workspace", 0) + peak.pop("", 0)
    return peak


def costs_of(case: Case, config: FluxConfig) -> Costs:
    return flux_costs(
        config, case.format, case.compute, case.rank, case.targets, case.batch, (case.size // 16) ** 2, case.text,
        case.optimizer, case.accumulates, chunk=chunk_of(case.generation), drops=case.drops,
    )  # fmt: skip


def test_enough_cases_are_mostly_activations():
    assert len(CASES) >= 12 and sum(case.mostly_kept for case in CASES) >= 6


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_predicted_bytes_equal_those_of_the_step_by_owner(case):
    config = replace(FluxConfig.dev(), depth=case.blocks[0], depth_single_blocks=case.blocks[1])
    costs, everything = costs_of(case, config), case.resident is None
    resident = spread([b.units for b in costs.blocks], len(costs.units) if everything else case.resident)
    residency = Residency(0 if everything else case.slots, tuple(resident), costs.window)
    expected = peak_by_owner(costs, [case.policy if b.policies else "" for b in costs.blocks], False, residency)
    if everything:  # including modulation's weights
        expected["weights"] += sum(costs.ahead.values())
    real = counted(case, config, resident)
    total = sum(real.values())
    assert (real["activations"] >= 0.5 * total) == case.mostly_kept
    assert sum(expected.values()) == pytest.approx(total, rel=0.05)
    for owner, nbytes in real.items():
        if nbytes > 0.02 * total:
            assert expected[owner] == pytest.approx(nbytes, rel=0.10), owner
