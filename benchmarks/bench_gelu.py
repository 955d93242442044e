"""GELU written beside attention's output into the next layer's input, as FLUX.1's blocks do: beside plain PyTorch.

pytest benchmarks/bench_gelu.py
"""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.memory_bound import FEW, HIDDEN, TOKENS, WIDTH, Step, gradients, nbytes, print_shares, random, run
from fluxq.kernels import Wants, ops


def plain_gelu(h: Tensor, *beside: Tensor) -> tuple[Tensor, ...]:
    y = F.gelu(h, approximate="tanh")
    return (torch.cat([*beside, y], -1) if beside else y,)


def plain_eight_bits(h: Tensor, beside: Tensor, down: Tensor) -> tuple[Tensor, ...]:
    (y,) = plain_gelu(h, beside)
    row_scale = y.abs().amax(-1, keepdim=True).float() / 127
    return y, (y / row_scale).round().to(torch.int8)[0], row_scale.flatten(), F.linear(y, down)[0]


@lru_cache(maxsize=1)
def steps(tokens: int) -> dict[str, Step]:
    h, beside, dy = random(1, tokens, HIDDEN), random(1, tokens, WIDTH), random(1, tokens, WIDTH + HIDDEN)
    down, kernels = random(16, WIDTH + HIDDEN) / (WIDTH + HIDDEN) ** 0.5, ops(h)
    eight = Wants(dtype=torch.int8, down=down)
    return {
        "gelu_tanh": Step(
            lambda: kernels.gelu_tanh(h, None, Wants())[:1],
            lambda: plain_gelu(h),
            2 * nbytes(h),
        ),
        "gelu_tanh beside attention": Step(
            lambda: kernels.gelu_tanh(h, beside, Wants())[:1],
            lambda: plain_gelu(h, beside),
            2 * nbytes(dy),
        ),
        "gelu_tanh to int8 and LoRA": Step(
            lambda: tuple(kernels.gelu_tanh(h, beside, eight)),
            lambda: plain_eight_bits(h, beside, down),
            2 * nbytes(dy) + nbytes(dy) // 2,
        ),
        "gelu_tanh_backward": Step(
            lambda: (kernels.gelu_tanh_backward(dy[..., WIDTH:], h),),
            gradients(lambda h: plain_gelu(h, beside), (h,), (dy,)),
            3 * nbytes(h),
        ),
    }


@pytest.mark.parametrize("side", ["ours", "plain"])
@pytest.mark.parametrize("name", steps(FEW))
@pytest.mark.parametrize("tokens", TOKENS)
def test_speed(benchmark, tokens, name, side):
    benchmark.group = f"{name}, {tokens}"
    run(benchmark, steps(tokens)[name], side)


@pytest.mark.parametrize("tokens", TOKENS)
def test_share_of_a_copy(tokens, capsys):
    print_shares(steps(tokens), capsys)
