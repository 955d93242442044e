"""Rows in 8 bits on the shapes of FLUX.1: activations, gradients, and weights of every stored form.

    pytest benchmarks/bench_rows.py

Plain PyTorch is what one would write; on a card `test_shares` also prints the speed of a copy of as many bytes.
"""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from torch import Tensor

from benchmarks.memory_bound import DEVICE, HIDDEN, TOKENS, WIDTH, Step, nbytes, print_shares, random, run
from fluxq.kernels import RowScaled, Weight, ops, quantize, reference
from fluxq.kernels.rotation import rotate

DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
WIDTHS = (WIDTH, HIDDEN) if DEVICE.type == "cpu" else (WIDTH, HIDDEN, 15360, 21504)
LAYER = (HIDDEN, WIDTH)  # an MLP's first layer; on a processor a quarter of its rows
if DEVICE.type == "cpu":
    LAYER = (HIDDEN // 4, WIDTH)


def plain_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    largest = 127.0 if dtype == torch.int8 else 448.0
    x = x.float()
    scale = x.abs().amax(1).clamp(min=1e-30) / largest
    x = x / scale[:, None]
    return (x.round() if dtype == torch.int8 else x).to(dtype), scale


@lru_cache(maxsize=1)
def activations(tokens: int) -> dict[str, Step]:
    steps = {}
    for width in WIDTHS:
        x = random(tokens, width)
        for name, dtype in DTYPES.items():
            for rotation, way in ((0, ""), (256, ", rotated")):
                steps[f"{name} rows of {width}{way}"] = Step(
                    lambda x=x, dtype=dtype, r=rotation: ops(x).row_quantize(x, dtype, rotation=r),
                    lambda x=x, dtype=dtype, r=rotation: plain_rows(rotate(x, r) if r else x, dtype),
                    nbytes(x) * 3 // 2,
                )
    dy, columns = random(tokens, HIDDEN), torch.rand(HIDDEN, device=DEVICE) + 0.5
    steps["int8 rows times columns"] = Step(
        lambda: ops(dy).row_quantize(dy, torch.int8, columns),
        lambda: plain_rows(dy.float() * columns, torch.int8),
        nbytes(dy) * 3 // 2,
    )
    return steps


CONVERSIONS = {
    f"{form} to {to}{' transposed' if transposed else ''}{' rotated' if rotation else ''}": (
        form,
        to,
        transposed,
        rotation,
    )
    for form in ("nf4", "int8", "fp8", "bf16")
    for to in DTYPES
    for transposed in (False, True)
    for rotation in ((0, 256) if form == "nf4" else (0,))
    if transposed or form != to
}


@lru_cache(maxsize=1)
def weights() -> dict[str, Step]:
    w = random(*LAYER) * 0.02
    stored = {form: quantize(w, form) for form in ("nf4", "int8", "fp8", "bf16")}
    bits = {"nf4": 4.5, "int8": 8, "fp8": 8, "bf16": 16}  # a weight
    return {
        name: Step(
            lambda q=stored[form], dtype=DTYPES[to], t=transposed, r=rotation: ops(w).to_rows(q, dtype, t, r),
            lambda q=stored[form], dtype=DTYPES[to], t=transposed, r=rotation: plain_to_rows(q, dtype, t, r),
            int(w.numel() * (bits[form] * (2 if transposed and form != to else 1) + 8)) // 8,  # scales come first
        )
        for name, (form, to, transposed, rotation) in CONVERSIONS.items()
    }


def plain_to_rows(weight: Weight, dtype: torch.dtype, transposed: bool, rotation: int) -> tuple[Tensor, Tensor]:
    """Through a copy in fp32, but where the bytes are kept."""
    if isinstance(weight, RowScaled) and weight.values.dtype == dtype:
        values, scale = weight.values, weight.scale
    else:
        w = reference.dequantize(weight, torch.float32)
        values, scale = plain_rows(rotate(w, rotation) if rotation else w, dtype)
    return (values.view(torch.uint8).t().contiguous().view(dtype) if transposed else values), scale


@pytest.mark.parametrize("side", ["ours", "plain"])
@pytest.mark.parametrize("name", activations(8))
@pytest.mark.parametrize("tokens", TOKENS)
def test_activations(benchmark, tokens, name, side):
    run(benchmark, activations(tokens)[name], side)


@pytest.mark.parametrize("side", ["ours", "plain"])
@pytest.mark.parametrize("name", CONVERSIONS)
def test_weights(benchmark, name, side):
    run(benchmark, weights()[name], side)


@pytest.mark.parametrize("tokens", TOKENS)
def test_shares(tokens, capsys):
    print_shares(activations(tokens), capsys)


def test_shares_of_weights(capsys):
    print_shares(weights(), capsys)
