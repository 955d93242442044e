"""The linear layer with LoRA over stored weights at FLUX.1's shapes, forward and backward, beside the plain product.

    pytest benchmarks/bench_lora_linear.py

On a GPU every path of the Triton backend, in bf16 and with rank 16; elsewhere the reference at the smallest shape. The
plain product is that with a bf16 weight, without LoRA: what the whole layer comes near to at best.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache

import pytest

from benchmarks.pytest_cases import DEVICE, GPU, LAYERS, SHAPES, product
from fluxq.bench.kernel_cases import Case, linear_cases
from fluxq.bench.kernels import check
from fluxq.kernels import FORMATS

MODULATION = ("modulation", 1)
PATHS = ("extended", "plain", "fused") if GPU else ("reference",)


@lru_cache(maxsize=1)
def made(layer: str, tokens: int, format: str) -> list[Case]:
    return list(linear_cases(format, "few" if tokens == 1 else "large", (tokens, *LAYERS[layer]), DEVICE))


def by(path: str, op: str, tokens: int):
    if path == "reference":
        return nullcontext()
    from fluxq.kernels.triton import table

    return table.using(op, replace(table.choose(op, DEVICE, tokens), path=path))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("layer", "tokens"), [*SHAPES, MODULATION])
def test_forward(benchmark, layer, tokens, format, path):
    case = made(layer, tokens, format)[0]
    with by(path, case.op, tokens):
        check(case)
        product(benchmark, case.run, layer, tokens, "forward")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("layer", "tokens"), [*SHAPES, MODULATION])
def test_backward(benchmark, layer, tokens, format, path):
    case = made(layer, tokens, format)[1]
    with by("fused" if path == "fused" else "extended", case.op, tokens) if GPU else nullcontext():
        check(case)
        product(benchmark, case.run, layer, tokens, "backward")


@pytest.mark.parametrize("what", ["forward", "backward"])
@pytest.mark.parametrize(("layer", "tokens"), [*SHAPES, MODULATION])
def test_plain_product(benchmark, layer, tokens, what):
    product(benchmark, made(layer, tokens, "nf4")[what == "backward"].plain, layer, tokens, what)
