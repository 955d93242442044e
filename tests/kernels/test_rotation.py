"""Rotation by blocks of Hadamard matrices, alone and before 8-bit rounding, on both backends against fp64."""

from __future__ import annotations

import pytest
import torch
from helpers import relative_error

from fluxq.kernels import (
    NF4Weight,
    RowScaled,
    Wants,
    backend,
    dequantize,
    gated_add_modulate,
    gelu_tanh,
    lora_linear,
    modulate,
    ops,
    quantize,
    reference,
    wants,
)
from fluxq.kernels.rotation import BLOCKS, rotate, rotation_block

DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
WIDTHS = {256: 768, 64: 320}  # several blocks, and no power of two


@pytest.mark.parametrize("block", BLOCKS)
def test_a_rotation_is_orthogonal_and_undoes_itself(block):
    x = torch.randn(3, 2 * block, dtype=torch.float64)
    turned = rotate(x, block)
    torch.testing.assert_close(rotate(turned, block), x)
    torch.testing.assert_close(turned.norm(dim=1), x.norm(dim=1))
    spike = torch.zeros(1, block, dtype=torch.float64)
    spike[0, 7] = 1.0
    assert rotate(spike, block).abs().unique().numel() == 1, "one outlier is spread evenly over its block"


def test_the_block_is_the_largest_that_divides_the_width():
    assert [rotation_block(width) for width in (3072, 12288, 320, 96)] == [256, 256, 64, 0]


