"""A linear layer over few rows, as in modulation and the embedders: backward, also without decoding the weight first.

The forward pass, in every format, is in test_linear_paths.py.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import relative_error

from fluxq.kernels import lora_linear, quantize, reference

pytest.importorskip("triton")

from fluxq.kernels.triton import linear, table

N = 97
SHARES = table.Choice("fused", 16, 64, 32, chunk=64 * 64)  # two shares of W's rows, the second ragged


@pytest.fixture(autouse=True)
def _on_device(triton_ops, device):
    with torch.device(device):
        yield


class Layer:
    """Random operands of a layer with LoRA, and its gradients by a given implementation."""

    def __init__(self, format, rows, k, dtype, rank):
        self.weight = quantize(torch.randn(N, k) / k**0.5, format)
        self.x, self.dy = torch.randn(rows, k, dtype=dtype), torch.randn(rows, N, dtype=dtype)
        self.down, self.up = torch.randn(rank, k, dtype=dtype) / k**0.5, torch.randn(N, rank, dtype=dtype)
        self.lora = rank > 0

    def gradients(self, module, dtype, weight=None):
        tensors = [t.to(dtype) for t in (self.x, self.x @ self.down.t(), self.down, self.up)]
        tensors = tensors if self.lora else [None] * 4
        weight = self.weight if weight is None else weight
        found = module.lora_linear_backward(self.dy.to(dtype), weight, *tensors, 0.7)
        return [t for t in found if t is not None]


def check(layer, dtype, device):
    """At most twice plain PyTorch's error against fp64; interpreted, casts to bf16 truncate."""
    exact = reference.dequantize(layer.weight, torch.float64)
    ours = layer.gradients(linear, dtype)
    theirs, truth = layer.gradients(reference, dtype), layer.gradients(reference, torch.float64, exact)
    slack = 2.0 if device.type == "cuda" else 4.0
    for a, b, c in zip(ours, theirs, truth, strict=True):
        assert a.shape == c.shape
        assert relative_error(a, c) <= slack * relative_error(b, c) + torch.finfo(dtype).eps / 8


@pytest.mark.parametrize(
    ("format", "k", "rows", "rank"),
    [
        *(("nf4", 192, rows, rank) for rows, rank in ((1, 5), (2, 0), (33, 40), (64, 0))),
        *((format, 200, 33, 40) for format in ("fp8", "int8", "bf16")),
    ],
)
def test_gradients_equal_those_over_the_decoded_weight(format, k, rows, rank, device):
    with table.using(f"lora_linear_backward_{format}", SHARES):
        check(Layer(format, rows, k, torch.bfloat16, rank), torch.bfloat16, device)


@pytest.mark.parametrize(("format", "dtype"), [("nf4", torch.float32), ("fp8", torch.float16), ("bf16", torch.float32)])
def test_in_other_dtypes(format, dtype, device):
    with table.using(f"lora_linear_backward_{format}", SHARES):
        check(Layer(format, 3, 192, dtype, 5), dtype, device)


def test_many_rows_may_use_it_too(device):
    """If there is no memory for a scratch."""
    with table.using("lora_linear_backward_nf4", SHARES):
        check(Layer("nf4", 100, 192, torch.float32, 5), torch.float32, device)


def test_the_shipped_table_sends_few_rows_past_the_scratch(monkeypatch):
    monkeypatch.setattr(linear, "_scratch", lambda *_: pytest.fail("decoded into a scratch"))
    for format in ("nf4", "fp8", "int8"):
        Layer(format, 64, 64, torch.float32, 5).gradients(linear, torch.float32)
        for gpu in table.GENERATIONS:
            assert table.SHIPPED[f"lora_linear_backward_{format}", gpu, "few"].path == "fused"


def test_rounding_depends_only_on_the_shares():
    """No atomic additions: two runs have the same bits, and other shares differ only by rounding."""
    layer, found = Layer("int8", 3, 200, torch.float32, 0), []
    for chunk in (64 * 64, 64 * 64, 32 * 64):
        with table.using("lora_linear_backward_int8", replace(SHARES, chunk=chunk)):
            found += layer.gradients(linear, torch.float32)
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[0], found[2])


def test_gradients_may_be_strided_and_inputs_padded():
    layer = Layer("nf4", 6, 192, torch.float32, 5)
    expected = layer.gradients(linear, torch.float32)
    layer.dy = torch.full((6, 2 * N), torch.nan).index_copy_(1, torch.arange(0, 2 * N, 2), layer.dy)[:, ::2]
    layer.x = torch.nn.functional.pad(layer.x, (0, 32), value=torch.nan)
    s, layer.lora = layer.x[:, :192] @ layer.down.t(), False
    dx, *rest = linear.lora_linear_backward(layer.dy, layer.weight, layer.x, s, layer.down, layer.up, 0.7)
    assert dx is not None and dx.isfinite().all()
    for a, b in zip((dx[:, :192], *rest), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_lora_linear_differentiates_through_a_modulation_layer():
    weight = quantize(torch.randn(N, 128) / 11, "nf4")
    x, down = torch.randn(2, 1, 128, requires_grad=True), torch.randn(5, 128, requires_grad=True)
    up, dy = torch.randn(N, 5, requires_grad=True), torch.randn(2, 1, N)
    y = lora_linear(x, weight, None, down, up, 0.7)
    exact = x @ reference.dequantize(weight, torch.float32).t() + 0.7 * (x @ down.t()) @ up.t()
    for a, b in zip(*(torch.autograd.grad(out, (x, down, up), dy) for out in (y, exact)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
