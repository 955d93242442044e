"""`lora_linear` in 8 bits, forward and backward: against plain bf16, and against the library's bare 8-bit products."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.cases import Case, Skip, target
from benchmarks.kernel_cases.linear import Operands, both, exact
from benchmarks.kernel_cases.setting import LAYERS, Setting, cosine, relative_error
from benchmarks.peers import torchao_8bit
from benchmarks.roofline import predicted_ms, product
from fluxq.bench.timing import timed
from fluxq.kernels import COMPUTES, Activations, dequantize, lora_linear, quantize

HOPPER = {"int8": ">= 1.15", "int8_dx": ">= 1.4", "fp8_dx": ">= 1.4"}
"""compute -> what plain bf16's time should be over ours there."""


def cases(setting: Setting) -> Iterator[Case]:
    for rows in setting.rows:
        for compute in COMPUTES[1:]:
            for layer in LAYERS:
                yield Case(f"8 bits: {compute}, {layer}, M {rows}", partial(measure, setting, layer, rows, compute))


def measure(s: Setting, layer: str, rows: int, compute: str) -> dict[str, Any]:
    bits = compute.removesuffix("_dx")
    refuse_fp8_where_missing(s, bits)
    o = Operands.random(s, layer, rows)
    nf4, own = quantize(o.plain, "nf4"), quantize(o.plain, bits)
    dtype = torch.int8 if bits == "int8" else torch.float8_e4m3fn
    values, scale = s.ours.row_quantize(o.x, dtype)
    given = Activations(o.x, values, scale, o.x.float() @ o.down.t())

    def run(weight: Any, made: Activations) -> Callable[[], Any]:
        return both(o, lambda x, d, u: lora_linear(made._replace(x=x), weight, o.bias, d, u, o.scale, compute), o.x)

    @torch.no_grad()
    def ours_forward(weight: Any, made: Activations) -> Any:
        return lora_linear(made, weight, o.bias, o.down, o.up, o.scale, compute)

    decoded = dequantize(nf4, torch.float32)
    some = slice(None, None, max(1, rows // 256))
    leaves = [t.detach().requires_grad_() for t in (o.x, o.down, o.up)]
    y = lora_linear(given._replace(x=leaves[0]), nf4, o.bias, leaves[1], leaves[2], o.scale, compute)
    dx, *rest = torch.autograd.grad(y, leaves, o.dy)
    found = dict(zip(("y", "dx", "d_down", "d_up"), (y.detach()[some], dx[some], *rest), strict=True))
    errors = {
        name: {"relative": relative_error(a, b), "cosine": cosine(a, b)}
        for (name, a), b in zip(found.items(), exact(o, decoded, some), strict=True)
    }
    del decoded, y, dx, rest, found
    runs: dict[str, Callable[[], Any]] = {
        "from nf4, rows given": run(nf4, given),
        "from nf4, rows made here": run(nf4, Activations(o.x)),
        f"from {bits}, rows given": run(own, given),
        "plain bf16": lambda: (F.linear(o.x, o.plain, o.bias), o.dy @ o.plain),
    }
    not_run: dict[str, str] = {}
    n, k = o.plain.shape
    try:
        forward = product(bits, rows, n, k, s.device)
        backward = product(bits, rows, k, n, s.device) if compute.endswith("_dx") else lambda: o.dy @ o.plain
        forward()
        backward()
        runs["bare products"] = lambda: (forward(), backward())
    except (RuntimeError, ValueError, NotImplementedError) as error:
        not_run["bare products"] = str(error).splitlines()[0]
    try:
        theirs = torchao_8bit.linear(o.plain, o.bias, bits)
        theirs(o.x)
        runs["torchao, forward only"] = lambda: theirs(o.x)
        runs["ours, forward only"] = lambda: ours_forward(own, given)
    except Skip as reason:
        not_run["torchao, forward only"] = str(reason)
    except Exception as error:  # its kernels refuse some GPUs and PyTorch versions
        not_run["torchao, forward only"] = f"{type(error).__name__}: {error}"[:500]
    ms = timed(runs, s.device, s.seconds)
    plain = ms["plain bf16"]["median"]
    ratios = {name: plain / row["median"] for name, row in ms.items() if "forward only" not in name}
    wanted = HOPPER.get(compute)
    hopper = s.device.type == "cuda" and torch.cuda.get_device_capability(s.device)[0] == 9
    name = "plain bf16 over ours, from nf4, rows given (wanted of Hopper)"
    operations = (
        {bits: 4.0 * rows * n * k}
        if compute.endswith("_dx")
        else {bits: 2.0 * rows * n * k, "bf16": 2.0 * rows * n * k}
    )
    return {
        "ok": all(e["relative"] < (0.06 if key in ("y", "dx") else 0.02) for key, e in errors.items()),
        "errors": errors,
        "ms": ms,
        "not_run": not_run,
        "over_plain_bf16": ratios,
        "predicted_ms": predicted_ms(s.ceilings, 4.0 * rows * (n + k), **operations),
        "predicted": "from nf4, rows given",
        "targets": [target(name, wanted, ratios["from nf4, rows given"], hopper)] if wanted else [],
    }


def refuse_fp8_where_missing(s: Setting, bits: str) -> None:
    if bits == "fp8" and s.device.type == "cuda" and torch.cuda.get_device_capability(s.device) < (8, 9):
        raise Skip("this GPU multiplies no fp8; there fluxq computes in int8")