@pytest.mark.usefixtures("either_backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("shape", [(1,), (2, 33), (5, 1)])
def test_rows_are_rotated_as_exactly_as_their_dtype_is(shape, block, dtype, device):
    x = torch.randn(*shape, WIDTHS[block], device=device, dtype=dtype)
    turned = ops(x).rotate(x, block)
    assert turned.shape == x.shape and turned.dtype == dtype
    slack = 2 if device.type == "cpu" and dtype == torch.bfloat16 else 1  # interpreted, casts truncate
    assert relative_error(turned, rotate(x.double(), block)) < slack * torch.finfo(dtype).eps / 2 + 5e-7


@pytest.mark.usefixtures("either_backend")
def test_rows_may_be_strided(device):
    wide = torch.randn(33, 300, device=device)
    torch.testing.assert_close(ops(wide).rotate(wide[:, 4:260], 64), rotate(wide[:, 4:260], 64))


def assert_rounded(values, scale, exact):
    """The very numbers that rounding `exact` (N, K) fp64 gives, but for some next to a tie, which may fall one off."""
    largest = 127.0 if values.dtype == torch.int8 else 448.0
    expected = exact.abs().amax(1) / largest
    torch.testing.assert_close(scale.double(), expected, rtol=1e-5, atol=0)
    rounded = (exact / expected[:, None]).clamp(-largest, largest)
    rounded = rounded.round() if values.dtype == torch.int8 else rounded.float().to(values.dtype).double()
    off = values.double() != rounded
    assert off.float().mean() < 2e-3
    step = 1 if values.dtype == torch.int8 else 32
    assert (values.double() - rounded).abs().max() <= step


def stored(format, shape, device):
    w = torch.randn(shape, device=device) * (torch.rand(shape[0], 1, device=device) + 0.1)
    return quantize(w, format)


def any_tensor(weight):
    if isinstance(weight, RowScaled):
        return weight.values
    return weight.codes if isinstance(weight, NF4Weight) else weight


@pytest.mark.usefixtures("either_backend")
@pytest.mark.parametrize(
    ("format", "to"), [("nf4", "int8"), ("nf4", "fp8"), ("fp8", "fp8"), ("int8", "int8"), ("bf16", "int8")]
)
@pytest.mark.parametrize(("block", "rows"), [(256, 33), (64, 9)])
def test_a_stored_weight_becomes_rotated_rows(block, rows, format, to, device):
    """Plain and transposed, whose scales are computed in different passes; the stored weight is unchanged."""
    weight = stored(format, (rows, WIDTHS[block]), device)
    before, backend = any_tensor(weight).clone(), ops(any_tensor(weight))
    exact = rotate(dequantize(weight, torch.float32).double(), block)
    values, scale = backend.to_rows(weight, DTYPES[to], rotation=block)
    assert values.shape == weight.shape and values.dtype == DTYPES[to]
    assert_rounded(values, scale, exact)
    transposed, same_scale = backend.to_rows(weight, DTYPES[to], transposed=True, rotation=block)
    assert transposed.is_contiguous()
    assert_rounded(transposed.t(), same_scale, exact)
    assert torch.equal(any_tensor(weight).view(torch.uint8), before.view(torch.uint8))


@pytest.mark.usefixtures("either_backend")
@pytest.mark.parametrize("to", DTYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("block", "shape"), [(256, (3, 768)), (64, (7, 320)), (256, (2, 33024))])
def test_activations_become_rotated_rows(block, shape, dtype, to, device):
    x = torch.randn(shape, device=device).to(dtype)
    x[:, 3] *= 50
    values, scale = ops(x).row_quantize(x, DTYPES[to], rotation=block)
    assert_rounded(values, scale, rotate(x.double(), block))


@pytest.mark.usefixtures("either_backend")
def test_columns_are_multiplied_before_they_are_rotated(device):
    x, columns = torch.randn(33, 320, device=device), torch.rand(320, device=device) + 0.5
    values, scale = ops(x).row_quantize(x, torch.int8, columns, rotation=64)
    assert_rounded(values, scale, rotate((x * columns).double(), 64))


@pytest.mark.parametrize(("width", "block"), [(512, 256), (320, 64)])
def test_rotation_brings_outliers_down_to_the_error_of_even_rows(width, block):
    x = torch.randn(128, width)
    x[:, :2] *= 30
    weight, bias = torch.randn(192, width) / width**0.5, torch.randn(192)
    down, up = torch.randn(5, width) / width**0.5, torch.randn(192, 5)
    leaves = [t.requires_grad_() for t in (x, down, up)]
    kept = quantize(weight, "bf16")
    exact = x @ kept.float().t() + bias + 0.7 * (x @ down.t()) @ up.t()

    def run(rotation):
        y = lora_linear(x, kept, bias, down, up, 0.7, "int8_dx", rotation=rotation)
        return y, *torch.autograd.grad(y, leaves, torch.ones_like(y))

    plain, turned = run(0), run(block)
    truth = (exact, *torch.autograd.grad(exact, leaves, torch.ones_like(exact)))
    errors = [relative_error(a, b) for a, b in zip(turned, truth, strict=True)]
    assert errors[0] < relative_error(plain[0], exact) / 2
    assert max(errors[:2]) < 0.025 and max(errors[2:]) < 1e-5, "the LoRA sees the input as it is"


@pytest.mark.usefixtures("triton_ops")
def test_both_backends_agree_on_a_rotated_layer(device):
    """Forward and every gradient, at batch 2."""
    weight = stored("nf4", (70, 192), device)
    x, down = torch.randn(2, 33, 192, device=device), torch.randn(5, 192, device=device) / 14
    up, dy = torch.randn(70, 5, device=device), torch.randn(2, 33, 70, device=device)
    results = []
    for name in ("triton", "reference"):
        if name == "reference" and device.type == "cuda":
            pytest.skip("torch multiplies int8 on a GPU only for some shapes")
        with backend(name):
            leaves = [t.detach().requires_grad_() for t in (x, down, up)]
            y = lora_linear(leaves[0], weight, None, *leaves[1:], 0.7, "int8_dx", rotation=64)
            results.append([y.detach(), *torch.autograd.grad(y, leaves, dy)])
    for ours, theirs in zip(*results, strict=True):
        assert relative_error(ours, theirs) < 2e-3


def test_the_reference_rotates_before_it_rounds():
    weight = stored("nf4", (3, 256), torch.device("cpu"))
    values, scale = reference.to_rows(weight, torch.int8, rotation=256)
    turned = rotate(dequantize(weight, torch.float32), 256)
    error = relative_error(reference.dequantize(RowScaled(values, scale), torch.float32), turned)
    assert 0.001 < error < 0.012, "rounded once"


@pytest.mark.usefixtures("either_backend")
@pytest.mark.parametrize("to", DTYPES)
@pytest.mark.parametrize("block", BLOCKS)
def test_the_previous_op_rotates_what_it_rounds(block, to, device):
    """All rows of the layer's input: exact up to the rounding of the input itself, which is returned too."""
    width, wanted = WIDTHS[block], Wants(dtype=DTYPES[to], rotation=block)
    x, y, shift, scale, gate = (torch.randn(2, n, width, device=device) for n in (9, 9, 1, 1, 1))
    x[..., 3] *= 9
    made = [modulate(x, shift, scale, wanted), gated_add_modulate(x, gate, y, shift, scale, wanted)[1]]
    made += [gelu_tanh(x, None, wanted), gelu_tanh(x, y, wanted)]
    for found in made:
        assert found.values is not None and found.scale is not None and found.s is None
        assert_rounded(found.values, found.scale, rotate(found.x.flatten(0, 1).double(), block))


@pytest.mark.usefixtures("either_backend")
def test_a_block_across_two_inputs_is_right_too(device):
    """64 columns from attention and 192 from the MLP: one block of 256."""
    h, prepend, down = (torch.randn(*s, device=device) for s in ((1, 70, 192), (1, 70, 64), (5, 256)))
    weight, up = stored("int8", (33, 256), device), torch.randn(33, 5, device=device)
    given = gelu_tanh(h, prepend, wants("int8", down, h, 256))
    assert given.values is not None and given.scale is not None
    assert_rounded(given.values, given.scale, rotate(given.x.flatten(0, 1).double(), 256))
    y = lora_linear(given, weight, None, down, up, 0.7, "int8", rotation=256)
    x = given.x.double()
    exact = x @ dequantize(weight, torch.float32).double().t() + 0.7 * (x @ down.double().t()) @ up.double().t()
    assert relative_error(y, exact) < 0.015


def test_only_a_rotated_layer_computes_loras_product_itself():
    down = torch.randn(5, 256)
    assert wants("int8", down, down).down is down
    assert wants("int8", down, down, 256) == Wants(dtype=torch.int8, rotation=256)
