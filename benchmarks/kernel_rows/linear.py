"""`lora_linear` in bf16, forward and backward: against the plain products, and over NF4 bitsandbytes with peft."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case, Skip, target
from benchmarks.kernel_rows.setting import LAYERS, BenchSetup
from benchmarks.peers import peft_lora
from benchmarks.roofline import predicted_ms
from fluxq.bench.closeness import twice_rule
from fluxq.bench.kernel_cases import Layer, linear_cases
from fluxq.bench.memory_bound import nbytes
from fluxq.bench.timing import timed
from fluxq.kernels import Activations, dequantize

SAMPLE = 256
"""Rows of y and of dx that are compared with fp64, spread over all."""


def cases(setting: BenchSetup) -> Iterator[Case]:
    for rows in setting.rows:
        for layer in LAYERS:
            yield Case(f"linear: bf16 over nf4, {layer}, M {rows}", partial(measure, setting, layer, rows, "nf4"))
        for format in ("fp8", "int8", "bf16"):
            yield Case(f"linear: bf16 over {format}, mlp.0, M {rows}", partial(measure, setting, "mlp.0", rows, format))


def measure(s: BenchSetup, layer: str, rows: int, format: str) -> dict[str, Any]:
    o = s.layer(layer, rows, format)
    given = o.given()
    checked = check(o, given)
    forward, backward = linear_cases(o, format, "large")
    runs: dict[str, Callable[[], Any]] = {
        "decode": lambda: s.ours.dequantize(o.weight, torch.bfloat16),
        "forward": forward.run,
        "backward": backward.run,
        "both": lambda: o.ours(given),
        "plain forward": forward.against,
        "plain dx": backward.against,
    }
    skipped = {}
    for adapters in peft_lora.ADAPTERS if format == "nf4" else ():
        name = f"bitsandbytes + peft, {adapters}"
        try:
            run, trained = peft_lora.nf4_lora_linear(o.dense, o.bias, o.down, o.up, o.scale, adapters)
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
    n, k = o.weight.shape
    moved = nbytes([o.x, o.dy, o.dy, o.x]) + 2 * n * k * 4  # the decoded weight is written and read
    operations = 4.0 * rows * n * k + 12.0 * rows * len(o.down) * (n + k) / 2
    return {
        **checked,
        "ms": ms,
        "not_run": skipped,
        "predicted_ms": predicted_ms(s.ceilings, moved, bf16=operations),
        "predicted": "both",
        "targets": targets,
    }


def peer_both(o: Layer, run: Callable[[Tensor], Tensor], trained: list[Any]) -> Callable[[], Any]:
    x = o.x.detach().requires_grad_()
    return lambda: torch.autograd.grad(run(x), [x, *trained], o.dy)


def check(o: Layer, given: Activations) -> dict[str, Any]:
    """The twice rule for y, dx, d_down and d_up, against fp64 of the stored weight's numbers; some rows of y and dx."""
    some, width = slice(None, None, max(1, len(o.x) // SAMPLE)), o.x.shape[1]
    decoded = dequantize(o.weight, torch.bfloat16)
    ours, plain = ([y[some], dx[some, :width], *lora] for y, dx, *lora in (o.ours(given), o.plain(decoded)))
    return twice_rule(ours, plain, o.exact(decoded, some))
