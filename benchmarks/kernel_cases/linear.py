"""`lora_linear` in bf16 over NF4, forward and backward: against the plain products and bitsandbytes with peft."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Case, Skip, target
from benchmarks.kernel_cases.setting import LAYERS, Setting, twice_rule
from benchmarks.peers import peft_lora
from benchmarks.roofline import predicted_ms
from fluxq.bench.kernel_steps import nbytes
from fluxq.bench.timing import timed
from fluxq.kernels import Activations, Weight, dequantize, lora_linear, quantize, wants

SAMPLE = 256
"""Rows of y and of dx that are compared with fp64, spread over all."""


@dataclass
class Operands:
    """One layer's numbers. `plain` is the bf16 matrix (N, K); the gradient of the output is `dy`."""

    x: Tensor  # (M, K)
    plain: Tensor
    bias: Tensor  # (N,)
    down: Tensor  # (R, K) fp32
    up: Tensor  # (N, R) fp32
    dy: Tensor  # (M, N)
    scale: float = 0.7

    @classmethod
    def random(cls, s: Setting, layer: str, rows: int) -> Operands:
        n, k = s.layer(layer)
        low = {"std": k**-0.5, "dtype": torch.float32}
        weight, up = s.randn(n, k, std=k**-0.5), s.randn(n, s.rank, dtype=torch.float32)
        return cls(s.randn(rows, k), weight, s.randn(n), s.randn(s.rank, k, **low), up, s.randn(rows, n))


def cases(setting: Setting) -> Iterator[Case]:
    for rows in setting.rows:
        for layer in LAYERS:
            yield Case(f"linear: bf16 over nf4, {layer}, M {rows}", partial(measure, setting, layer, rows, "nf4"))
        for format in ("fp8", "int8", "bf16"):
            yield Case(f"linear: bf16 over {format}, mlp.0, M {rows}", partial(measure, setting, "mlp.0", rows, format))


def measure(s: Setting, layer: str, rows: int, format: str) -> dict[str, Any]:
    o = Operands.random(s, layer, rows)
    weight, ours = quantize(o.plain, format), s.ours
    given = produced(o)
    down, up = o.down.bfloat16(), o.up.bfloat16()
    checked = check(o, weight, given)
    _, low = ours.lora_linear(given.x, weight, o.bias, down, up, o.scale)
    runs: dict[str, Callable[[], Any]] = {
        "decode": lambda: ours.dequantize(weight, torch.bfloat16),
        "forward": lambda: ours.lora_linear(given.x, weight, o.bias, down, up, o.scale),
        "backward": lambda: ours.lora_linear_backward(o.dy, weight, given.x, low, down, up, o.scale),
        "both": both(
            o, lambda x, down, up: lora_linear(given._replace(x=x), weight, o.bias, down, up, o.scale), given.x
        ),
        "plain forward": lambda: F.linear(o.x, o.plain, o.bias),
        "plain dx": lambda: o.dy @ o.plain,
    }
    skipped = {}
    for adapters in peft_lora.ADAPTERS if format == "nf4" else ():
        name = f"bitsandbytes + peft, {adapters}"
        try:
            run, trained = peft_lora.nf4_lora_linear(o.plain, o.bias, o.down, o.up, o.scale, adapters)
        except Skip as reason:
            skipped[name] = str(reason)
            continue
        runs[name] = peer_both(o, run, trained)
    ms = timed(runs, s.device, s.seconds)
    median = {name: row["median"] for name, row in ms.items()}
    decode = 0.0 if format == "bf16" else median["decode"]
    what = "{} without decoding, over the plain product"
    targets = [
        target(what.format("forward"), "<= 1.08", (median["forward"] - decode) / median["plain forward"]),
        target(what.format("backward"), "<= 1.08", (median["backward"] - decode) / median["plain dx"]),
    ]
    theirs = [ms for name, ms in median.items() if name.startswith("bitsandbytes")]
    if theirs:
        targets.append(target("the faster of bitsandbytes + peft, over ours", ">= 1.3", min(theirs) / median["both"]))
    n, k = weight.shape
    moved = nbytes([o.x, o.dy, o.dy, o.x]) + 2 * n * k * 4  # the decoded weight is written and read
    operations = 4.0 * rows * n * k + 12.0 * rows * s.rank * (n + k) / 2
    return {
        **checked,
        "ms": ms,
        "not_run": skipped,
        "predicted_ms": predicted_ms(s.ceilings, moved, bf16=operations),
        "predicted": "both",
        "targets": targets,
    }


def produced(o: Operands) -> Activations:
    """x as the op before hands it on: with the padding that the layer wants behind each row."""
    padding = wants("bf16", o.down, o.x).padding
    wide = torch.empty(len(o.x), o.x.shape[1] + padding, dtype=o.x.dtype, device=o.x.device)
    wide[:, : o.x.shape[1]] = o.x
    return Activations(wide)


def both(o: Operands, run: Callable[[Tensor, Tensor, Tensor], Tensor], x: Tensor) -> Callable[[], Any]:
    """Forward and backward through autograd: the gradients of x, down and up."""
    leaves = [t.detach().requires_grad_() for t in (x, o.down, o.up)]
    return lambda: torch.autograd.grad(run(*leaves), leaves, o.dy)


def peer_both(o: Operands, run: Callable[[Tensor], Tensor], trained: list[Any]) -> Callable[[], Any]:
    x = o.x.detach().requires_grad_()
    return lambda: torch.autograd.grad(run(x), [x, *trained], o.dy)


def check(o: Operands, weight: Weight, given: Activations) -> dict[str, Any]:
    """The twice rule for y, dx, d_down and d_up, against fp64 of the stored weight's numbers; y and dx on some rows."""
    some = slice(None, None, max(1, len(o.x) // SAMPLE))
    width = o.x.shape[1]

    def gradients(x: Tensor, run: Callable[[Tensor, Tensor, Tensor], Tensor]) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (x, o.down, o.up)]
        y = run(*leaves)
        dx, *rest = torch.autograd.grad(y, leaves, o.dy)
        return [y.detach()[some], dx[some, :width], *rest]

    decoded = dequantize(weight, torch.bfloat16)
    ours = gradients(given.x, lambda x, d, u: lora_linear(Activations(x), weight, o.bias, d, u, o.scale))
    plain = gradients(o.x, lambda x, d, u: autograd_linear(x, decoded, o.bias, d, u, o.scale))
    return twice_rule(ours, plain, exact(o, decoded, some))


def autograd_linear(x: Tensor, w: Tensor, bias: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """What anybody would write."""
    return F.linear(x, w, bias) + scale * F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype))


def exact(o: Operands, weight: Tensor, some: slice) -> list[Tensor]:
    """y, dx (some rows), d_down and d_up in fp64."""
    x, dy, w, down, up = (t.double() for t in (o.x, o.dy, weight, o.down, o.up))
    y = x[some] @ w.t() + o.bias.double() + o.scale * (x[some] @ down.t()) @ up.t()
    ds = o.scale * dy @ up  # (M, R)
    return [y, dy[some] @ w + ds[some] @ down, ds.t() @ x, o.scale * dy.t() @ (x @ down.t())]
