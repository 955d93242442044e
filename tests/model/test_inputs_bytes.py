"""Block inputs in host memory: a full-width step's live bytes fall by what the table of costs predicts."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
from hollow import hollow
from live_bytes import LiveBytes
from torch import Tensor

from fluxq.kernels.chunks import CHUNKS
from fluxq.kernels.replay import placeholder
from fluxq.model import Flux, FluxConfig, add_lora
from fluxq.model.blocks import Scale
from fluxq.model.costs import flux_costs
from fluxq.model.embed import image_ids, text_ids
from fluxq.offload import HostInputs, Immediate
from fluxq.offload.arena import Arena
from fluxq.offload.inputs import INPUTS
from fluxq.offload.planner import Residency, peak_by_owner

CASES = [  # doubles, singles, policy, image side in tokens, text, batch, targets
    (3, 6, "recompute", 32, 512, 1, "attention+mlp"),
    (3, 6, "recompute", 24, 77, 3, "attention+mlp"),
    (0, 6, "keep_attention", 48, 256, 1, "attention+mlp"),
    (6, 0, "keep_all", 24, 512, 2, "attention+mlp"),
    (2, 9, "recompute", 32, 512, 1, r"single_blocks\.[1-8]\.linear2"),
    (2, 4, "keep_all8", 32, 512, 1, "attention"),
]


class Nothing(Immediate):
    """Streams whose copies do nothing."""

    def copy(self, slot: Tensor, source: Tensor) -> None: ...


def peaks(flux: Flux, side: int, text: int, batch: int) -> tuple[int, int]:
    """Bytes in addition to the model in the second step: at the peak, and between forward and backward."""

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
            between = live.live
            out.sum().backward()
            del out
    return live.peak, between


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_live_bytes_fall_as_predicted(case):
    doubles, singles, policy, side, text, batch, targets = case
    config = replace(FluxConfig.dev(), depth=doubles, depth_single_blocks=singles)
    with torch.device("meta"):
        flux = Flux(config).to(torch.bfloat16)
    for module in flux.modules():
        if isinstance(module, Scale):
            module.__dict__["is_invertible"] = True  # it cannot be computed without values
    add_lora(flux, 16, 16, targets)
    flux.set_policy(policy)
    costs = flux_costs(config, "bf16", "bf16", 16, targets, batch, side * side, text, chunk=CHUNKS[86])
    policies = [policy if b.policies else "" for b in costs.blocks]
    inputs = sum(b.inputs for b in costs.blocks if b.policies)

    placeholder(1, like=torch.empty((), dtype=torch.bfloat16, device="meta"))  # made once: before bytes count
    on_gpu, between = peaks(flux, side, text, batch)
    flux.inputs = HostInputs(Nothing(), lambda n: Arena({INPUTS: n}, lambda unit, out: None))
    offloaded, between_offloaded = peaks(flux, side, text, batch)
    residency = Residency(0, tuple(costs.units), 0)
    predicted = [sum(peak_by_owner(costs, policies, offload, residency).values()) for offload in (False, True)]
    assert between - between_offloaded == inputs - 3 * costs.blocks[-1].inputs, (
        "the inputs of the last three blocks are still on the GPU"
    )
    assert on_gpu - offloaded == pytest.approx(predicted[0] - predicted[1], rel=0.1)
    assert on_gpu - offloaded > 0.4 * inputs
