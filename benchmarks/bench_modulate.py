"""LayerNorm with shift and scale, and the gated sum before it, on rows of FLUX.1: beside plain PyTorch and a copy.

pytest benchmarks/bench_modulate.py
"""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.memory_bound import FEW, TOKENS, WIDTH, Step, gradients, nbytes, print_shares, random, run
from fluxq.kernels import Wants, ops


def plain_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    return ((1 + scale) * F.layer_norm(x, (WIDTH,), eps=1e-6) + shift,)


def plain_gated(residual: Tensor, gate: Tensor, y: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    x = residual + gate * y
    return x, *plain_modulate(x, shift, scale)


def plain_eight_bits(x: Tensor, shift: Tensor, scale: Tensor, down: Tensor) -> tuple[Tensor, ...]:
    """As one would write it: the modulated rows, int8, scales, and the product with LoRA's down."""
    (y,) = plain_modulate(x, shift, scale)
    row_scale = y.abs().amax(-1, keepdim=True).float() / 127
    return y, (y / row_scale).round().to(torch.int8)[0], row_scale.flatten(), F.linear(y, down)[0]


@lru_cache(maxsize=1)
def steps(tokens: int) -> dict[str, Step]:
    x, y, dx, dy = (random(1, tokens, WIDTH) for _ in range(4))
    shift, scale, gate = random(1, 6 * WIDTH)[:, None].chunk(6, -1)[:3]
    down, kernels, row = random(16, WIDTH) / WIDTH**0.5, ops(x), nbytes(x)
    total = x + gate * y

    def gated_ours() -> tuple[Tensor, ...]:
        z, made = kernels.gated_add_modulate(x, gate, y, shift, scale, Wants())
        return z, made.x

    gated_backward = gradients(lambda r, y: plain_gated(r, gate, y, shift, scale), (x, y), (dx, dy))
    eight = Wants(dtype=torch.int8, down=down)
    return {
        "modulate": Step(
            lambda: kernels.modulate(x, shift, scale, Wants())[:1],
            lambda: plain_modulate(x, shift, scale),
            2 * row,
        ),
        "modulate to int8 and LoRA": Step(
            lambda: tuple(kernels.modulate(x, shift, scale, eight)),
            lambda: plain_eight_bits(x, shift, scale, down),
            2 * row + row // 2,
        ),
        "modulate_backward": Step(
            lambda: kernels.modulate_backward(dy, x, scale, False)[:1],
            gradients(lambda x: plain_modulate(x, shift, scale), (x,), (dy,)),
            3 * row,
        ),
        "gated_add": Step(
            lambda: (kernels.gated_add(x, gate, y),),
            lambda: (x + gate * y,),
            3 * row,
        ),
        "gated_add_backward": Step(
            lambda: kernels.gated_add_backward(dy, gate, None)[:1],
            lambda: (gate * dy,),
            2 * row,
        ),
        "gated_add_modulate": Step(gated_ours, lambda: plain_gated(x, gate, y, shift, scale), 4 * row),
        "gated_add_modulate_backward": Step(
            lambda: kernels.gated_add_modulate_backward(dx, dy, total, gate, None, scale, False)[:2],
            gated_backward,
            5 * row,
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
