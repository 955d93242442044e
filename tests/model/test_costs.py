"""The table of costs: weights to the byte; FLOPs, kept bytes and whole plans against manual calculations.

tests/model/test_byte_ring.py compares peaks with counted bytes.
"""

from __future__ import annotations

import pytest

from fluxq.formats.checkpoint.shapes import flux_shapes
from fluxq.formats.quantized import layout
from fluxq.kernels.chunks import CHUNKS
from fluxq.model import FluxConfig
from fluxq.model.costs import flux_costs, tensors
from fluxq.model.units import REST
from fluxq.offload.gpus import GPUS
from fluxq.offload.planner import plan
from fluxq.offload.plans import Pins

DEV = FluxConfig.dev()
MB = 1e6


@pytest.mark.parametrize("config", [DEV, FluxConfig.schnell(), FluxConfig.nano()])
def test_tensors_are_those_of_the_files(config):
    assert dict(tensors(config)) == dict(flux_shapes(config))


@pytest.mark.parametrize("format", ["nf4", "fp8", "int8", "bf16"])
def test_units_have_the_length_that_the_file_stores(format):
    costs = flux_costs(DEV, format, chunk=CHUNKS[86])
    lengths = {unit: length for unit, (_, length) in layout(flux_shapes(DEV), format).items()}
    modulation = {unit: length for unit, length in lengths.items() if unit.endswith(".mod")}
    if costs.streams:
        assert {**costs.units, **costs.ahead, REST: costs.stays} == lengths and len(costs.ahead) == 57
    else:  # modulation stays too
        assert costs.units | modulation | {REST: costs.stays - sum(modulation.values())} == lengths
    assert len(costs.units) == 76


def test_flops_equal_a_manual_count():
    """A token passes 12 D^2 weights per block (half a double block or a single block): 57 x 12 x 3072^2 = 6.455e9, with
    two FLOPs each. LoRA has R (1+3 + 1+1 + 1+4 + 4+1) D = 16 R D in half a double block. In a single block, whose first
    layer is two products, it has R (1+3 + 1+4 + 5+1) D = 15 R D. Attention: 4 L^2 D.
    """
    costs = flux_costs(DEV, "nf4", rank=16, img_tokens=1024, txt_tokens=512, chunk=CHUNKS[86])
    tokens = 1536
    forward = sum(b.forward.bf16 for b in costs.blocks)
    assert forward == pytest.approx(2 * tokens * 57 * 12 * 3072**2, rel=0.01) and forward > 19.8e12
    assert forward - 2 * tokens * 57 * 12 * 3072**2 == pytest.approx(
        2 * tokens * 16 * 3072 * (19 * 16 + 38 * 15), rel=1e-9
    )
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
KEPT = {  # in U and fp32 numbers per token: what tests/model/test_policies.py counts, and the inputs
    "recompute": ((1, 0), (1, 0)),
    "keep_attention": ((2, 24), (2, 24)),
    "keep_qkv": ((6, 72), (5, 72)),
    "keep_all8": ((8, 73), (7, 73)),
    "keep_all": ((10, 72), (9, 72)),
}


X_DOWN = {"recompute": (1, 1), "keep_attention": (1, 1), "keep_qkv": (3, 1), "keep_all8": (4, 2), "keep_all": (4, 2)}
"""How many layers of all tokens each policy skips in the replay, in a double and a single block."""


@pytest.mark.parametrize("policy", KEPT)
def test_kept_bytes_equal_a_manual_count(policy):
    costs = flux_costs(DEV, "nf4", chunk=CHUNKS[86])
    for block, (units, numbers) in zip((costs.blocks[0], costs.blocks[-1]), KEPT[policy], strict=True):
        skipped = X_DOWN[policy][block is costs.blocks[-1]]
        assert block.policies[policy].kept == units * U + numbers * 4 * 4608 + skipped * 2 * 16 * 4608


