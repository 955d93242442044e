"""8-bit weights and activations with a scale per row: the nearest values, the right scales, files keep their bytes."""

from __future__ import annotations

import pytest
import torch
from helpers import relative_error

from fluxq.kernels import NF4Weight, dequantize, lora_linear, ops, quantize, reference
from fluxq.kernels.weights import RowScaled

LARGEST = {"int8": 127.0, "fp8": 448.0}
DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def assert_nearest(values: torch.Tensor, scale: torch.Tensor, w: torch.Tensor) -> None:
    """`values` (N, K) are those nearest to w / scale that the dtype has, up to fp32's rounding of the quotient.

    Beside a tie both neighbors are as near, so two backends may differ there; distances may not.
    """
    largest = LARGEST["int8" if values.dtype == torch.int8 else "fp8"]
    expected = w.abs().amax(1).clamp(min=1e-30) / largest
    torch.testing.assert_close(scale, expected.float(), rtol=1e-6, atol=0)
    candidates = torch.arange(256, dtype=torch.uint8, device=w.device).view(values.dtype).double()
    candidates = candidates[candidates.abs() <= largest].unique()
    exact = w.double() / scale[:, None].double()
    above = torch.searchsorted(candidates, exact.contiguous()).clamp(1, len(candidates) - 1)
    best = torch.minimum((exact - candidates[above - 1]).abs(), (candidates[above] - exact).abs())
    error = (exact - values.double()).abs()
    assert (error <= best + 3e-7 * exact.abs() + 1e-30).all()
    if values.dtype == torch.int8:
        assert values.min() > -128


