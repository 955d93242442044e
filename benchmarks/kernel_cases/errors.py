"""How far 8-bit products are from exact ones, layer type by layer type, and torchao's beside them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Case, Skip
from benchmarks.kernel_cases.eight_bits import refuse_fp8_where_missing
from benchmarks.kernel_cases.setting import LAYERS, Setting, cosine, relative_error
from benchmarks.peers import torchao_8bit
from fluxq.kernels import COMPUTES, dequantize, lora_linear, quantize
from fluxq.kernels.rotation import rotation_block

INPUTS = ("gaussian", "outliers", "gelu")
BOUNDS = {
    ("int8", "gaussian"): 0.0145,
    ("int8", "outliers"): 0.08,
    ("int8", "gelu"): 0.018,
    ("fp8", "gaussian"): 0.046,
    ("fp8", "outliers"): 0.046,
    ("fp8", "gelu"): 0.046,
}
"""Of y from a weight stored in the same 8 bits: measured once on processors, with a fifth on top."""


def cases(setting: Setting) -> Iterator[Case]:
    for compute in COMPUTES[1:]:
        for layer in LAYERS:
            for kind in INPUTS:
                yield Case(f"errors: {compute}, {layer}, {kind}", partial(measure, setting, layer, compute, kind))


def measure(s: Setting, layer: str, compute: str, kind: str) -> dict[str, Any]:
    bits, rows = compute.removesuffix("_dx"), 96 if s.tiny else 512
    refuse_fp8_where_missing(s, bits)
    n, k = s.layer(layer)
    x, w, dy = inputs(s, kind, rows, k), s.randn(n, k, std=k**-0.5), s.randn(rows, n)
    dy = (dy.float() * (1 + 10 * torch.rand(rows, 1, device=s.device))).bfloat16()
    row: dict[str, Any] = {}
    for format in (bits, "nf4"):
        stored = quantize(w, format)
        decoded = dequantize(stored, torch.float32)
        row[f"from {format}"] = both_errors(x, dy, stored, decoded.double(), compute, 0)
        if bits == "int8":
            row[f"from {format}, rotated"] = both_errors(x, dy, stored, decoded.double(), compute, rotation_block(k))
    row["nf4 itself"] = relative_error(
        x.double() @ dequantize(quantize(w, "nf4"), torch.float32).double().t(), x.double() @ w.double().t()
    )
    try:
        theirs = torchao_8bit.linear(w, None, bits)(x)
        row["torchao against the bf16 weight"] = relative_error(theirs, x.double() @ w.double().t())
        ours = lora_linear(x, quantize(w, bits), compute=compute)
        row["ours against the bf16 weight"] = relative_error(ours, x.double() @ w.double().t())
    except Skip as reason:
        row["not_run"] = {"torchao": str(reason)}
    except Exception as error:  # its kernels refuse some cards and PyTorch versions
        row["not_run"] = {"torchao": f"{type(error).__name__}: {error}"[:500]}
    bound = BOUNDS[bits, kind]
    return {"ok": row[f"from {bits}"]["y"]["relative"] < bound, "bound": bound, "errors": row}


def inputs(s: Setting, kind: str, rows: int, width: int) -> Tensor:
    """(M, K): Gaussian; with one channel in 200 thirty times as large; or what GELU gives."""
    x = s.randn(rows, width)
    if kind == "outliers":
        x[:, torch.randperm(width, device=s.device)[: max(1, width // 200)]] *= 30
    return F.gelu(x, approximate="tanh") if kind == "gelu" else x


def both_errors(x: Tensor, dy: Tensor, stored: Any, exact: Tensor, compute: str, rotation: int) -> dict[str, Any]:
    """Of y and of dx, against the product with the very numbers that are stored."""
    leaf = x.detach().requires_grad_()
    y = lora_linear(leaf, stored, compute=compute, rotation=rotation)
    (dx,) = torch.autograd.grad(y, leaf, dy)
    found = {"y": (y.detach(), x.double() @ exact.t()), "dx": (dx, dy.double() @ exact)}
    return {name: {"relative": relative_error(*pair), "cosine": cosine(*pair)} for name, pair in found.items()}
