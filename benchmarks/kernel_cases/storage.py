"""Decoding and quantising weights: against a clone() of the bytes that they must move."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case, target
from benchmarks.kernel_cases.setting import Setting, nbytes, tensors, twice_rule
from benchmarks.roofline import predicted_ms
from fluxq.kernels import NF4Weight, RowScaled, quantize, reference
from fluxq.timing import timed

INT8, FP8 = torch.int8, torch.float8_e4m3fn
BITS = {INT8: "int8", FP8: "fp8"}
SHAPES = ("mlp.0", "linear2")
Weights = NF4Weight | RowScaled


def cases(setting: Setting) -> Iterator[Case]:
    for layer in SHAPES:
        for format in ("nf4", "int8", "fp8"):
            yield Case(f"storage: {format} -> bf16, {layer}", partial(decode, setting, layer, format, False))
        yield Case(f"storage: nf4 -> bf16 into a wider scratch, {layer}", partial(decode, setting, layer, "nf4", True))
        for dtype, bits in BITS.items():
            for turned in (False, True):
                name = f"storage: nf4 -> {bits}{', transposed' if turned else ''}, {layer}"
                yield Case(name, partial(rows_of, setting, layer, "nf4", dtype, turned))
            name = f"storage: {bits} -> {bits}, transposed, {layer}"
            yield Case(name, partial(rows_of, setting, layer, bits, dtype, True))
            yield Case(f"storage: bf16 -> {bits}, {layer}", partial(quantise, setting, layer, dtype))
        yield Case(f"storage: bf16 -> nf4, {layer}", partial(quantise, setting, layer, None))


def decode(s: Setting, layer: str, format: str, wide: bool) -> dict[str, Any]:
    weight = stored(s, layer, format)
    n, k = weight.shape
    scratch = s.randn(n, k + 32)[:, :k] if wide else None

    def run(ops: ModuleType, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return ops.dequantize(weight, dtype, scratch if dtype == torch.bfloat16 else None)

    ours, plain = run(s.ours).clone(), run(reference).clone()
    checked = twice_rule([ours], [plain], [exact(weight)])
    return row(s, run, fields(weight), [ours], checked | {"same_bits": torch.equal(ours, plain)})


def rows_of(s: Setting, layer: str, format: str, dtype: torch.dtype, turned: bool) -> dict[str, Any]:
    weight = stored(s, layer, format)

    def run(ops: ModuleType) -> tuple[Tensor, Tensor]:
        return ops.to_rows(weight, dtype, turned)

    def matrix(values: Tensor, scale: Tensor) -> Tensor:
        return (values.double().t() if turned else values.double()) * scale.double()[:, None]

    ours, plain = run(s.ours), run(reference)
    checked = twice_rule([matrix(*ours)], [matrix(*plain)], [exact(weight)])
    written = ours[:1] if format != "nf4" else ours  # the scales of 8-bit weights are handed on, not written
    return row(s, run, fields(weight)[: 2 if format == "nf4" else 1], written, checked)


def quantise(s: Setting, layer: str, dtype: torch.dtype | None) -> dict[str, Any]:
    n, k = s.layer(layer)
    w = s.randn(n, k, std=k**-0.5)

    def run(ops: ModuleType) -> tuple[Tensor, Tensor]:
        return ops.nf4_quantize(w) if dtype is None else ops.row_quantize(w, dtype)

    ours, plain = run(s.ours), run(reference)
    kind = NF4Weight if dtype is None else RowScaled
    checked = twice_rule([exact(kind(*ours))], [exact(kind(*plain))], [w])
    if dtype is None:  # these bytes are bitsandbytes', not only close to them
        checked["ok"] = checked["ok"] and all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
    return row(s, run, [w], ours, checked)


def row(
    s: Setting, run: Callable[[ModuleType], Any], read: list[Tensor], written: Any, checked: dict[str, Any]
) -> dict[str, Any]:
    moved = nbytes(read) + nbytes(tensors(written))
    source = torch.empty(moved // 2, dtype=torch.uint8, device=s.device).random_()
    runs = {"ours": partial(run, s.ours), "clone": source.clone, "plain": partial(run, reference)}
    ms = timed(runs, s.device, s.seconds)
    return {
        **checked,
        "bytes": moved,
        "ms": ms,
        "predicted_ms": predicted_ms(s.ceilings, moved),
        "over_plain": ms["plain"]["median"] / ms["ours"]["median"],
        "targets": [target("share of a clone's speed", ">= 0.8", ms["clone"]["median"] / ms["ours"]["median"])],
    }


def stored(s: Setting, layer: str, format: str) -> Weights:
    n, k = s.layer(layer)
    weight = quantize(s.randn(n, k, std=k**-0.5), format)
    assert not isinstance(weight, Tensor)
    return weight


def fields(weight: Weights) -> list[Tensor]:
    return [weight.codes, weight.absmax] if isinstance(weight, NF4Weight) else [weight.values, weight.scale]


def exact(weight: Weights) -> Tensor:
    """The matrix in fp64: NF4's levels times their scales are exact there."""
    if isinstance(weight, RowScaled):
        return weight.values.double() * weight.scale.double()[:, None]
    levels = torch.tensor(reference.NF4_LEVELS, dtype=torch.float32, device=weight.codes.device).double()
    codes = torch.stack([weight.codes >> 4, weight.codes & 15], -1).flatten(1).long()
    return (levels[codes].view(-1, 64) * weight.absmax.double().view(-1, 1)).view(codes.shape)
