"""Attention with its log-sum-exp: against the formula in fp64, with and without a mask."""

from __future__ import annotations

import pytest
import torch
from helpers import relative_error

from fluxq.kernels import Tape, attention


def operands(dtype=torch.float64, device="cpu"):
    """In the memory layout of the joint buffers: (B, L, H, D)."""
    return [torch.randn(2, 37, 3, 16, dtype=dtype, device=device).transpose(1, 2).requires_grad_() for _ in range(3)]


def plain(q, k, v, mask=None):
    scores = q @ k.mT / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


MASK = torch.arange(37) >= torch.tensor([[5], [0]])


@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "masked"])
def test_outputs_and_gradients_in_fp64(mask):
    leaves = operands()
    out, expected = attention(*leaves, mask), plain(*leaves, mask)
    dy = torch.randn_like(out)
    torch.testing.assert_close(out, expected)
    for a, b in zip(torch.autograd.grad(out, leaves, dy), torch.autograd.grad(expected, leaves, dy), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "masked"])
def test_half_precision_errs_at_most_twice_as_much_as_plain_pytorch(dtype, mask, device):
    leaves = operands(dtype, device)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    mask = None if mask is None else mask.to(device)
    runs = [(attention, leaves), (plain, leaves), (plain, exact)]
    outs = [f(*x, mask) for f, x in runs]
    dy = torch.randn_like(outs[0])
    found = [[out, *torch.autograd.grad(out, x, dy.to(out.dtype))] for out, (_, x) in zip(outs, runs, strict=True)]
    for ours, theirs, right in zip(*found, strict=True):
        assert relative_error(ours, right) <= 2 * relative_error(theirs, right) + 1e-6


def test_a_replay_that_kept_the_output_does_not_attend_again(monkeypatch):
    import sys

    leaves, tape = operands(), Tape("keep_attention")
    with torch.no_grad(), tape.record():
        out = attention(*leaves)
    monkeypatch.setattr(sys.modules["fluxq.kernels.attention"], "_forward", None)
    with tape.replay():
        again = attention(*leaves)
    assert torch.equal(out, again)
    dy = torch.randn_like(out)
    for a, b in zip(
        torch.autograd.grad(again, leaves, dy), torch.autograd.grad(plain(*leaves), leaves, dy), strict=True
    ):
        torch.testing.assert_close(a, b)
