"""Frozen weights multiplied in 8 bits: the distance from the exact product, and what stays exact."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_error

from fluxq.kernels import (
    COMPUTES,
    FORMATS,
    Activations,
    dequantize,
    gelu_tanh,
    lora_linear,
    lora_linear_parts,
    modulate,
    quantize,
    wants,
)

EIGHT_BITS = [c for c in COMPUTES if c != "bf16"]
M, N, K, R = 128, 192, 256, 5
# Relative errors of y by the kind of input, measured at FLUX's widths (facts: W8A8), with a fifth on top.
ERRORS = {
    ("int8", "gaussian"): 0.0145,
    ("int8", "outliers"): 0.08,
    ("fp8", "gaussian"): 0.046,
    ("fp8", "outliers"): 0.046,
}


def operands(kind="gaussian", dtype=torch.float32, width=K, rows=M, out=N):
    x = torch.randn(rows, width, dtype=dtype)
    if kind == "outliers":
        x[:, :2] *= 30
    weight, bias = torch.randn(out, width) * width**-0.5, torch.randn(out)
    down, up = torch.randn(R, width) * width**-0.5, torch.randn(out, R)
    return x.requires_grad_(), weight, bias.to(dtype), down.requires_grad_(), up.requires_grad_()


@pytest.mark.parametrize("kind", ["gaussian", "outliers"])
@pytest.mark.parametrize("compute", ["int8", "fp8"])
def test_the_product_is_as_exact_as_eight_bits_are(compute, kind):
    x, weight, bias, *_ = operands(kind)
    y = lora_linear(x, quantize(weight, compute), bias, compute=compute)
    assert relative_error(y, x @ weight.t() + bias) < ERRORS[compute, kind]


@pytest.mark.parametrize("compute", EIGHT_BITS)
def test_lora_and_bias_are_not_rounded_to_eight_bits(compute):
    x, weight, bias, down, up = operands()
    y = lora_linear(x, torch.zeros_like(weight), bias, down, up, 0.7, compute)
    expected = bias + 0.7 * (x @ down.t()) @ up.t()
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    for a, b in zip(
        torch.autograd.grad(y, (x, down, up), dy), torch.autograd.grad(expected, (x, down, up), dy), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("compute", EIGHT_BITS)
def test_the_gradient_is_exact_or_in_eight_bits_as_requested(compute):
    x, weight, bias, down, up = operands()
    stored = quantize(weight, compute.removesuffix("_dx"))
    dy = torch.randn(M, N) * (1 + 10 * torch.rand(M, 1))
    y = lora_linear(x, stored, bias, down, up, 0.7, compute)
    expected = x @ dequantize(stored, torch.float32).t() + 0.7 * (x @ down.t()) @ up.t()
    ours, theirs = (torch.autograd.grad(out, (x, down, up), dy) for out in (y, expected))
    errors = [relative_error(a, b) for a, b in zip(ours, theirs, strict=True)]
    assert max(errors[1:]) < 1e-5
    low, high = (0.001, 0.046) if compute.endswith("_dx") else (0, 1e-5)
    assert low <= errors[0] < high


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("compute", ["int8_dx", "fp8_dx"])
def test_storage_and_compute_are_separate_choices(compute, format):
    x, weight, bias, down, up = operands()
    stored = quantize(weight, format)
    exact = dequantize(stored, torch.float32)
    y = lora_linear(x, stored, bias, down, up, 0.7, compute)
    expected = x @ exact.t() + bias + 0.7 * (x @ down.t()) @ up.t()
    assert relative_error(y, expected) < 0.06
    dx, expected_dx = (torch.autograd.grad(out.sum(), x)[0] for out in (y, expected))
    assert relative_error(dx, expected_dx) < 0.06


@pytest.mark.parametrize("compute", EIGHT_BITS)
def test_the_previous_op_and_the_layer_make_the_same_rows(compute):
    x, weight, bias, down, up = operands()
    x, shift, scale = x.view(2, M // 2, K), torch.randn(2, 1, K), torch.randn(2, 1, K)
    for produce in (lambda w: modulate(x, shift, scale, w), lambda w: gelu_tanh(x, None, w)):
        given = produce(wants(compute, down, x))
        assert given.values is not None and given.s is not None
        again = lora_linear(produce(wants("bf16", None, x)).x, weight, bias, down, up, 0.7, compute)
        torch.testing.assert_close(lora_linear(given, weight, bias, down, up, 0.7, compute), again)


@pytest.mark.parametrize("compute", EIGHT_BITS)
def test_a_few_rows_are_multiplied_exactly(compute):
    x, weight, bias, *_ = operands()
    torch.testing.assert_close(lora_linear(x[:4], weight, bias, compute=compute), x[:4] @ weight.t() + bias)


@pytest.mark.usefixtures("either_backend")
@pytest.mark.parametrize(
    ("format", "compute"),  # each format with rows that are rounded and not, each compute
    [
        *(("nf4", compute) for compute in ("bf16", "int8", "int8_dx", "fp8_dx")),
        ("int8", "bf16"),
        ("int8", "int8_dx"),
        ("bf16", "bf16"),
        ("bf16", "fp8_dx"),
    ],
)
def test_a_layer_in_parts_is_the_layer(format, compute, device):
    """Both parts beside each other are its output, and the gradients are those of all of it."""
    x, weight, bias, down, up = (t.detach().to(device) for t in operands(rows=66, out=96))
    x, down, up = (t.requires_grad_() for t in (x, down, up))
    stored, layer = quantize(weight, format), (down, up, 0.7, compute)
    parts, dy = (slice(0, 64), slice(64, 96)), torch.randn(66, 96, device=device)
    given = Activations(F.pad(x, (0, wants(compute, down, x).padding)))
    y = lora_linear(given, stored, bias, *layer)
    both = lora_linear_parts(given, stored, bias, *layer, parts, (None, None))
    torch.testing.assert_close(torch.cat(both, 1), y)
    ours = torch.autograd.grad(both, [x, down, up], [dy[:, part] for part in parts])
    theirs = torch.autograd.grad(y, [x, down, up], dy)
    for a, b in zip(ours, theirs, strict=True):
        # In 8 bits each part of dy has scales of its own.
        assert relative_error(a, b) < (0.05 if compute.endswith("_dx") else 1e-5)
