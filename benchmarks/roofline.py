"""The GPU's best rates, measured in the same run, and the times predicted from them.

A prediction is the longer of two times: multiplying at the rate of a large square product, and moving all bytes once at
the rate of a large copy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fluxq.bench.timing import timed

KINDS = ("double", "single")
REPLAYED = {"recompute": (8, 7, 1), "keep_attention": (8, 7, 0), "keep_qkv": (4, 4, 0)}
"""Policy -> twelfths of a double and of a single block's products that are recomputed, and attentions."""

Ceilings = dict[str, float | None]
"""bytes: a copy's bytes per second, reads and writes together; bf16, int8, fp8: operations per second, or None."""


def measure_ceilings(device: torch.device, tiny: bool) -> Ceilings:
    side = 128 if tiny else 8192
    source = torch.randint(0, 255, (1 << (16 if tiny else 29),), dtype=torch.uint8, device=device)
    ms = timed({"copy": source.clone}, device, seconds=0.3)["copy"]["median"]
    found: Ceilings = {"bytes": 2 * source.numel() / ms * 1e3}
    del source
    for kind in ("bf16", "int8", "fp8"):
        try:
            run = product(kind, side, side, side, device)
            ms = timed({kind: run}, device, seconds=0.3)[kind]["median"]
            found[kind] = 2 * side**3 / ms * 1e3
        except (RuntimeError, ValueError, NotImplementedError):
            found[kind] = None  # the GPU or this PyTorch has no such product
    return found


def product(kind: str, m: int, n: int, k: int, device: torch.device) -> Callable[[], Any]:
    """The library's bare product (M, K) x (N, K)^T of random numbers of that kind, without scales by row."""
    a, b = (torch.randn(rows, k, device=device) for rows in (m, n))
    if kind == "bf16":
        a, b = a.bfloat16(), b.bfloat16()
        return lambda: a @ b.t()
    if kind == "int8":
        a, b = ((40 * t).clamp(-127, 127).to(torch.int8) for t in (a, b))
        return lambda: torch._int_mm(a, b.t())
    a, b = (t.to(torch.float8_e4m3fn) for t in (a, b))
    one = torch.ones((), device=device)
    return lambda: torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)


def predicted_ms(ceilings: Ceilings, nbytes: float, **operations: float) -> float | None:
    """Milliseconds of moving `nbytes` or of the `operations` (by kind), whichever is longer; None if the GPU has no
    such product.
    """
    times = [share(count, ceilings.get(kind)) for kind, count in operations.items()]
    moving = share(nbytes, ceilings.get("bytes"))
    return None if None in (*times, moving) else 1e3 * max(sum(t or 0.0 for t in times), moving or 0.0)


def share(count: float, rate: float | None) -> float | None:
    return None if rate is None else count / rate


def block_ms(ceilings: Ceilings, kind: str, width: int, rows: int, policy: str, compute: str) -> float | None:
    """A lower bound for a block's forward and backward pass: its products alone, without LoRA's.

    A token is multiplied by 12 D^2 weights each way, in either kind of block; attention is in bf16.
    """
    *replayed, attentions = REPLAYED.get(policy, (0, 0, 0))
    bits = compute.removesuffix("_dx")
    once = 2.0 * 12 * width**2 * rows
    operations = {bits: 0.0} | {"bf16": 4.0 * rows**2 * width * (1 + 2.5 + attentions)}
    operations[bits] += once * (1 + replayed[KINDS.index(kind)] / 12)
    operations[bits if compute.endswith("_dx") else "bf16"] += once
    return predicted_ms(ceilings, 0.0, **operations)
