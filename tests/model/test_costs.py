"""The table of costs: weights to the byte, FLOPs and kept bytes by hand, and peaks against counted bytes.

The byte ring runs the model's own code at full width on `meta`, over a backend that allocates as the kernels do and
computes nothing (tests/hollow.py).
"""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
from hollow import hollow
from live_bytes import LiveBytes

from fluxq.formats.quantized import layout
from fluxq.formats.shapes import flux_shapes
from fluxq.kernels import NF4Weight, RowScaled
from fluxq.model import Flux, FluxConfig, add_lora
from fluxq.model.blocks import Scale
from fluxq.model.costs import flux_costs, tensors
from fluxq.model.embed import image_ids, text_ids
from fluxq.model.linear import Linear
from fluxq.model.units import REST, unit_of
from fluxq.offload.cards import CARDS
from fluxq.offload.planner import Setting, peak_by_owner, plan
from fluxq.offload.plans import Pins

DEV = FluxConfig.dev()
MB = 1e6


@pytest.mark.parametrize("config", [DEV, FluxConfig.schnell(), FluxConfig.nano()])
def test_the_tensors_are_those_of_the_files(config):
    assert dict(tensors(config)) == dict(flux_shapes(config))


@pytest.mark.parametrize("format", ["nf4", "fp8", "int8", "bf16"])
def test_units_have_the_length_that_the_file_gives_them(format):
    costs = flux_costs(DEV, format)
    lengths = {unit: length for unit, (_, length) in layout(flux_shapes(DEV), format).items()}
    assert {**costs.units, **costs.ahead, REST: costs.stays} == lengths
    assert len(costs.units) == 76 and len(costs.ahead) == 57


def test_flops_by_hand():
    """Of each block a token meets 12 D^2 weights, a double block's half or a single block: 57 x 12 x 3072^2 = 6.455e9,
    and two FLOPs for each. LoRA has R (1+3 + 1+1 + 1+4 + 4+1) D in a double block's half, and since a single block's
    first layer is two products, R (1+3 + 1+4 + 5+1) D there. Attention: 4 L^2 D.
    """
    costs = flux_costs(DEV, "nf4", rank=16, img_tokens=1024, txt_tokens=512)
    tokens = 1536
    lora = (
        57 * 2 * tokens * 16 * 22 * 3072
    )  # (1+3) + (1+1) + (1+4) + (4+1) = 16 D in double, (1+3) + (1+4) + (5+1) = 15
    forward = sum(b.forward.bf16 for b in costs.blocks)
    assert forward == pytest.approx(2 * tokens * 57 * 12 * 3072**2, rel=0.01) and forward > 19.8e12
    assert forward - 2 * tokens * 57 * 12 * 3072**2 == pytest.approx(
        2 * tokens * 16 * 3072 * (19 * 16 + 38 * 15), rel=1e-9
    )
    assert lora > 0
    assert sum(b.forward.attention for b in costs.blocks) == pytest.approx(57 * 4 * tokens**2 * 3072)
    replayed = {name: costs.blocks[-1].policies[name].replay.bf16 for name in costs.blocks[-1].policies}
    whole = 2 * tokens * 3072**2
    assert replayed["recompute"] == pytest.approx(7 * whole, rel=0.02)  # linear1 alone: 7 of 12 D^2
    assert replayed["keep_attention"] == replayed["recompute"]
    assert replayed["keep_qkv"] == pytest.approx(4 * whole, rel=0.02)  # its MLP rows
    assert replayed["keep_all"] < 0.1 * whole  # only x down^T
    double = costs.blocks[0].policies["recompute"].replay.bf16
    assert double == pytest.approx(8 * whole, rel=0.02)  # qkv 3, proj 1, inner 4


U = 4608 * 3072 * 2  # 1,024 px and 512 text tokens
KEPT = {  # in U and numbers of fp32 a token: as tests/model/test_policies.py counts, and the inputs
    "recompute": ((1, 0), (1, 0)),
    "keep_attention": ((2, 24), (2, 24)),
    "keep_qkv": ((6, 72), (5, 72)),
    "keep_all8": ((8, 73), (7, 73)),
    "keep_all": ((10, 72), (9, 72)),
}


@pytest.mark.parametrize("policy", KEPT)
def test_kept_bytes_by_hand(policy):
    costs = flux_costs(DEV, "nf4")
    for block, (units, numbers) in zip((costs.blocks[0], costs.blocks[-1]), KEPT[policy], strict=True):
        assert block.policies[policy].kept == units * U + numbers * 4 * 4608


