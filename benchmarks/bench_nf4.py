"""NF4: fluxq's quantiser and decoder against bitsandbytes', on a layer of FLUX.1 (12288 x 3072).

    pytest benchmarks/bench_nf4.py

The bytes are compared before anything is timed. `test_ratio` prints medians of alternating runs on the processor and
their ratio; `test_shares` every way of decoding beside plain PyTorch and a copy of as many bytes, on a card if there is
one.
"""

from __future__ import annotations

import statistics
import time
from functools import lru_cache

import pytest
import torch

from benchmarks.memory_bound import DEVICE, Step, print_shares, run
from fluxq.kernels import dequantize, ops, quantize
from fluxq.kernels.reference import NF4_LEVELS
from fluxq.quiet import quiet_imports

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
            f"\nNF4 quantiser, 12288 x 3072 bf16, {torch.get_num_threads()} threads: fluxq {ours * 1e3:.0f} ms, "
            f"bitsandbytes {theirs * 1e3:.0f} ms, ratio {theirs / ours:.1f}"
        )


SHAPES = ((3072, 3072), (12288, 3072), (3072, 15360), (21504, 3072)) if DEVICE.type == "cuda" else ((3072, 3072),)
DECODERS = ("decode", "decode transposed", "decode beside LoRA's columns")


@lru_cache(maxsize=1)
def decoding(shape: tuple[int, int]) -> dict[str, Step]:
    """To bf16. Plain PyTorch looks levels up, multiplies in fp32 and rounds."""
    rows, columns = shape
    weight = quantize(torch.randn(shape, device=DEVICE) * 0.02, "nf4")
    kernels, levels = ops(weight.codes), torch.tensor(NF4_LEVELS, device=DEVICE)
    scratch = torch.zeros(rows, columns + 32, dtype=torch.bfloat16, device=DEVICE)

    def ours(out: torch.Tensor | None = None, transposed: bool = False) -> tuple[torch.Tensor]:
        return (kernels.dequantize(weight, torch.bfloat16, out, transposed=transposed),)

    def plain() -> torch.Tensor:
        codes = torch.stack([weight.codes >> 4, weight.codes & 15], -1).view(rows, columns)
        return (levels[codes.int()].view(-1, 64) * weight.absmax.view(-1, 1)).bfloat16().view(rows, columns)

    moved = rows * columns * (9 / 16 + 2)
    return {
        "decode": Step(ours, lambda: (plain(),), int(moved)),
        "decode transposed": Step(lambda: ours(transposed=True), lambda: (plain().t().contiguous(),), int(moved)),
        "decode beside LoRA's columns": Step(lambda: ours(scratch[:, :columns]), lambda: (plain(),), int(moved)),
    }


@pytest.mark.parametrize("side", ["ours", "plain"])
@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_decoding(benchmark, shape, name, side):
    run(benchmark, decoding(shape)[name], side)


@pytest.mark.parametrize("shape", SHAPES)
def test_shares(shape, capsys):
    print_shares(decoding(shape), capsys)
