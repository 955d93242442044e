"""8-bit products with scales in the epilogue at FLUX.1's shapes, beside PyTorch's own in 8 and 16 bits.

    pytest benchmarks/bench_matmul_8bit.py

On a GPU the Triton kernel; elsewhere the reference at the smallest shape. What is beside it gives no more than its
name says: `product` of benchmarks/roofline.py is the library's bare one, without any scales by row.
"""

from __future__ import annotations

from functools import lru_cache

import pytest

from benchmarks import roofline
from benchmarks.pytest_cases import DEVICE, GPU, LAYERS, SHAPES, product
from fluxq.bench.kernel_cases import Case, has_fp8, product_case
from fluxq.bench.kernel_steps import EIGHT_BITS
from fluxq.bench.kernels import check

KINDS = [kind for kind in EIGHT_BITS if kind == "int8" or not GPU or has_fp8(DEVICE)]


@lru_cache(maxsize=1)
def made(layer: str, tokens: int, kind: str) -> Case:
    return product_case(kind, (tokens, *LAYERS[layer]), DEVICE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("layer", "tokens"), SHAPES)
def test_fluxq(benchmark, layer, tokens, kind):
    check(made(layer, tokens, kind))
    product(benchmark, made(layer, tokens, kind).run, layer, tokens, "")


@pytest.mark.parametrize("kind", [*(KINDS if GPU else ("int8",)), "bf16"])
@pytest.mark.parametrize(("layer", "tokens"), SHAPES)
def test_torch(benchmark, layer, tokens, kind):
    n, k = LAYERS[layer]
    product(benchmark, roofline.product(kind, tokens, n, k, DEVICE), layer, tokens, "")
