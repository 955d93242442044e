"""8-bit products with scales, LoRA and bias in the epilogue at FLUX.1's shapes, beside PyTorch's own in 8 and 16 bits.

    pytest benchmarks/bench_matmul_8bit.py

On a card the Triton kernel; elsewhere the reference at the smallest shape. A part of each answer is held against fp64
before it is timed. What is beside it gives no more than its name says: torch._int_mm an int32 result without scales,
torch._scaled_mm (by rows) one with scales but no LoRA, F.linear the product of bf16 matrices.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fluxq.kernels import ops, reference

CARD = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CARD else "cpu")
RANK = 16
TOKENS = (1536, 2816, 4608) if CARD else (1536,)  # 512 of text and a picture of 512, 768, 1024 pixels a side
LAYERS = {  # (N, K); the gradient's product is one with N and K changed over
    "qkv": (9216, 3072),
    "mlp_up": (12288, 3072),
    "mlp_down": (3072, 12288),
    "linear1": (21504, 3072),
    "linear2": (3072, 15360),
}
SHAPES = [(layer, tokens) for layer in (LAYERS if CARD else ("qkv",)) for tokens in TOKENS]
FP8 = not CARD or torch.cuda.get_device_capability() >= (8, 9)
KINDS = {"int8": torch.int8} | ({"fp8": torch.float8_e4m3fn} if FP8 else {})


@pytest.fixture(scope="module")
def made():
    """The operands of one product at a time: in 8 bits and, the first two, in bf16."""
    kept = {}

    def make(layer: str, tokens: int, kind: str):
        if (layer, tokens, kind) not in kept:
            kept.clear()
            torch.manual_seed(0)
            n, k = LAYERS[layer]
            x, w = (torch.randn(rows, k, device=DEVICE).bfloat16() for rows in (tokens, n))
            eight = *reference.row_quantize(x, KINDS[kind]), *reference.row_quantize(w, KINDS[kind])
            s, up = (torch.randn(rows, RANK, device=DEVICE) for rows in (tokens, n))
            kept[layer, tokens, kind] = x, w, (*eight, torch.bfloat16, s, up, torch.randn(n, device=DEVICE).bfloat16())
        return kept[layer, tokens, kind]

    return make


def check(y: torch.Tensor, arguments) -> None:
    """A corner in the middle of it, across the edges of tiles, against fp64: rounded once or twice."""
    a, a_scale, b, b_scale, _, s, up, bias = arguments
    m, n = slice(100, 300), slice(1000, 1200)
    exact = a[m].double() @ b[n].double().T * a_scale[m, None].double() * b_scale[n].double()
    exact += s[m].double() @ up[n].double().T + bias[n].double()
    assert (y[m, n].double() - exact).norm() <= 2**-8 * exact.norm()


def timed(benchmark, layer: str, tokens: int, run) -> None:
    """Medians of single calls, each until the card has finished."""

    def whole():
        run()
        if CARD:
            torch.cuda.synchronize()

    n, k = LAYERS[layer]
    benchmark.group = f"{layer} {tokens} tokens"
    benchmark.extra_info["tflop"] = 2 * tokens * n * k / 1e12
    benchmark.pedantic(whole, rounds=30 if CARD else 3, warmup_rounds=5 if CARD else 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("layer", "tokens"), SHAPES)
def test_fluxq(benchmark, made, layer, tokens, kind):
    *_, arguments = made(layer, tokens, kind)
    matmul = ops(arguments[0]).matmul_8bit
    check(matmul(*arguments), arguments)
    timed(benchmark, layer, tokens, lambda: matmul(*arguments))


@pytest.mark.parametrize(("layer", "tokens"), SHAPES)
def test_torch_int_mm(benchmark, made, layer, tokens):
    _, _, (a, _, b, *_) = made(layer, tokens, "int8")
    timed(benchmark, layer, tokens, lambda: torch._int_mm(a, b.t()))


@pytest.mark.skipif(not (CARD and FP8), reason="needs a card with fp8")
@pytest.mark.parametrize(("layer", "tokens"), SHAPES)
def test_torch_scaled_mm(benchmark, made, layer, tokens):
    _, _, (a, a_scale, b, b_scale, *_) = made(layer, tokens, "fp8")
    scales = dict(scale_a=a_scale[:, None].contiguous(), scale_b=b_scale[None].contiguous())
    timed(benchmark, layer, tokens, lambda: torch._scaled_mm(a, b.t(), **scales, out_dtype=torch.bfloat16))


@pytest.mark.parametrize(("layer", "tokens"), SHAPES)
def test_torch_bf16(benchmark, made, layer, tokens):
    x, w, _ = made(layer, tokens, "int8")
    timed(benchmark, layer, tokens, lambda: F.linear(x, w))
