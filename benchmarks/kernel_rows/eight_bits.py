"""`lora_linear` in 8 bits, forward and backward: against plain bf16, and against the library's bare 8-bit products."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.cases import Case, Skip, target
from benchmarks.kernel_rows.setting import LAYERS, BenchSetup, skip_missing_fp8
from benchmarks.peers import torchao_8bit
from benchmarks.roofline import predicted_ms, product
from fluxq.bench.closeness import cosine, relative_error
from fluxq.bench.timing import timed
from fluxq.kernels import COMPUTES, Activations, Weight, dequantize, lora_linear, quantize

HOPPER = {"int8": ">= 1.15", "int8_dx": ">= 1.4", "fp8_dx": ">= 1.4"}
"""compute -> the target for plain bf16's time over ours on Hopper."""


def cases(setting: BenchSetup) -> Iterator[Case]:
    for rows in setting.rows:
        for compute in COMPUTES[1:]:
            for layer in LAYERS:
                yield Case(f"8 bits: {compute}, {layer}, M {rows}", partial(measure, setting, layer, rows, compute))


def measure(s: BenchSetup, layer: str, rows: int, compute: str) -> dict[str, Any]:
    skip_missing_fp8(s.device, compute)
    bits = compute.removesuffix("_dx")
    o = s.layer(layer, rows, "nf4")
    given, eight = o.given(compute), quantize(o.dense, bits)

    @torch.no_grad()
    def forward_only(weight: Weight, made: Activations) -> Any:
        return lora_linear(made, weight, o.bias, o.down, o.up, o.scale, compute)

    some = slice(None, None, max(1, rows // 256))
    y, dx, *lora = o.ours(given, compute)
    exact = o.exact(dequantize(o.weight, torch.float32), some)
    errors = {
        name: {"relative": relative_error(a, b), "cosine": cosine(a, b)}
        for name, a, b in zip(("y", "dx", "d_down", "d_up"), (y[some], dx[some], *lora), exact, strict=True)
    }
    del y, dx, lora, exact
    runs: dict[str, Callable[[], Any]] = {
        "from nf4, rows given": lambda: o.ours(given, compute),
        "from nf4, rows made here": lambda: o.ours(Activations(o.x), compute),
        f"from {bits}, rows given": lambda: o.ours(given, compute, eight),
        "plain bf16": lambda: (F.linear(o.x, o.dense, o.bias), o.dy @ o.dense),
    }
    not_run: dict[str, str] = {}
    n, k = o.dense.shape
    try:
        forward = product(bits, rows, n, k, s.device)
        backward = product(bits, rows, k, n, s.device) if compute.endswith("_dx") else lambda: o.dy @ o.dense
        forward()
        backward()
        runs["bare products"] = lambda: (forward(), backward())
    except (RuntimeError, ValueError, NotImplementedError) as error:
        not_run["bare products"] = str(error).splitlines()[0]
    try:
        theirs = torchao_8bit.linear(o.dense, o.bias, bits)
        theirs(o.x)
        runs["torchao, forward only"] = lambda: theirs(o.x)
        runs["ours, forward only"] = lambda: forward_only(eight, given)
    except Skip as reason:
        not_run["torchao, forward only"] = str(reason)
    except Exception as error:  # its kernels refuse some GPUs and PyTorch versions
        not_run["torchao, forward only"] = f"{type(error).__name__}: {error}"[:500]
    ms = timed(runs, s.device, s.seconds)
    plain = ms["plain bf16"]["median"]
    ratios = {name: plain / row["median"] for name, row in ms.items() if "forward only" not in name}
    operations = (
        {bits: 4.0 * rows * n * k}
        if compute.endswith("_dx")
        else {bits: 2.0 * rows * n * k, "bf16": 2.0 * rows * n * k}
    )
    name, ratio = "plain bf16 over ours, from nf4, rows given (target for Hopper)", ratios["from nf4, rows given"]
    return {
        "ok": all(e["relative"] < (0.06 if key in ("y", "dx") else 0.02) for key, e in errors.items()),
        "errors": errors,
        "ms": ms,
        "not_run": not_run,
        "over_plain_bf16": ratios,
        "predicted_ms": predicted_ms(s.ceilings, 4.0 * rows * (n + k), **operations),
        "predicted": "from nf4, rows given",
        "targets": [target(name, HOPPER[compute], ratio, s.hopper)] if compute in HOPPER else [],
    }
