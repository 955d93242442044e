"""GELU written into the next layer's input: against the plain formula in fp64, on either backend."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from closeness import DTYPES, EIGHT_BITS, assert_as_close_as_plain, assert_close_in_eight_bits

from fluxq.kernels import Wants, backend, gelu_tanh, ops


def exactly(h, *prepend):
    y = h / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3)))
    return (torch.cat([*prepend, y], -1),)


def plainly(h, *prepend):
    return (torch.cat([*prepend, F.gelu(h, approximate="tanh")], -1),)


def operands(device, batch=2, width=320, prepend=96, length=21):
    h = torch.randn(batch, length, width, device=device) * 3
    return (h, torch.randn(batch, length, prepend, device=device)) if prepend else (h,)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "width", "prepend"), [(1, 320, 0), (2, 320, 96), (1, 1100, 1030)])
def test_gelu_and_its_gradients(either_backend, device, batch, width, prepend, dtype):
    inputs = operands(device, batch, width, prepend, 33 if batch == 1 else 21)
    # Above 5 gelu(h) is h but for fp32's last bit; where a cast to bf16 cuts off, that bit becomes a whole step.
    slack = 1.0 if device.type == "cuda" else 1.5
    assert_as_close_as_plain(lambda *t: (gelu_tanh(*t).x,), plainly, exactly, inputs, dtype, slack)


def test_gradients_in_fp64():
    h, prepend = (t.double().requires_grad_() for t in operands("cpu", 2, 5, 3, 2))
    with backend("reference"):
        assert torch.autograd.gradcheck(lambda *t: gelu_tanh(*t).x, (h, prepend))


def test_far_from_zero_it_is_the_identity_or_zero(either_backend, device):
    h = torch.tensor([-1e4, -50.0, 0.0, 50.0, 1e4], device=device).expand(1, 3, 5).contiguous().requires_grad_()
    y = gelu_tanh(h).x
    torch.testing.assert_close(y, h.detach().clamp(min=0), atol=0, rtol=0)
    (dh,) = torch.autograd.grad(y.sum(), h)
    torch.testing.assert_close(dh, torch.tensor([0, 0, 0.5, 1, 1], device=device).expand(1, 3, 5))


def test_rows_are_padded_and_gradients_come_from_wider_rows(either_backend, device):
    h, prepend = operands(device)
    made = gelu_tanh(h, prepend, Wants(padding=16))
    assert made.x.shape == (2, 21, 432) and made.x.is_contiguous()
    torch.testing.assert_close(made.x[..., :416], gelu_tanh(h, prepend).x)
    wide = torch.randn(2, 21, 432, device=device)
    part = wide[..., 96:416]
    torch.testing.assert_close(ops(h).gelu_tanh_backward(part, h), ops(h).gelu_tanh_backward(part.contiguous(), h))


def test_columns_of_a_wider_row_are_accepted(either_backend, device):
    wide = torch.randn(2, 21, 500, device=device)
    h, prepend = wide[..., 100:420], wide[..., :96]
    torch.testing.assert_close(gelu_tanh(h, prepend).x, gelu_tanh(h.contiguous(), prepend.contiguous()).x)


@pytest.mark.parametrize("rank", [None, 5, 70])
@pytest.mark.parametrize("prepend", [0, 96])
@pytest.mark.parametrize(("dtype", "eight_bits"), zip([torch.float32, torch.bfloat16], EIGHT_BITS, strict=True))
def test_eight_bit_rows_and_their_product_with_down(either_backend, device, dtype, prepend, rank, eight_bits):
    inputs = [t.to(dtype) for t in operands(device, 2, 320, prepend, 17)]
    if prepend:
        inputs[1][:, ::2] *= 30  # the row's largest number lies in either part
    down = None if rank is None else torch.randn(rank, 320 + prepend, device=device) / 18
    made = gelu_tanh(*inputs, wants=Wants(dtype=eight_bits, down=down))
    assert_close_in_eight_bits(made, down, eight_bits)
    torch.testing.assert_close(made.x, gelu_tanh(*inputs).x)


@pytest.mark.parametrize("eight_bits", EIGHT_BITS)
@pytest.mark.parametrize("sign", [1, -1])
def test_eight_bits_do_not_hide_nan(either_backend, device, eight_bits, sign):
    """One NaN in either part makes the scale of its row NaN, and no other."""
    h, prepend = operands(device)
    h[0, 3, 5] = sign * torch.tensor(torch.nan)
    prepend[1, 20, 95] = torch.nan
    made = gelu_tanh(h, prepend, Wants(dtype=eight_bits))
    assert made.scale.isnan().nonzero().tolist() == [[3], [21 + 20]]
