"""A LoRA that counts from a start: what it computes, what is saved of it, and what its gradients show."""

from __future__ import annotations

import pytest
import torch
from helpers import relative_error

from fluxq.kernels import quantize
from fluxq.model.linear import Linear
from fluxq.model.start import counted_from, lora_ga, low_rank

OUT, IN, RANK = 96, 64, 3


def linear(format: str = "nf4", corrects: bool = False) -> Linear:
    """A layer whose LoRA has a start, at scale 1.7, and is not trained yet."""
    layer = Linear(IN, OUT)
    layer.store(quantize(torch.randn(OUT, IN) * IN**-0.5, format))
    layer.bias = torch.randn(OUT)
    layer.set_lora(torch.zeros(RANK, IN), torch.zeros(OUT, RANK), 1.7)
    layer.set_start(torch.randn(RANK, IN) * 0.3, torch.randn(OUT, RANK) * 0.3, corrects)
    return layer


def trained(layer: Linear, size: float = 0.05) -> Linear:
    with torch.no_grad():
        layer.get_parameter("lora_down").normal_(std=size)
        layer.get_parameter("lora_up").normal_(std=size)
    return layer


def changes(layer: Linear) -> tuple[torch.Tensor, torch.Tensor]:
    """up @ down with the start, and of the start alone, in fp64."""
    down, up = (layer.get_parameter(f"lora_{part}").detach().double() for part in ("down", "up"))
    start_down, start_up = (layer.get_buffer(f"start_{part}").double() for part in ("down", "up"))
    return (start_up + up) @ (start_down + down), start_up @ start_down


@pytest.mark.parametrize("corrects", [False, True])
def test_the_layer_computes_the_lora_without_its_start_unless_that_corrects(corrects):
    layer, x = trained(linear(corrects=corrects)), torch.randn(5, IN)
    both, start = changes(layer)
    own = layer(x).detach().double()
    layer.set_lora(None, None, 1.0)
    frozen = layer(x).double()
    change = both if corrects else both - start
    torch.testing.assert_close(own, frozen + 1.7 * x.double() @ change.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_start_is_the_frozen_layer_to_the_bit(dtype):
    layer, x = linear(), torch.randn(5, IN).to(dtype)
    layer.bias = layer.bias.to(dtype)
    with_start = layer(x)
    layer.set_lora(None, None, 1.0)
    assert torch.equal(with_start, layer(x))


def test_what_was_trained_survives_rounding_to_bf16():
    """Written as [B, -B0] and [A; A0], a change of a thousandth would be lost in the rounding of A and B."""
    layer = trained(linear(), size=3e-4)
    both, start = changes(layer)
    down, up = layer.factors(False)
    rounded = up.bfloat16().double() @ down.bfloat16().double()
    assert relative_error(rounded, both - start) < 2**-7
    assert down.shape == (2 * RANK, IN) and up.shape == (OUT, 2 * RANK)


def test_the_gradients_of_a_start_are_sketches_of_the_gradient_of_the_weight():
    layer, x, dy = linear("bf16"), torch.randn(4, 7, IN), torch.randn(4, 7, OUT)
    x.requires_grad_()
    layer(x).backward(dy)
    gradient = dy.flatten(0, 1).T @ x.detach().flatten(0, 1)  # (N, K)
    down, up = (layer.get_buffer(f"start_{part}").float() for part in ("down", "up"))
    assert relative_error(layer.get_parameter("lora_up").grad, 1.7 * gradient @ down.T) < 1e-5
    assert relative_error(layer.get_parameter("lora_down").grad, 1.7 * up.T @ gradient) < 1e-5


def test_lora_ga_takes_the_first_right_and_the_next_left_singular_vectors():
    """From sketches of a gradient whose singular values fall steeply, so that each vector can be told."""
    u, v = (torch.linalg.qr(torch.randn(n, 8, dtype=torch.float64))[0] for n in (OUT, IN))
    gradient = (u * 10.0 ** -torch.arange(8)) @ v.T
    left, right = gradient @ torch.randn(IN, 10).double(), torch.randn(10, OUT).double() @ gradient
    down, up = lora_ga(left, right, RANK)
    size = OUT**0.25 / 4
    for i in range(RANK):
        assert abs(float(down[i].double() @ v[:, i])) == pytest.approx(size, rel=0.02)
        assert abs(float(up[:, i].double() @ u[:, RANK + i])) == pytest.approx(size, rel=0.02)


def test_low_rank_is_nearly_the_best_even_of_noise():
    matrix = torch.randn(OUT, IN)
    down, up, share = low_rank(matrix, RANK, torch.randn)
    squares = torch.linalg.svdvals(matrix).square()
    assert 0.95 < share / float(squares[:RANK].sum() / squares.sum()) <= 1.0001
    assert float((matrix - up @ down).square().sum() / squares.sum()) == pytest.approx(1 - share, abs=1e-4)
    assert float(down.norm()) == pytest.approx(float(up.norm()), rel=1e-4)


def test_removing_or_replacing_the_lora_removes_its_start():
    layer = linear()
    layer.set_lora(torch.zeros(2, IN), torch.zeros(OUT, 2), 1.0)
    assert layer.start_down is None and layer.start_up is None
    assert "start_down" not in linear().state_dict()


def test_a_start_that_corrects_keeps_the_rank():
    parts = torch.randn(2, 5), torch.randn(4, 2), torch.randn(2, 5), torch.randn(4, 2)
    assert [t.shape for t in counted_from(*parts, corrects=True)] == [(2, 5), (4, 2)]
    assert [t.shape for t in counted_from(*parts, corrects=False)] == [(4, 5), (4, 4)]
