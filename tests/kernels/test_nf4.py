"""NF4 against bitsandbytes: the same bytes, the same numbers, several times the speed (benchmarks/bench_nf4.py)."""

from __future__ import annotations

import pytest
import torch

from fluxq.kernels import dequantize, quantize, unnest_absmax
from fluxq.kernels.reference import NF4_LEVELS

bnb = pytest.importorskip("bitsandbytes.functional")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 64), (33, 192), (130, 4096)])
def test_nf4_has_bitsandbytes_bytes(shape, dtype):
    w = (torch.randn(shape) * torch.rand(shape[0], 1) * 3).to(dtype)
    w[0] = 0  # a block without a largest magnitude
    theirs, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4")
    ours = quantize(w, "nf4")
    assert torch.equal(ours.codes.flatten(), theirs.flatten())
    assert torch.equal(ours.absmax.flatten(), state.absmax)
    assert ours.shape == w.shape


def test_nf4_decides_like_bitsandbytes_at_every_midpoint():
    """Floats just below, at and above each midpoint between levels, in a block whose scale is exactly 1."""
    levels = torch.tensor(NF4_LEVELS)
    midpoints = (levels[1:] + levels[:-1]) / 2
    near = torch.cat([midpoints, *(torch.nextafter(midpoints, torch.tensor(s)) for s in (-2.0, 2.0))])  # 45 values
    w = torch.cat([near, torch.ones(1), levels, torch.zeros(2)]).view(1, 64)
    assert torch.equal(quantize(w, "nf4").codes.flatten(), bnb.quantize_4bit(w, quant_type="nf4")[0].flatten())


def test_nf4_decodes_like_bitsandbytes():
    w = torch.randn(24, 256)
    theirs, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4")
    assert torch.equal(dequantize(quantize(w, "nf4"), torch.float32), bnb.dequantize_4bit(theirs, state))


def test_nested_scales_are_read_like_bitsandbytes():
    w = torch.randn(96, 1024) * torch.rand(96, 1)
    theirs, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True)
    absmax = unnest_absmax(state.absmax, state.state2.code, state.state2.absmax, float(state.offset))
    ours = quantize(w, "nf4")
    decoded = dequantize(type(ours)(theirs.view(96, 512), absmax.view(96, 16)), torch.float32)
    assert torch.equal(decoded, bnb.dequantize_4bit(theirs, state))


def test_decoded_levels_are_kept_by_quantising_again():
    w = dequantize(quantize(torch.randn(8, 128), "nf4"), torch.float32)
    assert torch.equal(dequantize(quantize(w, "nf4"), torch.float32), w)


def test_wrong_width_names_both_numbers():
    with pytest.raises(ValueError, match=r"multiple of 64, not \(3, 96\)"):
        quantize(torch.zeros(3, 96), "nf4")


def test_unknown_format_names_the_known_ones():
    with pytest.raises(ValueError, match="nf4, fp8, int8, bf16, not 'fp4'"):
        quantize(torch.zeros(1, 64), "fp4")
