"""LayerNorm with shift and scale, the gated sum, both in one: against plain formulas in fp64, on either backend."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from closeness import DTYPES, EIGHT_BITS, assert_as_close_as_plain, assert_close_in_eight_bits, with_gradients

from fluxq.kernels import Wants, backend, fork_modulate, gated_add, gated_add_modulate, gelu_tanh, modulate, ops


def stream(shape, device, seed=0):
    """Rows with different means and deviations, as in a residual stream."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * (torch.rand(*shape[:-1], 1, generator=generator) * 3 + 0.3)
    return (x + torch.randn(*shape[:-1], 1, generator=generator)).to(device)


def chunks(batch, width, device, seed=1):
    """Shift, scale and gate (B, 1, D): views of one wide row per image."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 6 * width, generator=generator).to(device)[:, None].chunk(6, dim=-1)[1:4]


def normed_in_fp64(x):
    centered = x - x.mean(-1, keepdim=True)
    return centered / (centered.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def exactly(x, shift, scale):
    return (normed_in_fp64(x) * (1 + scale) + shift,)


def plainly(x, shift, scale):
    return (F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift,)


def gated_exactly(residual, gate, y, shift, scale):
    x = residual + gate * y
    return x, *exactly(x, shift, scale)


def gated_plainly(residual, gate, y, shift, scale):
    x = residual + gate * y
    return x, *plainly(x, shift, scale)


def gated_ours(*inputs):
    x, made = gated_add_modulate(*inputs)
    return x, made.x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 33, 192), (2, 21, 96), (1, 2, 3072)])
def test_modulate_and_its_gradients(either_backend, device, shape, dtype):
    inputs = [stream(shape, device), *chunks(shape[0], shape[2], device)[:2]]
    assert_as_close_as_plain(lambda *t: (modulate(*t).x,), plainly, exactly, inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 33, 192), (2, 21, 1100)])
def test_gated_add_and_its_gradients(either_backend, device, shape, dtype):
    _, _, gate = chunks(shape[0], shape[2], device)
    inputs = [stream(shape, device), gate, stream(shape, device, 3)]
    assert_as_close_as_plain(
        lambda *t: (gated_add(*t),), lambda r, g, y: (r + g * y,), lambda r, g, y: (r + g * y,), inputs, dtype
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 33, 192), (2, 21, 96)])
def test_gated_add_modulate_and_its_gradients(either_backend, device, shape, dtype):
    shift, scale, gate = chunks(shape[0], shape[2], device)
    inputs = [stream(shape, device), gate, stream(shape, device, 3), shift, scale]
    assert_as_close_as_plain(gated_ours, gated_plainly, gated_exactly, inputs, dtype)


def test_gradients_in_fp64():
    shift, scale, gate = (t.double().contiguous().requires_grad_() for t in chunks(2, 6, "cpu"))
    x, y = (stream((2, 3, 6), "cpu", seed).double().requires_grad_() for seed in (0, 3))
    calls = [
        (lambda *t: modulate(*t).x, (x, shift, scale)),
        (gated_add, (x, gate, y)),
        (lambda *t: torch.cat(gated_ours(*t), -1), (x, gate, y, shift, scale)),
    ]
    with backend("reference"):
        for call, inputs in calls:
            assert torch.autograd.gradcheck(call, inputs)


def test_frozen_rows_get_no_gradient_and_change_no_other(either_backend, device):
    shift, scale, gate = chunks(2, 96, device)
    x, y = (stream((2, 21, 96), device, seed).requires_grad_() for seed in (0, 3))
    _, _, dx, _, dy, *_ = with_gradients(gated_ours, [x, gate, y, shift, scale], torch.float32)
    frozen = with_gradients(lambda x, y: gated_ours(x, gate, y, shift, scale), [x, y], torch.float32)
    torch.testing.assert_close(frozen[2:], [dx, dy])
    d_modulated = with_gradients(lambda x: (modulate(x, shift, scale).x,), [x], torch.float32)[1]
    expected = with_gradients(lambda x: exactly(x, shift.double(), scale.double()), [x], torch.float64)[1]
    torch.testing.assert_close(d_modulated.double(), expected, atol=1e-4, rtol=1e-4)


def test_the_sum_may_get_no_gradient_of_its_own(either_backend, device):
    shift, scale, gate = chunks(2, 96, device)
    inputs = [stream((2, 21, 96), device), gate, stream((2, 21, 96), device, 3), shift, scale]
    assert_as_close_as_plain(
        lambda *t: gated_ours(*t)[1:],
        lambda *t: gated_plainly(*t)[1:],
        lambda *t: gated_exactly(*t)[1:],
        inputs,
        torch.float32,
    )


def test_each_row_is_padded(either_backend, device):
    shift, scale, gate = chunks(2, 96, device)
    x, y = stream((2, 21, 96), device), stream((2, 21, 96), device, 3)
    wide, plain = modulate(x, shift, scale, Wants(padding=16)).x, modulate(x, shift, scale).x
    assert wide.shape == (2, 21, 112) and wide.is_contiguous()
    torch.testing.assert_close(wide[..., :96], plain)
    total, made = gated_add_modulate(x, gate, y, shift, scale, Wants(padding=16))
    assert made.x.shape == (2, 21, 112)
    torch.testing.assert_close(made.x[..., :96], modulate(total, shift, scale).x)


def test_the_gradient_of_a_wider_row_is_read_in_place(either_backend, device):
    shift, scale, gate = chunks(2, 96, device)
    x, y, dx = (stream((2, 21, 96), device, seed) for seed in (0, 3, 4))
    wide = torch.full((2, 21, 112), torch.nan, device=device)
    wide[..., :96] = dy = stream((2, 21, 96), device, 5)
    calls = [
        lambda dy: ops(x).modulate_backward(dy, x, scale, True),
        lambda dy: ops(x).gated_add_modulate_backward(dx, dy, x, gate, y, scale, True),
    ]
    for call in calls:
        torch.testing.assert_close(call(wide), call(dy))


@pytest.mark.parametrize("read", ["both", "the stream", "its branch"])
def test_a_fork_sums_the_gradients_of_the_stream_and_its_branch(either_backend, device, read):
    shift, scale, _ = chunks(2, 96, device)
    x, along = stream((2, 21, 96), device).requires_grad_(), stream((2, 21, 96), device, 4)
    on, made = fork_modulate(x, shift, scale)
    outputs = {"both": (on * along).sum() + made.x.square().sum(), "the stream": (on * along).sum()}
    outputs["its branch"] = made.x.square().sum()
    alone = modulate(x, shift, scale).x.square().sum()
    expected = {"the stream": along, "its branch": torch.autograd.grad(alone, x)[0]}
    expected["both"] = expected["the stream"] + expected["its branch"]
    torch.testing.assert_close(torch.autograd.grad(outputs[read], x)[0], expected[read])


def test_rows_that_do_not_fill_the_gpu_are_multiplied_by_down_after_the_kernel(triton_ops, device, monkeypatch):
    shift, scale, _ = chunks(2, 320, device)
    x, down = stream((2, 17, 320), device), torch.randn(5, 320, device=device) / 18
    wants = Wants(dtype=torch.int8, down=down)
    makes = (lambda: modulate(x, shift, scale, wants), lambda: gelu_tanh(x, wants=wants))
    fused = [make() for make in makes]
    monkeypatch.setattr("fluxq.kernels.triton.eight_bits.fills", lambda programs, sms: False)
    for one, other in zip(fused, [make() for make in makes], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one[:3], other[:3], strict=True))
        torch.testing.assert_close(one.s, other.s)


def test_part_of_a_sequence_and_an_expanded_gradient_are_accepted(either_backend, device):
    """The last layer reads the image's part of the joint sequence; the gradient of a sum is one number, expanded."""
    shift, scale, _ = chunks(2, 96, device)
    joint = stream((2, 40, 96), device)
    part, copy = joint[:, 19:].detach().requires_grad_(), joint[:, 19:].clone().requires_grad_()
    made = [modulate(t, shift, scale).x for t in (part, copy)]
    torch.testing.assert_close(*made)
    made[0].sum().backward()
    made[1].backward(torch.ones_like(copy))
    torch.testing.assert_close(part.grad, copy.grad)


