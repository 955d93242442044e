"""Errors of 8-bit products by type of layer, next to torchao's."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Case, Skip
from benchmarks.kernel_rows.setting import LAYERS, BenchSetup, skip_missing_fp8
from benchmarks.peers import torchao_8bit
from fluxq.bench.closeness import cosine, relative_error
from fluxq.bench.kernel_cases import layer_shape
from fluxq.bench.memory_bound import EIGHT_BITS, Sizes
from fluxq.kernels import COMPUTES, dequantize, lora_linear, quantize, reference
from fluxq.kernels.rotation import rotation_block

INPUTS = ("gaussian", "outliers", "gelu")
BF16 = 2**-8
"""The largest relative error of rounding to bf16."""


def cases(setting: BenchSetup) -> Iterator[Case]:
    for compute in COMPUTES[1:]:
        for layer in LAYERS:
            for kind in INPUTS:
                yield Case(f"errors: {compute}, {layer}, {kind}", partial(measure, setting, layer, compute, kind))


def measure(s: BenchSetup, layer: str, compute: str, kind: str) -> dict[str, Any]:
    """Only products without rotation are judged. Rounding errors are independent, so the bound for y's error is that of
    x and that of W (by the reference) added in quadrature, and a fifth more.
    """
    skip_missing_fp8(s.device, compute)
    bits, rows, sizes = compute.removesuffix("_dx"), 96 if s.tiny else 512, s.sizes
    n, k = layer_shape(sizes, layer)
    x, w, dy = inputs(sizes, kind, rows, k), sizes.randn(n, k, std=k**-0.5), sizes.randn(rows, n)
    dy = (dy.float() * (1 + 10 * torch.rand(rows, 1, device=s.device))).bfloat16()
    errors: dict[str, Any] = {}
    bounds: dict[str, Any] = {}
    for format in (bits, "nf4"):
        stored = quantize(w, format)
        name, exact = f"from {format}", dequantize(stored, torch.float32).double()
        errors[name] = errors_of(x, dy, stored, exact, compute, 0)
        bounds[name] = error_bounds(x, dy, stored, exact, compute)
        if bits == "int8":
            errors[f"{name}, rotated"] = errors_of(x, dy, stored, exact, compute, rotation_block(k))
    against_bf16 = {"nf4": x.double() @ dequantize(quantize(w, "nf4"), torch.float32).double().t()}
    row: dict[str, Any] = {}
    try:
        against_bf16["torchao"] = torchao_8bit.linear(w, None, bits)(x)
    except Skip as reason:
        row["not_run"] = {"torchao": str(reason)}
    except Exception as error:  # its kernels refuse some GPUs and PyTorch versions
        row["not_run"] = {"torchao": f"{type(error).__name__}: {error}"[:500]}
    against_bf16["ours"] = lora_linear(x, quantize(w, bits), compute=compute)
    whole = x.double() @ w.double().t()
    row["y_against_the_bf16_weight"] = {name: relative_error(y, whole) for name, y in against_bf16.items()}
    ok = all(errors[name][out]["relative"] <= bounds[name][out] for name in bounds for out in ("y", "dx"))
    return {"ok": ok, "errors": errors, "bounds": bounds, **row}


def inputs(s: Sizes, kind: str, rows: int, width: int) -> Tensor:
    """(M, K): Gaussian; with one channel in 200 thirty times as large; or after GELU."""
    x = s.randn(rows, width)
    if kind == "outliers":
        x[:, torch.randperm(width, device=s.device)[: max(1, width // 200)]] *= 30
    return F.gelu(x, approximate="tanh") if kind == "gelu" else x


def errors_of(x: Tensor, dy: Tensor, stored: Any, exact: Tensor, compute: str, rotation: int) -> dict[str, Any]:
    """Of y and dx, against the product with the stored numbers themselves."""
    leaf = x.detach().requires_grad_()
    y = lora_linear(leaf, stored, compute=compute, rotation=rotation)
    (dx,) = torch.autograd.grad(y, leaf, dy)
    pairs = {"y": (y.detach(), x.double() @ exact.t()), "dx": (dx, dy.double() @ exact)}
    return {name: {"relative": relative_error(*pair), "cosine": cosine(*pair)} for name, pair in pairs.items()}


def error_bounds(x: Tensor, dy: Tensor, stored: Any, exact: Tensor, compute: str) -> dict[str, float]:
    """The relative errors that y and dx may have."""
    dtype = EIGHT_BITS[compute.removesuffix("_dx")]
    values, scale = reference.to_rows(stored, dtype)
    weight = relative_error(values.double() * scale.double()[:, None], exact)
    bounds = {"y": math.hypot(rounding(x, dtype), weight, BF16), "dx": 3 * BF16}
    if compute.endswith("_dx"):
        bounds["dx"] = math.hypot(rounding(dy.float() * scale, dtype), weight, BF16)
    return {name: 1.2 * bound for name, bound in bounds.items()}


def rounding(rows: Tensor, dtype: torch.dtype) -> float:
    values, scale = reference.row_quantize(rows, dtype)
    return relative_error(values.double() * scale.double()[:, None], rows)