def stored(format: str, shape: tuple[int, int], device: torch.device):
    """A random weight of that format; NF4 with any bytes, not only those that quantization makes."""
    if format == "nf4":
        codes = torch.randint(0, 256, (shape[0], shape[1] // 2), dtype=torch.uint8, device=device)
        return NF4Weight(codes, torch.rand(shape[0], shape[1] // 64, device=device) + 0.01)
    w = torch.randn(shape, device=device) * (torch.rand(shape[0], 1, device=device) + 0.1)
    return RowScaled(*reference.row_quantize(w, DTYPES[format])) if format in DTYPES else w.to(getattr(torch, format))


@pytest.mark.usefixtures("either_backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", LARGEST)
@pytest.mark.parametrize("shape", [(1, 1), (7, 192), (5, 1100), (3, 15360), (2, 33001)])
def test_every_weight_becomes_the_nearest_one_that_can_be_stored(format, shape, dtype, device):
    w = (torch.randn(shape, device=device) * torch.rand(shape[0], 1, device=device) * 10).to(dtype)
    q = quantize(w, format)
    assert q.shape == w.shape
    assert_nearest(q.values, q.scale, w.float())
    assert q.values.float().abs().max() == LARGEST[format]


@pytest.mark.usefixtures("either_backend")
@pytest.mark.parametrize("format", LARGEST)
@pytest.mark.parametrize("shape", [(7, 192), (2, 33001)])
def test_columns_are_multiplied_before_rows_are_rounded(format, shape, device):
    w = torch.randn(shape, device=device).bfloat16()
    columns = torch.rand(shape[1], device=device) * 2 + 0.1
    values, scale = ops(w).row_quantize(w, DTYPES[format], columns)
    assert_nearest(values, scale, w.float() * columns)


@pytest.mark.usefixtures("either_backend")
@pytest.mark.parametrize("format", LARGEST)
def test_rows_may_be_strided_and_the_matrix_transposed(format, device):
    wide = torch.randn(9, 40, device=device)
    w = wide[:, 5:24]
    for view in (w, w.t()):
        values, scale = ops(w).row_quantize(view, DTYPES[format])
        copied, copied_scale = ops(w).row_quantize(view.contiguous(), DTYPES[format])
        assert torch.equal(values.view(torch.uint8), copied.view(torch.uint8))
        assert torch.equal(scale, copied_scale)


@pytest.mark.usefixtures("triton_ops")
@pytest.mark.parametrize("width", [191, 33001])
def test_the_kernel_writes_its_rows_and_nothing_behind_them(width, device):
    from fluxq.kernels.triton import rows

    memory = torch.full((4, width), 77, dtype=torch.int8, device=device)
    rows._scales(torch.randn(3, width, device=device), torch.int8, None, memory[:3], 0, slice(0, 3))
    assert (memory[3] == 77).all()


@pytest.mark.parametrize(("format", "bound"), [("int8", 0.012), ("fp8", 0.028), ("nf4", 0.095)])
def test_error_on_normal_weights_is_that_of_the_format(format, bound):
    """A row's largest of 3,072 normal weights is about 3.6 deviations: int8's step is then 0.028, its error 0.8 %."""
    w = torch.randn(64, 3072)
    assert bound / 2 < relative_error(dequantize(quantize(w, format), torch.float32), w) < bound


@pytest.mark.usefixtures("either_backend")
@pytest.mark.parametrize("format", LARGEST)
def test_a_row_of_zeros_stays_zero(format, device):
    w = torch.randn(3, 64, device=device)
    w[1] = 0
    assert dequantize(quantize(w, format), torch.float32)[1].abs().max() == 0


@pytest.mark.usefixtures("either_backend")
@pytest.mark.parametrize("format", LARGEST)
@pytest.mark.parametrize(("width", "at"), [(320, 0), (33001, 3), (33001, 33000)])
def test_nan_makes_its_rows_scale_nan(format, width, at, device):
    w = torch.randn(3, width, device=device)
    w[1, at], w[2, at] = torch.nan, torch.inf
    _, scale = ops(w).row_quantize(w, DTYPES[format])
    assert scale.isnan().tolist() == [False, True, False] and scale[2].isinf()


@pytest.mark.usefixtures("either_backend")
def test_nan_in_a_stored_weight_makes_its_rows_scale_nan(device):
    weight = stored("nf4", (3, 192), device)
    weight.absmax[1, 2] = torch.nan
    _, scale = ops(weight.codes).to_rows(weight, torch.int8)
    assert scale.isnan().tolist() == [False, True, False]


def test_weights_that_are_fp8_keep_their_bytes():
    w = torch.randn(5, 64).to(torch.float8_e4m3fn)
    q = quantize(w, "fp8")
    assert torch.equal(q.values.view(torch.uint8), w.view(torch.uint8))
    assert torch.equal(q.scale, torch.ones(5))


@pytest.mark.usefixtures("either_backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", LARGEST)
@pytest.mark.parametrize("shape", [(1, 1), (33, 192), (70, 1100)])
def test_rows_are_restored_alike_on_every_path(shape, format, dtype, device):
    weight = stored(format, shape, device)
    expected = reference.row_dequantize(weight.values, weight.scale, dtype)
    backend = ops(weight.values)
    cut = dtype == torch.bfloat16 and device.type == "cpu"  # Triton's interpreter cuts off instead of rounding
    exactly = {"rtol": 2**-7 if cut else 0, "atol": 0}
    torch.testing.assert_close(backend.dequantize(weight, dtype), expected, **exactly)
    torch.testing.assert_close(backend.dequantize(weight, dtype, transposed=True), expected.t(), **exactly)
    scratch = torch.full((shape[0], shape[1] + 13), 7.0, dtype=dtype, device=device)
    backend.row_dequantize(weight.values, weight.scale, dtype, scratch[:, : shape[1]])
    torch.testing.assert_close(scratch[:, : shape[1]], expected, **exactly)
    assert (scratch[:, shape[1] :] == 7.0).all()


@pytest.mark.usefixtures("either_backend")
@pytest.mark.parametrize("to", LARGEST)
@pytest.mark.parametrize("format", ["nf4", "int8", "fp8", "bfloat16", "float16", "float32"])
@pytest.mark.parametrize("shape", [(3, 192), (5, 1216)])
def test_a_weight_of_any_form_becomes_rows_of_either_dtype(shape, format, to, device):
    weight = stored(format, shape, device)
    backend = ops(weight.codes if isinstance(weight, NF4Weight) else getattr(weight, "values", weight))
    values, scale = backend.to_rows(weight, DTYPES[to])
    assert values.shape == shape and values.dtype == DTYPES[to]
    if format == to:
        assert values is weight.values and scale is weight.scale
    else:
        assert_nearest(values, scale, dequantize(weight, torch.float32))


@pytest.mark.usefixtures("either_backend")
@pytest.mark.parametrize("to", LARGEST)
@pytest.mark.parametrize("format", ["nf4", "int8", "fp8"])
def test_rows_too_wide_for_one_read_are_read_twice(format, to, device):
    weight = stored(format, (2, 33024), device)
    values, scale = ops(getattr(weight, "codes", None) if format == "nf4" else weight.values).to_rows(
        weight, DTYPES[to]
    )
    if format != to:
        assert_nearest(values, scale, dequantize(weight, torch.float32))


@pytest.mark.usefixtures("either_backend")
@pytest.mark.parametrize("to", LARGEST)
@pytest.mark.parametrize("format", ["nf4", "int8", "fp8", "bfloat16"])
def test_the_transposed_rows_are_the_same_values(format, to, device):
    """(K, N) in memory, so that a product over N reads along its rows; the scales are still those of W's rows."""
    weight = stored(format, (70, 1216), device)
    backend = ops(weight.codes if isinstance(weight, NF4Weight) else getattr(weight, "values", weight))
    values, scale = backend.to_rows(weight, DTYPES[to])
    transposed, same_scale = backend.to_rows(weight, DTYPES[to], transposed=True)
    assert transposed.is_contiguous()
    assert torch.equal(transposed.view(torch.uint8), values.view(torch.uint8).t())
    assert torch.equal(scale, same_scale)


@pytest.mark.usefixtures("either_backend")
@pytest.mark.parametrize("format", ["int8", "fp8", "nf4"])
def test_a_linear_layer_multiplies_by_the_stored_weight(format, device):
    w, x = torch.randn(33, 64, device=device), torch.randn(7, 64, device=device, requires_grad=True)
    q = quantize(w, format)
    y = lora_linear(x, q)
    torch.testing.assert_close(y, x @ dequantize(q, torch.float32).T)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], dequantize(q, torch.float32).sum(0).expand(7, 64))
