"""8-bit weights with a scale a row: rounding to the nearest, the right scales, files' own bytes kept."""

from __future__ import annotations

import pytest
import torch
from helpers import relative_error

from fluxq.kernels import dequantize, lora_linear, quantize

LARGEST = {"int8": 127.0, "fp8": 448.0}


@pytest.mark.parametrize("format", LARGEST)
@pytest.mark.parametrize("shape", [(1, 1), (33, 192), (300, 1100)])
def test_every_weight_becomes_the_nearest_one_that_can_be_stored(format, shape):
    w = torch.randn(shape) * torch.rand(shape[0], 1) * 10
    q = quantize(w, format)
    assert q.shape == w.shape
    torch.testing.assert_close(q.scale, w.abs().amax(1) / LARGEST[format])
    candidates = torch.arange(256, dtype=torch.uint8).view(q.values.dtype).float()
    candidates = candidates[candidates.abs() <= LARGEST[format]]
    best = (w[..., None] / q.scale[:, None, None] - candidates).abs().amin(-1)[:, :50] if w.numel() < 10_000 else None
    error = (w / q.scale[:, None] - q.values.float()).abs()
    if best is not None:
        torch.testing.assert_close(error[:, :50], best, atol=1e-4, rtol=0)
    assert q.values.float().abs().max() == LARGEST[format]


@pytest.mark.parametrize(("format", "bound"), [("int8", 0.012), ("fp8", 0.028), ("nf4", 0.095)])
def test_error_on_normal_weights_is_that_of_the_format(format, bound):
    """A row's largest of 3,072 normal weights is about 3.6 deviations: int8's step is then 0.028, its error 0.8 %."""
    w = torch.randn(64, 3072)
    assert bound / 2 < relative_error(dequantize(quantize(w, format), torch.float32), w) < bound


@pytest.mark.parametrize("format", LARGEST)
def test_a_row_of_zeros_stays_zero(format):
    w = torch.randn(3, 64)
    w[1] = 0
    assert dequantize(quantize(w, format), torch.float32)[1].abs().max() == 0


def test_weights_that_are_fp8_keep_their_bytes():
    w = torch.randn(5, 64).to(torch.float8_e4m3fn)
    q = quantize(w, "fp8")
    assert torch.equal(q.values.view(torch.uint8), w.view(torch.uint8))
    assert torch.equal(q.scale, torch.ones(5))


@pytest.mark.parametrize("format", ["int8", "fp8", "nf4"])
def test_a_linear_layer_multiplies_by_what_is_stored(format):
    w, x = torch.randn(33, 64), torch.randn(7, 64, requires_grad=True)
    q = quantize(w, format)
    y = lora_linear(x, q)
    torch.testing.assert_close(y, x @ dequantize(q, torch.float32).T)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], dequantize(q, torch.float32).sum(0).expand(7, 64))