# Twelve plans calculated manually. NF4 units of dev have at most 63,774,720 bytes, 8-bit units 113.4 MB. LoRA on all
# blocks has R x (19 x 2 x 16 + 38 x 14) x 3072 weights = 56.0 M for R = 16, with 4 bytes each and 2 + 8/256 bytes of
# state. The peak is where the last block runs backward: the 56 others hold what they keep, and the block has 22 U (x,
# dout, modulated 1 each, q k v 3, attention's output 1, hidden 4, GELU's output with attention 5, dy 1, dx 5) and 32
# padding columns after modulated, GELU's output and dx. The decode scratch holds linear2, 3072 x 15360 x 2 = 94 MB. Of
# layers that the replay skips, x down^T is kept for ranks up to 32. Modulation's rows of one step are 2.1 MB; those of
# later steps are in host memory. With keep_all8 the last block's forward pass is larger, 23 U: x and modulated 1 each,
# its qkv 3, q k v 3, hidden 4 and in 8 bits 2, attention's output 1, GELU's 5, the sum's parts 1 and 1, and the double
# blocks' outputs 1, which are freed after the pass. Embedders and the last layer always stay: 128 MB.
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
    (512, 512, "bf16", "recompute", 76, 0, 16, 1),
]


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_twelve_plans_equal_manual_calculations(row):
    pixels, text, format, policy, resident, slots, rank, batch = row
    image = (pixels // 16) ** 2
    costs = flux_costs(DEV, format, rank=rank, batch=batch, img_tokens=image, txt_tokens=text, chunk=CHUNKS[86])
    pins = Pins(policy=policy, resident_units=resident, slots=slots or None, offload=False)
    made = plan([costs], GPUS["h200"], pins=pins)
    tokens = batch * (image + text)
    u = tokens * 3072 * 2
    unit = {"nf4": 63_774_720, "int8": 113.41e6, "fp8": 113.41e6, "bf16": 226.57e6}[format]
    lora = rank * (19 * 2 * 16 + 38 * 14) * 3072
    (double, double_small), (single, single_small) = KEPT[policy]
    kept = (19 * double + 38 * single) * u + (19 * double_small + 38 * single_small) * 4 * tokens
    columns = -(-(rank + 1) // 32) * 32
    padding = columns * 2 * tokens * 3 + 2 * tokens * rank * 3  # and three x down^T
    block = (
        (23 if policy == "keep_all8" else 22) * u
        + padding
        + 24 * 3 * 4 * tokens
        - single * u
        - single_small * 4 * tokens
    )
    if policy == "keep_all8":  # the last layer keeps the last block's output
        kept, block = kept + u, block - u
    scratch = 0 if format == "bf16" else 15360 * 3072 * 2
    ahead = batch * 2 * (19 * 12 + 38 * 3) * 3072
    expected = dict(
        weights=128.25e6 + resident * unit + (28.5 * unit if format == "bf16" else 0),  # modulation is not streamed
        slots=slots * unit,
        lora=6 * lora,  # in fp32, and rounded to bf16
        optimizer=lora * (2 + 8 / 256),
        activations=kept,
        workspace=block + scratch + ahead,
    )
    for owner, nbytes in expected.items():
        assert made.peak[owner] == pytest.approx(nbytes, rel=0.02), owner
    assert made.peak_bytes == pytest.approx(sum(expected.values()), rel=0.01)
    assert len(made.resident) == resident and made.slots == slots and set(made.policies) == {policy}


@pytest.mark.parametrize(
    ("pixels", "offload", "gib"), [(1024, False, 4.6), (1024, True, 3.2), (512, False, 3.0), (512, True, 2.5)]
)
def test_predicted_peak_with_all_units_streamed(pixels, offload, gib):
    costs = flux_costs(DEV, "nf4", rank=16, batch=1, img_tokens=(pixels // 16) ** 2, txt_tokens=512, chunk=CHUNKS[86])
    pins = Pins(resident_units=0, slots=8, policy="recompute", offload=offload)
    made = plan([costs], GPUS["h200"], pins=pins)
    print(f"{pixels} px, inputs on the {'host' if offload else 'GPU'}: {made.peak_bytes / 2**30:.2f} GiB, predicted")
    assert made.peak_bytes <= gib * 2**30
