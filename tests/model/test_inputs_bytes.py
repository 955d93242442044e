"""Block inputs that wait on the host: live bytes of a step at full width fall by what the table of costs predicts."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
from hollow import hollow
from live_bytes import LiveBytes
from torch import Tensor

from fluxq.model import Flux, FluxConfig, add_lora
from fluxq.model.blocks import Scale
from fluxq.model.costs import flux_costs
from fluxq.model.embed import image_ids, text_ids
from fluxq.offload import HostInputs, Immediate
from fluxq.offload.arena import Arena
from fluxq.offload.inputs import INPUTS
from fluxq.offload.planner import Setting, peak_by_owner

CASES = [  # doubles, singles, policy, image side in tokens, text, batch, targets
    (3, 6, "recompute", 32, 512, 1, "attention+mlp"),
    (4, 8, "recompute", 24, 77, 3, "attention+mlp"),
    (0, 9, "keep_attention", 48, 256, 1, "attention+mlp"),
    (9, 0, "keep_all", 24, 512, 2, "attention+mlp"),
    (2, 9, "recompute", 32, 512, 1, r"single_blocks\.[1-8]\.linear2"),
    (3, 6, "keep_all8", 32, 512, 1, "attention"),
]


class Nothing(Immediate):
    """Copies of nothing."""

    def copy(self, slot: Tensor, source: Tensor) -> None: ...


def peaks(flux: Flux, side: int, text: int, batch: int) -> tuple[int, int]:
    """The most bytes beside the model in the second step; and at the turn of it."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    def forward() -> Tensor:
        ids = image_ids(side, side, "meta"), empty(batch, text, 4096), text_ids(text, "meta")
        return flux(empty(batch, side * side, 64), *ids, empty(batch), empty(batch, 768), empty(batch))

    with hollow(), LiveBytes(device="meta") as live:
        for _ in range(2):
            for parameter in flux.parameters():
                parameter.grad = None
            gc.collect()
            live.reset_peak()
            out = forward()
            turn = live.live
            out.sum().backward()
            del out
    return live.peak, turn


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_live_bytes_fall_by_what_is_predicted(case):
    doubles, singles, policy, side, text, batch, targets = case
    config = replace(FluxConfig.dev(), depth=doubles, depth_single_blocks=singles)
    with torch.device("meta"):
        flux = Flux(config).to(torch.bfloat16)
    for module in flux.modules():
        if isinstance(module, Scale):
            module.__dict__["divides_out"] = True  # of no values this cannot be asked
    add_lora(flux, 16, 16, targets)
    flux.set_policy(policy)
    costs = flux_costs(config, "bf16", "bf16", 16, targets, batch, side * side, text)
    policies = [policy if b.policies else "" for b in costs.blocks]
    inputs = sum(b.inputs for b in costs.blocks if b.policies)

    here, turn = peaks(flux, side, text, batch)
    flux.inputs = HostInputs(Nothing(), lambda n: Arena({INPUTS: n}, lambda unit, out: None))
    away, turn_away = peaks(flux, side, text, batch)
    setting = Setting(0, tuple(costs.units), 0)
    predicted = [sum(peak_by_owner(costs, policies, offload, setting).values()) for offload in (False, True)]
    assert turn - turn_away == inputs - 3 * costs.blocks[-1].inputs, "those of the last three blocks are left"
    assert here - away == pytest.approx(predicted[0] - predicted[1], rel=0.1)
    assert here - away > 0.4 * inputs