def test_unread_inputs_may_be_an_expanded_number(either_backend, device):
    gate, residual = chunks(2, 96, device)[2], stream((2, 21, 96), device)
    one = torch.full((), 3.0, device=device).expand(2, 21, 96)
    torch.testing.assert_close(gated_add(residual, gate, one), residual + gate * 3)


@pytest.mark.parametrize("rank", [None, 5, 40, 70])
@pytest.mark.parametrize(("dtype", "eight_bits"), zip([torch.float32, torch.bfloat16], EIGHT_BITS, strict=True))
def test_eight_bit_rows_and_their_product_with_down(either_backend, device, dtype, rank, eight_bits):
    shift, scale, gate = (t.to(dtype) for t in chunks(2, 320, device))
    x, y = (stream((2, 17, 320), device, seed).to(dtype) for seed in (0, 3))
    down = None if rank is None else torch.randn(rank, 320, device=device) / 18
    wants = Wants(dtype=eight_bits, down=down)
    total, both = gated_add_modulate(x, gate, y, shift, scale, wants)
    for made in (modulate(total, shift, scale, wants), both):
        assert_close_in_eight_bits(made, down, eight_bits)
        torch.testing.assert_close(made.x, modulate(total, shift, scale).x)


@pytest.mark.parametrize("eight_bits", EIGHT_BITS)
@pytest.mark.parametrize("rotation", [0, 64])
def test_eight_bits_do_not_hide_nan(either_backend, device, eight_bits, rotation):
    """One NaN makes the scale of its row NaN, and no other."""
    shift, scale, _ = chunks(1, 320, device)
    x = stream((1, 19, 320), device)
    x[0, 7, 300] = torch.nan
    made = modulate(x, shift, scale, Wants(dtype=eight_bits, rotation=rotation))
    assert made.scale.isnan().nonzero().tolist() == [[7]]
