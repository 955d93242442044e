"""NF4 against bitsandbytes: the same bytes, the same numbers, several times the speed (benchmarks/bench_kernels.py)."""

from __future__ import annotations

import pytest
import torch

from fluxq.kernels import NF4Weight, dequantize, ops, quantize, reference, unnest_absmax
from fluxq.kernels.reference import NF4_LEVELS

bnb = pytest.importorskip("bitsandbytes.functional")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def close(ours: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal, except that Triton's interpreter truncates bf16 instead of rounding it."""
    assert ours.dtype == expected.dtype
    cut = ours.dtype == torch.bfloat16 and ours.device.type == "cpu"
    torch.testing.assert_close(ours, expected, rtol=2**-7 if cut else 0, atol=0)


def random_nf4(rows: int, columns: int, device: torch.device) -> NF4Weight:
    """Any bytes: also blocks in which no code encodes the largest magnitude."""
    codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, device=device)
    return NF4Weight(codes, torch.rand(rows, columns // 64, device=device) + 0.01)


@pytest.mark.usefixtures("either_backend")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (33, 192), (130, 4096)])
def test_nf4_has_bitsandbytes_bytes(shape, dtype, device):
    w = (torch.randn(shape) * torch.rand(shape[0], 1) * 3).to(dtype)
    w[0] = 0  # a block without a largest magnitude
    theirs, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4")
    ours = quantize(w.to(device), "nf4")
    assert torch.equal(ours.codes.flatten().cpu(), theirs.flatten())
    assert torch.equal(ours.absmax.flatten().cpu(), state.absmax)
    assert ours.shape == w.shape


@pytest.mark.usefixtures("either_backend")
def test_nf4_decides_like_bitsandbytes_at_every_midpoint(device):
    """Floats just below, at and above each midpoint between levels, in a block whose scale is exactly 1."""
    levels = torch.tensor(NF4_LEVELS)
    midpoints = (levels[1:] + levels[:-1]) / 2
    near = torch.cat([midpoints, *(torch.nextafter(midpoints, torch.tensor(s)) for s in (-2.0, 2.0))])  # 45 values
    w = torch.cat([near, torch.ones(1), levels, torch.zeros(2)]).view(1, 64)
    ours = quantize(w.to(device), "nf4").codes.flatten().cpu()
    assert torch.equal(ours, bnb.quantize_4bit(w, quant_type="nf4")[0].flatten())


@pytest.mark.usefixtures("either_backend")
def test_tiny_weights_have_the_same_bytes_on_every_backend(device):
    """Blocks of subnormal numbers, and blocks whose largest magnitude has no finite inverse."""
    w = torch.randn(12, 192) * torch.logspace(-45, -34, 12)[:, None]
    ours, expected = quantize(w.to(device), "nf4"), reference.nf4_quantize(w)
    assert torch.equal(ours.codes.cpu(), expected[0])
    assert torch.equal(ours.absmax.cpu(), expected[1])


@pytest.mark.usefixtures("either_backend")
def test_nan_makes_its_blocks_absmax_nan(device):
    w = torch.randn(3, 128, device=device)
    w[1, 70] = torch.nan
    assert quantize(w, "nf4").absmax.isnan().nonzero().tolist() == [[1, 1]]


@pytest.mark.usefixtures("either_backend")
def test_a_transposed_view_is_quantized_like_its_copy(device):
    w = torch.randn(192, 64, device=device)
    view, copy = quantize(w.t(), "nf4"), quantize(w.t().contiguous(), "nf4")
    assert torch.equal(view.codes, copy.codes)
    assert torch.equal(view.absmax, copy.absmax)


@pytest.mark.usefixtures("either_backend")
def test_nf4_decodes_like_bitsandbytes(device):
    w = torch.randn(24, 256)
    theirs, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4")
    ours = dequantize(quantize(w.to(device), "nf4"), torch.float32)
    assert torch.equal(ours.cpu(), bnb.dequantize_4bit(theirs, state))


@pytest.mark.usefixtures("either_backend")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (33, 192), (70, 1216)])
def test_any_bytes_are_decoded_alike_on_every_path(shape, dtype, device):
    weight = random_nf4(*shape, device)
    expected = reference.nf4_dequantize(weight.codes, weight.absmax, dtype)
    dequantize_ = ops(weight.codes).dequantize
    close(dequantize_(weight, dtype), expected)
    close(dequantize_(weight, dtype, transposed=True), expected.t())


@pytest.mark.usefixtures("either_backend")
@pytest.mark.parametrize("transposed", [False, True])
def test_the_left_columns_of_a_wider_scratch_are_written_and_no_others(transposed, device):
    weight = random_nf4(33, 192, device)
    expected = dequantize(weight, torch.float16)
    expected = expected.t() if transposed else expected
    scratch = torch.full((expected.shape[0] + 1, expected.shape[1] + 13), 7.0, dtype=torch.float16, device=device)
    out = scratch[:-1, : expected.shape[1]]
    ops(weight.codes).dequantize(weight, torch.float16, out, transposed=transposed)
    assert torch.equal(out, expected)
    out.fill_(7.0)
    assert (scratch == 7.0).all()


@pytest.mark.usefixtures("either_backend")
def test_rows_decoded_in_parts_make_the_whole(device):
    weight = random_nf4(40, 192, device)
    whole = dequantize(weight, torch.float32)
    parts = [dequantize(weight[a : a + 16], torch.float32) for a in range(0, 40, 16)]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.usefixtures("either_backend")
def test_columns_decoded_in_parts_make_the_whole(device):
    """A view of columns: strided rows of codes and of scales."""
    weight = random_nf4(33, 384, device)
    left, right = (
        NF4Weight(weight.codes[:, a // 2 : b // 2], weight.absmax[:, a // 64 : b // 64])
        for a, b in ((0, 128), (128, 384))
    )
    whole = dequantize(weight, torch.float32)
    assert torch.equal(dequantize(left, torch.float32), whole[:, :128])
    assert torch.equal(dequantize(right, torch.float32), whole[:, 128:])
    values, scale = ops(weight.codes).to_rows(right, torch.int8)
    whole_values, whole_scale = ops(weight.codes).row_quantize(whole[:, 128:], torch.int8)
    assert torch.equal(values, whole_values)
    assert torch.equal(scale, whole_scale)


def test_nested_scales_are_read_like_bitsandbytes():
    w = torch.randn(96, 1024) * torch.rand(96, 1)
    theirs, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True)
    absmax = unnest_absmax(state.absmax, state.state2.code, state.state2.absmax, float(state.offset))
    ours = quantize(w, "nf4")
    decoded = dequantize(type(ours)(theirs.view(96, 512), absmax.view(96, 16)), torch.float32)
    assert torch.equal(decoded, bnb.dequantize_4bit(theirs, state))


@pytest.mark.usefixtures("either_backend")
def test_decoded_levels_are_kept_by_quantizing_again(device):
    w = dequantize(quantize(torch.randn(8, 128, device=device), "nf4"), torch.float32)
    assert torch.equal(dequantize(quantize(w, "nf4"), torch.float32), w)


def test_wrong_width_names_both_numbers():
    with pytest.raises(ValueError, match=r"multiple of 64, not \(3, 96\)"):
        quantize(torch.zeros(3, 96), "nf4")


def test_unknown_format_names_the_known_ones():
    with pytest.raises(ValueError, match="nf4, fp8, int8, bf16, not 'fp4'"):
        quantize(torch.zeros(1, 64), "fp4")
