"""Attention that hands back its log-sum-exp at FLUX.1's shapes: beside PyTorch's F.scaled_dot_product_attention.

    pytest benchmarks/bench_attention.py

On a GPU PyTorch's kernels for it, 24 heads of 128; elsewhere the CPU's, 2 heads, at the smallest size. Some
queries of each answer are held against fp64 before it is timed. Both sides give heads joined, as the next layer reads
them, and take q, k and v as the joint buffers lie: (B, L, H, D) in memory. The masked case is a batch of two images
of which one has half as much text.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.pytest_cases import GPU, SIZES, TOKENS, run
from fluxq.kernels import attention

WIDTH = 128
TEXT = 512
SOME = slice(7, 7 + 32)


@lru_cache(maxsize=1)
def operands(tokens: int, masked: bool) -> tuple[list[Tensor], Tensor | None]:
    """q, k, v and the gradient of the output, (B, H, L, D); and which keys (B, L) there are."""
    torch.manual_seed(0)
    batch, heads = 1 + masked, SIZES.heads if GPU else 2
    given = [SIZES.randn(batch, tokens, heads, WIDTH).transpose(1, 2) for _ in range(4)]
    there = torch.arange(tokens, device=SIZES.device) >= torch.tensor([[0], [TEXT // 2]], device=SIZES.device)
    return given, there if masked else None


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    out = F.scaled_dot_product_attention(q, k, v, None if mask is None else mask[:, None, None])
    return out.transpose(1, 2).flatten(2)


SIDES: dict[str, Callable[..., Tensor]] = {"ours": attention, "plain": plain}


def passes(side: str, tokens: int, masked: bool) -> tuple[Callable[[], Tensor], Callable[[], tuple[Tensor, ...]]]:
    """What runs the forward pass, with all that it keeps for the gradient; and the backward pass alone."""
    (*inputs, grad), mask = operands(tokens, masked)
    leaves = [t.detach().requires_grad_() for t in inputs]
    out, dout = SIDES[side](*leaves, mask), grad.transpose(1, 2).flatten(2)
    return (
        lambda: SIDES[side](*leaves, mask),
        lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True),
    )


def check(tokens: int, masked: bool) -> None:
    """Some rows of the output, and of q's gradient, against fp64: at most twice the error of plain PyTorch's."""
    (*inputs, grad), mask = operands(tokens, masked)
    q, k, v, dout = (t.double() for t in (inputs[0][:, :, SOME], *inputs[1:], grad[:, :, SOME]))
    q.requires_grad_()
    exact = plain(q, k, v, mask)
    (dq,) = torch.autograd.grad(exact, q, dout.transpose(1, 2).flatten(2))
    ours, theirs = (some(side, tokens, masked) for side in SIDES)
    for name, a, b, truth in zip(("output", "dq"), ours, theirs, (exact.detach(), dq), strict=True):
        allowed = 2 * (b.double() - truth).norm() + 2**-12 * truth.norm()
        assert (a.double() - truth).norm() <= allowed, name


def some(side: str, tokens: int, masked: bool) -> tuple[Tensor, Tensor]:
    forward, backward = passes(side, tokens, masked)
    return forward().detach()[:, SOME], backward()[0][:, :, SOME]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("tokens", TOKENS)
def test_speed(benchmark, tokens, masked, direction, side):
    check(tokens, masked)
    call = passes(side, tokens, masked)[direction == "backward"]
    benchmark.group = f"attention {'masked ' if masked else ''}{direction}, {tokens}"
    run(benchmark, call, 30)
    (q, *_), _ = operands(tokens, masked)
    products = 2 if direction == "forward" else 5  # of q k^T's size; backward works it out again
    benchmark.extra_info["tflop"] = products * 2 * q.shape[0] * q.shape[1] * tokens**2 * WIDTH / 1e12
