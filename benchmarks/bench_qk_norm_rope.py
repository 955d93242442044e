"""Norm and RoPE of queries and keys, text and image joined, at FLUX.1's size: beside plain PyTorch and a copy.

pytest benchmarks/bench_qk_norm_rope.py
"""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from torch import Tensor

from benchmarks.memory_bound import (
    DEVICE,
    FEW,
    HEADS,
    TOKENS,
    WIDTH,
    Step,
    gradients,
    nbytes,
    print_shares,
    random,
    run,
)
from fluxq.kernels import ops

TEXT, HEAD = 512, WIDTH // HEADS


def plain(scales: list[list[Tensor]], cos: Tensor, sin: Tensor, *qkvs: Tensor) -> tuple[Tensor, ...]:
    """As FLUX's own code does it: norm each stream, join them, turn in fp32."""
    parts = [qkv.unflatten(-1, (3, HEADS, HEAD)).permute(2, 0, 3, 1, 4) for qkv in qkvs]
    joined = []
    for i in range(2):
        streams = []
        for part, pair in zip(parts, scales, strict=True):
            x = part[i].float()
            streams.append((x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)).to(part.dtype) * pair[i])
        even, odd = torch.cat(streams, 2).float().unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
        joined.append(turned.flatten(-2).to(parts[i].dtype))
    return *joined, torch.cat([part[2] for part in parts], 2)


@lru_cache(maxsize=1)
def steps(tokens: int) -> dict[str, Step]:
    lengths = [TEXT, tokens - TEXT]
    qkvs = [random(1, length, 3 * WIDTH) for length in lengths]
    scales = [[1 + 0.2 * random(HEAD) for _ in range(2)] for _ in qkvs]
    angle = torch.rand(1, 1, tokens, HEAD // 2, device=DEVICE) * 7
    cos, sin, kernels = angle.cos(), angle.sin(), ops(qkvs[0])
    streams = [(qkv, *pair) for qkv, pair in zip(qkvs, scales, strict=True)]
    grads = tuple(random(1, tokens, HEADS, HEAD).transpose(1, 2) for _ in range(3))
    q, k, _, rstd = kernels.qk_norm_rope(streams, cos, sin)
    return {
        "qk_norm_rope": Step(
            lambda: kernels.qk_norm_rope(streams, cos, sin)[:3],
            lambda: plain(scales, cos, sin, *qkvs),
            2 * nbytes(*qkvs),
        ),
        "qk_norm_rope_backward": Step(
            lambda: tuple(kernels.qk_norm_rope_backward(*grads, q, k, rstd, scales, lengths, cos, sin, None)),
            gradients(lambda *t: plain(scales, cos, sin, *t), tuple(qkvs), grads),
            2 * nbytes(*qkvs) + nbytes(q, k),
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
