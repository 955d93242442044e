"""NF4: fluxq's quantizer and decoder against bitsandbytes', on a layer of FLUX.1 (12288 x 3072).

    pytest benchmarks/bench_nf4.py

The bytes are compared before anything is timed. `test_ratio` prints medians of alternating runs on the CPU and
their ratio; `test_share_of_a_copy` quantizer and decoders beside plain PyTorch and a copy, on a GPU if there is one.
"""

from __future__ import annotations

import statistics
import time

import pytest
import torch

from benchmarks.pytest_cases import GPU, LAYERS, of_weights
from fluxq.bench.kernel_steps import STORAGE
from fluxq.console import quiet_imports
from fluxq.kernels import dequantize, quantize

with quiet_imports():
    from bitsandbytes import functional as bnb


@pytest.fixture(scope="module")
def weight() -> torch.Tensor:
    w = (torch.randn(12288, 3072, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    theirs, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4")
    ours = quantize(w, "nf4")
    assert torch.equal(ours.codes.flatten(), theirs.flatten())
    assert torch.equal(ours.absmax.flatten(), state.absmax)
    return w


@pytest.mark.benchmark(group="quantize")
def test_quantize_fluxq(benchmark, weight):
    benchmark(quantize, weight, "nf4")


@pytest.mark.benchmark(group="quantize")
def test_quantize_bitsandbytes(benchmark, weight):
    benchmark.pedantic(bnb.quantize_4bit, (weight,), {"blocksize": 64, "quant_type": "nf4"}, rounds=5)


@pytest.mark.benchmark(group="dequantize")
def test_dequantize_fluxq(benchmark, weight):
    benchmark(dequantize, quantize(weight, "nf4"), torch.bfloat16)


@pytest.mark.benchmark(group="dequantize")
def test_dequantize_bitsandbytes(benchmark, weight):
    benchmark(bnb.dequantize_4bit, *bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4"))


def test_ratio(weight, capsys):
    """bitsandbytes' time over ours; runs alternate, so that both meet the same noise."""
    times: dict[str, list[float]] = {"fluxq": [], "bitsandbytes": []}
    for _ in range(7):
        for name, call in (
            ("fluxq", lambda: quantize(weight, "nf4")),
            ("bitsandbytes", lambda: bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")),
        ):
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    ours, theirs = (statistics.median(times[name]) for name in ("fluxq", "bitsandbytes"))
    with capsys.disabled():
        print(
            f"\nNF4 quantizer, 12288 x 3072 bf16, {torch.get_num_threads()} threads: fluxq {ours * 1e3:.0f} ms, "
            f"bitsandbytes {theirs * 1e3:.0f} ms, ratio {theirs / ours:.1f}"
        )


test_speed, test_share_of_a_copy = of_weights(
    {name: make for name, make in STORAGE.items() if "nf4" in name and "bf16" in name},
    list(LAYERS) if GPU else ["qkv"],
)
