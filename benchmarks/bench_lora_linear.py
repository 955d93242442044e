"""The linear layer with LoRA over stored weights at FLUX.1's shapes, forward and backward, beside plain PyTorch.

    pytest benchmarks/bench_lora_linear.py

On a card every path of the Triton backend, in bf16 and with rank 16; elsewhere the reference at the smallest shape. Of
each case a part is held against fp64 before it is timed. Plain PyTorch is the product with a bf16 weight
and LoRA apart, and the same without LoRA; no decoding in either: what the whole layer comes near to at best.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from fluxq.kernels import dequantize, ops, quantize, reference

CARD = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CARD else "cpu")
RANK, SCALE = 16, 0.5
TOKENS = (1536, 2816, 4608) if CARD else (1536,)  # 512 of text and a picture of 512, 768, 1024 pixels a side
LAYERS = {  # (N, K)
    "qkv": (9216, 3072),
    "mlp_up": (12288, 3072),
    "mlp_down": (3072, 12288),
    "linear1": (21504, 3072),
    "linear2": (3072, 15360),
}
SHAPES = [(layer, tokens) for layer in (LAYERS if CARD else ("qkv",)) for tokens in TOKENS]
LAYERS["modulation"] = (18432, 3072)
SHAPES += [("modulation", 1)]
FORMATS = ("nf4", "fp8", "int8", "bf16")
PATHS = ("extended", "plain", "fused") if CARD else ("reference",)


@pytest.fixture(scope="module")
def made():
    """The operands of one layer at a time."""
    kept = {}

    def make(layer: str, tokens: int, format: str):
        if (layer, tokens, format) not in kept:
            kept.clear()
            kept[layer, tokens, format] = operands(*LAYERS[layer], tokens, format)
        return kept[layer, tokens, format]

    return make


def operands(n: int, k: int, tokens: int, format: str):
    torch.manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=DEVICE).bfloat16()

    weight = quantize((randn(n, k) * k**-0.5), format)
    x = torch.full((tokens, k + ops(torch.empty(0, device=DEVICE)).room(RANK)), torch.nan, device=DEVICE).bfloat16()
    x[:, :k] = randn(tokens, k)
    return x, weight, randn(n), randn(RANK, k) * k**-0.5, randn(n, RANK), randn(tokens, n)


def check(made, forward, backward):
    """Rows and columns of the answers against fp64: at most twice plain PyTorch's error there."""
    x, weight, bias, down, up, dy = made
    k, some = weight.shape[1], slice(0, 64)
    w = dequantize(weight, torch.bfloat16)
    y, s = forward()
    dx, _, d_up = backward(s)

    def part(dtype: torch.dtype):
        rows, a, b = x[some, :k].to(dtype), down.to(dtype), up.to(dtype)
        base, lora = w.to(dtype), F.linear(rows, a)
        grad = dy[some].to(dtype)
        dx = grad @ base + SCALE * (grad @ b) @ a
        d_up = SCALE * dy[:, some].to(dtype).T @ F.linear(x[:, :k].to(dtype), a)
        return F.linear(rows, base, bias.to(dtype)) + SCALE * F.linear(lora, b), dx, d_up

    for name, ours, plain, exact in zip(
        ("y", "dx", "d_up"),
        (y[some], dx[some, :k], d_up[some]),
        part(torch.bfloat16),
        part(torch.float64),
        strict=True,
    ):
        allowed = 2 * (plain.double() - exact).norm() + 2**-12 * exact.norm()
        assert (ours.double() - exact).norm() <= allowed, name


def runs(made, path: str):
    """forward() -> y, s and backward(s) -> dx, d_down, d_up by that path."""
    x, weight, bias, down, up, dy = made
    if path == "reference":
        return (
            lambda: reference.lora_linear(x, weight, bias, down, up, SCALE),
            lambda s: reference.lora_linear_backward(dy, weight, x, s, down, up, SCALE),
        )
    from fluxq.kernels.triton import linear, table

    format = linear._format(weight)
    choice = replace(table.choose(f"lora_linear_{format}", DEVICE, len(x)), path=path)
    given = x if path == "extended" else x[:, : weight.shape[1]]

    def forward():
        with table.using(f"lora_linear_{format}", choice):
            return linear.lora_linear(given, weight, bias, down, up, SCALE)

    def backward(s):
        op = f"lora_linear_backward_{format}"
        choice = table.choose(op, DEVICE, len(x))
        with table.using(op, replace(choice, path="fused" if path == "fused" else "extended")):
            return linear.lora_linear_backward(dy, weight, given, s, down, up, SCALE)

    return forward, backward


def timed(benchmark, run):
    """Medians of single calls, each until the card has finished."""

    def whole():
        run()
        if CARD:
            torch.cuda.synchronize()

    benchmark.pedantic(whole, rounds=30 if CARD else 3, warmup_rounds=5 if CARD else 1)


def about(benchmark, layer: str, tokens: int, passes: int):
    n, k = LAYERS[layer]
    benchmark.group = f"{layer} {tokens} tokens, {'forward' if passes == 1 else 'backward'}"
    benchmark.extra_info["tflop"] = 2 * tokens * n * k / 1e12


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("layer", "tokens"), SHAPES)
def test_forward(benchmark, made, layer, tokens, format, path):
    forward, backward = runs(made(layer, tokens, format), path)
    check(made(layer, tokens, format), forward, backward)
    about(benchmark, layer, tokens, 1)
    timed(benchmark, forward)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("layer", "tokens"), SHAPES)
def test_backward(benchmark, made, layer, tokens, format, path):
    forward, backward = runs(made(layer, tokens, format), path)
    check(made(layer, tokens, format), forward, backward)
    _, s = forward()
    about(benchmark, layer, tokens, 2)
    timed(benchmark, lambda: backward(s))


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize(("layer", "tokens"), SHAPES)
def test_plain_pytorch_forward(benchmark, made, layer, tokens, lora):
    x, weight, bias, down, up, _ = made(layer, tokens, "bf16")
    x = x[:, : weight.shape[1]].contiguous()
    about(benchmark, layer, tokens, 1)

    def run():
        y = F.linear(x, weight, bias)
        return y.addmm_(F.linear(x, down), up.t(), alpha=SCALE) if lora else y

    timed(benchmark, run)


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize(("layer", "tokens"), SHAPES)
def test_plain_pytorch_backward(benchmark, made, layer, tokens, lora):
    x, weight, _, down, up, dy = made(layer, tokens, "bf16")
    x = x[:, : weight.shape[1]].contiguous()
    s = F.linear(x, down)
    about(benchmark, layer, tokens, 2)

    def run():
        if not lora:
            return dy @ weight
        return reference.lora_linear_backward(dy, weight, x, s, down, up, SCALE)

    timed(benchmark, run)