# Twelve plans by hand: NF4 units of dev are 63,774,720 bytes at most, 8-bit ones 113.4 MB. LoRA on all blocks is R x
# (19 x 2 x 16 + 38 x 14) x 3072 weights = 56.0 M for R = 16, with 4 bytes each, its state 2 + 8/256. At the turn of
# a step the last block runs backward: the 56 others keep what they keep, the block has 22 U (x, dout, modulated 1
# each, q k v 3, attention's output 1, hidden 4, GELU's output with attention 5, dy 1, dx 5) and 32 columns of room
# behind modulated, GELU's output and dx; the decode scratch is about 9 x 2^20 x 2 = 18.9 MB, or 3072 x 3072 x 2 for
# proj, whole for its bias. Modulation's rows of one step are 2.1 MB, those of coming steps wait on the host. With
# keep_all8 the last block's forward pass is more, 23 U: x and modulated 1 each, its qkv 3, q k v 3, hidden 4 and in
# 8 bits 2, attention's output 1, GELU's 5, the sum's parts 1 and 1, and the double blocks' outputs 1, which wait for
# the end of the pass. What stays are embedders and the last layer, 128 MB.
ROWS = [  # pixels, text tokens, format, policy, resident units, slots, rank, batch
    (1024, 512, "nf4", "recompute", 0, 8, 16, 1),
    (1024, 512, "nf4", "keep_attention", 0, 8, 16, 1),
    (1024, 512, "nf4", "keep_qkv", 0, 4, 16, 1),
    (1024, 512, "nf4", "keep_all8", 0, 4, 16, 1),
    (1024, 512, "nf4", "keep_all", 0, 4, 16, 1),
    (768, 512, "nf4", "keep_all", 20, 4, 16, 1),
    (512, 512, "nf4", "recompute", 40, 8, 16, 1),
    (512, 512, "int8", "keep_all", 0, 4, 16, 1),
    (512, 77, "int8", "keep_qkv", 20, 4, 16, 4),
    (768, 256, "fp8", "keep_attention", 10, 4, 32, 2),
    (1024, 512, "int8", "recompute", 36, 2, 64, 1),
    (512, 512, "bf16", "recompute", 0, 2, 16, 1),
]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_twelve_rows_by_hand(row):
    pixels, text, format, policy, resident, slots, rank, batch = row
    image = (pixels // 16) ** 2
    costs = flux_costs(DEV, format, rank=rank, batch=batch, img_tokens=image, txt_tokens=text)
    pins = Pins(policy=policy, resident_units=resident, slots=slots, offload=False)
    found = plan([costs], CARDS["h200"], pins=pins)
    tokens = batch * (image + text)
    u = tokens * 3072 * 2
    unit = {"nf4": 63_774_720, "int8": 113.41e6, "fp8": 113.41e6, "bf16": 226.57e6}[format]
    lora = rank * (19 * 2 * 16 + 38 * 14) * 3072
    (double, double_small), (single, single_small) = KEPT[policy]
    kept = (19 * double + 38 * single) * u + (19 * double_small + 38 * single_small) * 4 * tokens
    columns = -(-(rank + 1) // 32) * 32
    room = columns * 2 * tokens * 3 + 2 * tokens * rank * 3  # and three x down^T
    block = (
        (23 if policy == "keep_all8" else 22) * u + room + 24 * 3 * 4 * tokens - single * u - single_small * 4 * tokens
    )
    scratch = 0 if format == "bf16" else 3072 * 3072 * 2
    ahead = batch * 2 * (19 * 12 + 38 * 3) * 3072
    expected = dict(
        weights=128.25e6 + resident * unit,
        slots=slots * unit,
        lora=4 * lora,
        optimiser=lora * (2 + 8 / 256),
        activations=kept,
        workspace=block + scratch + ahead,
    )
    for owner, nbytes in expected.items():
        assert found.peak[owner] == pytest.approx(nbytes, rel=0.02), owner
    assert found.peak_bytes == pytest.approx(sum(expected.values()), rel=0.01)
    assert len(found.resident) == resident and found.slots == slots and set(found.policies) == {policy}


def hollow_flux(config: FluxConfig, format: str, compute: str, rank: int, targets: str) -> Flux:
    def empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    with torch.device("meta"):
        flux = Flux(config).to(torch.bfloat16)
    for path, module in flux.named_modules():
        if isinstance(module, Scale):
            module.__dict__["divides_out"] = True  # of no values this cannot be asked
        if isinstance(module, Linear) and unit_of(path) != REST and format != "bf16":
            n, k = module.out_features, module.in_features
            if format == "nf4":
                module.store(NF4Weight(empty(torch.uint8, n, k // 2), empty(torch.float32, n, k // 64)))
            else:
                dtype = torch.int8 if format == "int8" else torch.float8_e4m3fn
                module.store(RowScaled(empty(dtype, n, k), empty(torch.float32, n)))
    add_lora(flux, rank, rank, targets)
    flux.set_compute(compute)
    return flux


RING = [  # doubles, singles, format, compute, policy, image side in tokens, text, rank, batch, targets
    (1, 2, "nf4", "bf16", "recompute", 32, 512, 16, 1, "attention+mlp"),
    (2, 3, "nf4", "bf16", "keep_attention", 48, 256, 128, 4, "attention+mlp"),
    (1, 4, "nf4", "bf16", "keep_qkv", 48, 512, 16, 1, "attention"),
    (2, 4, "nf4", "bf16", "keep_all8", 64, 512, 16, 1, "attention+mlp"),
    (2, 4, "nf4", "bf16", "keep_all", 48, 77, 16, 2, "attention+mlp"),
    (3, 0, "nf4", "bf16", "keep_qkv", 64, 512, 4, 1, "attention+mlp"),
    (2, 4, "int8", "int8", "keep_all8", 48, 512, 16, 2, "attention+mlp"),
    (1, 2, "int8", "int8_dx", "recompute", 64, 512, 64, 1, "attention+mlp"),
    (2, 4, "nf4", "int8_dx", "keep_all", 32, 512, 16, 4, "attention+mlp"),
    (1, 3, "fp8", "bf16", "keep_qkv", 64, 77, 32, 1, "attention+mlp"),
    (1, 4, "bf16", "bf16", "keep_all", 64, 512, 16, 1, "attention+mlp"),
    (1, 3, "nf4", "bf16", "keep_all", 48, 512, 16, 1, "all"),
    (2, 3, "nf4", "bf16", "keep_attention", 48, 512, 16, 1, r"single_blocks\.\d+\.linear2"),
    (19, 38, "nf4", "bf16", "recompute", 64, 512, 16, 1, "attention+mlp"),
]


@pytest.mark.parametrize("row", RING, ids=str)
def test_the_byte_ring(row):
    """All of the step's peak within 2 %, and what is kept at its turn, the LoRA and the weights within 1 %."""
    doubles, singles, format, compute, policy, side, text, rank, batch, targets = row
    config = replace(DEV, depth=doubles, depth_single_blocks=singles)
    flux = hollow_flux(config, format, compute, rank, targets)
    flux.set_policy(policy)

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    def forward() -> torch.Tensor:
        ids = image_ids(side, side, "meta"), empty(batch, text, 4096), text_ids(text, "meta")
        return flux(empty(batch, side * side, 64), *ids, empty(batch), empty(batch, 768), empty(batch))

    costs = flux_costs(config, format, compute, rank, targets, batch, side * side, text)
    policies = [policy if b.policies else "" for b in costs.blocks]
    peak = peak_by_owner(costs, policies, False, Setting(0, tuple(costs.units), 0))
    modulation = sum(costs.ahead.values())  # here it runs in the step, on the card
    with hollow(), LiveBytes(before=[*flux.buffers(), *flux.parameters()], device="meta") as live:
        held = live.live
        forward().sum().backward()  # the scratch is there from now on
        for parameter in flux.parameters():
            parameter.grad = None
        gc.collect()
        live.reset_peak()
        scratch = live.live - held
        out = forward()
        kept = live.live - held - scratch
        out.sum().backward()
        del out
        gradients = live.live - held - scratch
    assert held == pytest.approx(peak["weights"] + costs.lora + modulation, rel=1e-3)
    assert gradients == pytest.approx(sum(b.gradients for b in costs.blocks) + costs.gradients, rel=0.02)
    last = 0 if not policies[-1] else batch * (side * side + text) * 3072 * 2  # the last layer's input
    assert kept - last == pytest.approx(sum(b.policies[policy].kept for b in costs.blocks if b.policies), rel=0.06)
    total = sum(peak.values()) - costs.optimiser
    assert live.peak - modulation == pytest.approx(total, rel=0.02)
    assert live.peak - held == pytest.approx(total - peak["weights"] - costs.lora, rel=0.03)
