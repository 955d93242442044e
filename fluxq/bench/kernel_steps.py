"""What waits for memory, at any size: the steps between a block's products, and weights changing their form.

Each is an op with its inputs, from which follow its outputs on any backend and the bytes that it must move. Operands
are made when a step is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fluxq.kernels import NF4Weight, RowScaled, Wants, quantize, reference
from fluxq.kernels.rotation import rotation_block

EIGHT_BITS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True)
class Sizes:
    """FLUX.1's at 768 x 768 pixels, where nothing else is said. `tokens`: of text and image together."""

    device: torch.device
    tokens: int = 2816
    width: int = 3072
    heads: int = 24
    text: int = 512
    rank: int = 16

    def randn(self, *shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=self.device) * std).bfloat16()


@dataclass(frozen=True)
class Step:
    """An op that waits for memory, on fixed inputs: `call(ops, wants, inputs)` gives its outputs.

    width: that of its Activations, without padding; 0 if it feeds no linear layer. dtype: of the 8-bit rows wanted of
    it; inputs["down"] is the LoRA whose product is wanted beside them. rotation: the block in which those rows are
    rotated, 0 for none. extra: bytes that outputs have and are not written.
    """

    op: str
    inputs: Mapping[str, Any]
    call: Callable[[ModuleType, Wants, Mapping[str, Any]], Any]
    width: int = 0
    dtype: torch.dtype | None = None
    rotation: int = 0
    extra: int = 0

    def run(self, on: ModuleType, padding: int = 0) -> Any:
        return self.call(on, Wants(padding, self.dtype, self.inputs.get("down"), self.rotation), self.inputs)

    def moved(self, outputs: Any) -> int:
        """Bytes: every input read once, every output written once, what is left as padding not."""
        written = sum(
            nbytes([t]) * (self.width / t.shape[-1] if self.width and t.ndim == 3 and t.shape[-1] > self.width else 1)
            for t in tensors(outputs)
        )
        return nbytes(tensors(list(self.inputs.values()))) + int(written) - self.extra


def modulate(s: Sizes) -> Step:
    return Step(
        "modulate",
        _rows(s, "x") | _vectors(s, "shift", "scale"),
        lambda o, wants, i: o.modulate(i["x"], i["shift"], i["scale"], wants),
        s.width,
    )


def modulate_backward(s: Sizes, sums: bool = False) -> Step:
    return Step(
        "modulate_backward" + "_sums" * sums,
        _rows(s, "dy", "x") | _vectors(s, "scale"),
        lambda o, _, i: o.modulate_backward(i["dy"], i["x"], i["scale"], sums),
    )


def gated_add(s: Sizes) -> Step:
    given = _rows(s, "residual", "y") | _vectors(s, "gate")
    return Step("gated_add", given, lambda o, _, i: o.gated_add(i["residual"], i["gate"], i["y"]))


def gated_add_backward(s: Sizes, sums: bool = False) -> Step:
    given = _rows(s, "dout", *["y"] * sums) | _vectors(s, "gate")
    call = lambda o, _, i: o.gated_add_backward(i["dout"], i["gate"], i.get("y"))  # noqa: E731
    return Step("gated_add_backward" + "_sums" * sums, given, call)


def gated_add_modulate(s: Sizes) -> Step:
    return Step(
        "modulate",
        _rows(s, "residual", "y") | _vectors(s, "gate", "shift", "scale"),
        lambda o, wants, i: o.gated_add_modulate(*(i[n] for n in ("residual", "gate", "y", "shift", "scale")), wants),
        s.width,
    )


def gated_add_modulate_backward(s: Sizes) -> Step:
    def call(o: ModuleType, _: Wants, i: Mapping[str, Any]) -> Any:
        return o.gated_add_modulate_backward(i["dx"], i["dy"], i["x"], i["gate"], None, i["scale"], False)

    return Step("modulate_backward", _rows(s, "dx", "dy", "x") | _vectors(s, "gate", "scale"), call)


def qk_norm_rope(s: Sizes, streams: int = 1) -> Step:
    """Of one stream, or of text and image."""
    head = s.width // s.heads
    angles = torch.rand(1, 1, s.tokens, head // 2, device=s.device) * 6
    given = {f"qkv{n}": s.randn(1, length, 3 * s.width) for n, length in enumerate(_lengths(s, streams))}
    given |= {f"{x}_scale{n}": 1 + s.randn(head, std=0.1) for n in range(streams) for x in "qk"}
    given |= {"cos": angles.cos(), "sin": angles.sin()}

    def call(o: ModuleType, _: Wants, i: Mapping[str, Any]) -> Any:
        joined = [(i[f"qkv{n}"], i[f"q_scale{n}"], i[f"k_scale{n}"]) for n in range(streams)]
        return o.qk_norm_rope(joined, i["cos"], i["sin"])

    return Step("qk_norm_rope", given, call)


def qk_norm_rope_backward(s: Sizes, streams: int = 1) -> Step:
    made = qk_norm_rope(s, streams)
    q, k, _, rstd = made.run(reference)
    given = {f"d{n}": s.randn(*q.transpose(1, 2).shape).transpose(1, 2) for n in "qkv"} | dict(q=q, k=k, rstd=rstd)
    given |= {name: t for name, t in made.inputs.items() if not name.startswith("qkv")}

    def call(o: ModuleType, _: Wants, i: Mapping[str, Any]) -> Any:
        scales = [(i[f"q_scale{n}"], i[f"k_scale{n}"]) for n in range(streams)]
        tensors = (i[n] for n in ("dq", "dk", "dv", "q", "k", "rstd"))
        return o.qk_norm_rope_backward(*tensors, scales, _lengths(s, streams), i["cos"], i["sin"], None)

    return Step("qk_norm_rope_backward", given, call)


def gelu_tanh(s: Sizes, beside: bool = False) -> Step:
    given = {"h": s.randn(1, s.tokens, 4 * s.width)} | (_rows(s, "beside") if beside else {})
    call = lambda o, wants, i: o.gelu_tanh(i["h"], i.get("beside"), wants)  # noqa: E731
    return Step("gelu_tanh", given, call, (4 + beside) * s.width)


def gelu_tanh_backward(s: Sizes) -> Step:
    given = {name: s.randn(1, s.tokens, 4 * s.width) for name in ("dy", "h")}
    return Step("gelu_tanh_backward", given, lambda o, _, i: o.gelu_tanh_backward(i["dy"], i["h"]))


def rotate(s: Sizes) -> Step:
    return Step("rotate", _rows(s, "x"), lambda o, _, i: o.rotate(i["x"], rotation_block(s.width)))


def in_8_bits(make: Callable[[Sizes], Step], dtype: torch.dtype, down: bool, rotated: bool, s: Sizes) -> Step:
    """That step for a layer that multiplies in 8 bits."""
    step = make(s)
    rotation = rotation_block(step.width) if rotated else 0
    given = {"down": s.randn(s.rank, step.width, std=step.width**-0.5)} if down else {}
    op, given = step.op + "_8bit" + "_down" * down, {**step.inputs, **given}
    return replace(step, op=op, inputs=given, dtype=dtype, rotation=rotation)


FEEDING: dict[str, Callable[[Sizes], Step]] = {
    "modulate": modulate,
    "gated_add_modulate": gated_add_modulate,
    "gelu_tanh": gelu_tanh,
    "gelu_tanh, attention beside": partial(gelu_tanh, beside=True),
}
STEPS: dict[str, Callable[[Sizes], Step]] = {
    **FEEDING,
    **{
        f"{name} for {bits}{'' if down else ', no LoRA'}": partial(in_8_bits, make, dtype, down, False)
        for name, make in FEEDING.items()
        for bits, dtype in EIGHT_BITS.items()
        for down in (True, False)
        if down or (bits == "int8" and make in (modulate, gelu_tanh))
    },
    **{
        f"{name} for int8, rotated": partial(in_8_bits, make, torch.int8, False, True) for name, make in FEEDING.items()
    },
    "rotate": rotate,
    "modulate_backward": modulate_backward,
    "modulate_backward, with sums": partial(modulate_backward, sums=True),
    "gated_add": gated_add,
    "gated_add_backward": gated_add_backward,
    "gated_add_backward, with sums": partial(gated_add_backward, sums=True),
    "gated_add_modulate_backward": gated_add_modulate_backward,
    "qk_norm_rope, one stream": qk_norm_rope,
    "qk_norm_rope, two streams": partial(qk_norm_rope, streams=2),
    "qk_norm_rope_backward, one stream": qk_norm_rope_backward,
    "qk_norm_rope_backward, two streams": partial(qk_norm_rope_backward, streams=2),
    "gelu_tanh_backward": gelu_tanh_backward,
}
"""By name, what stands between the products of a block."""


def decode(s: Sizes, n: int, k: int, format: str, transposed: bool = False, wide: bool = False) -> Step:
    """A weight (N, K) to bf16; `wide`: into a scratch that has LoRA's columns too."""
    weight, out = _stored(s, n, k, format), s.randn(n, k + 32)[:, :k] if wide else None
    call = lambda o, _, i: o.dequantize(i["weight"], torch.bfloat16, out, transposed)  # noqa: E731
    return Step("dequantize" + "_transposed" * transposed, {"weight": weight}, call)


def to_rows(s: Sizes, n: int, k: int, format: str, bits: str, transposed: bool = False, rotated: bool = False) -> Step:
    """A weight to 8-bit rows. The scales of a weight that has such rows already are handed on, neither read nor
    written.
    """
    weight, extra = _stored(s, n, k, format), 8 * n if format == bits else 0
    rotation = rotation_block(k) if rotated else 0
    call = lambda o, _, i: o.to_rows(i["weight"], EIGHT_BITS[bits], transposed, rotation)  # noqa: E731
    op = "dequantize_transposed" + "_rotated" * rotated if transposed else "row_quantize"
    return Step(op, {"weight": weight}, call, rotation=rotation, extra=extra)


def to_nf4(s: Sizes, n: int, k: int) -> Step:
    return Step("nf4_quantize", {"w": s.randn(n, k, std=k**-0.5)}, lambda o, _, i: o.nf4_quantize(i["w"]))


def row_quantize(s: Sizes, n: int, k: int, bits: str, rotated: bool = False) -> Step:
    given, rotation = {"x": s.randn(n, k)}, rotation_block(k) if rotated else 0
    call = lambda o, _, i: o.row_quantize(i["x"], EIGHT_BITS[bits], rotation=rotation)  # noqa: E731
    return Step("row_quantize", given, call, rotation=rotation)


STORAGE: dict[str, Callable[[Sizes, int, int], Step]] = {
    **{
        f"bf16 -> {bits}{', rotated' * rotated}": partial(row_quantize, bits=bits, rotated=rotated)
        for bits in EIGHT_BITS
        for rotated in (False, True)
    },
    **{f"{format} -> bf16": partial(decode, format=format) for format in ("nf4", "int8", "fp8")},
    "nf4 -> bf16 into a wider scratch": partial(decode, format="nf4", wide=True),
    "nf4 -> bf16, transposed": partial(decode, format="nf4", transposed=True),
    **{
        f"{format} -> {bits}{', transposed' * transposed}{', rotated' * rotated}": partial(
            to_rows, format=format, bits=bits, transposed=transposed, rotated=rotated
        )
        for format in ("nf4", "int8", "fp8")
        for bits in EIGHT_BITS
        for transposed in (False, True)
        for rotated in (False, True)
        if (format == "nf4" or (format == bits and not rotated)) and (transposed or format != bits)
    },
    "bf16 -> nf4": to_nf4,
}
"""By name, a stored weight (N, K) made from another form of it."""


def tensors(outputs: Any) -> list[Tensor]:
    """Every tensor in an op's inputs or outputs, which may be nested, or None here and there."""
    if isinstance(outputs, Tensor):
        return [outputs]
    if isinstance(outputs, NF4Weight | RowScaled):
        return [getattr(outputs, field.name) for field in fields(outputs)]
    return [t for part in outputs if part is not None for t in tensors(part)]


def nbytes(parts: Sequence[Tensor]) -> int:
    """Bytes that reading or writing each of `parts` once moves; what is expanded has none of its own."""
    return sum(t.numel() * t.element_size() for t in parts if t.numel() and 0 not in t.stride())


def _rows(s: Sizes, *names: str) -> dict[str, Tensor]:
    return {name: s.randn(1, s.tokens, s.width) for name in names}


def _vectors(s: Sizes, *names: str) -> dict[str, Tensor]:
    return {name: s.randn(1, 1, s.width) for name in names}


def _lengths(s: Sizes, streams: int) -> list[int]:
    return [s.tokens] if streams == 1 else [s.text, s.tokens - s.text]


def _stored(s: Sizes, n: int, k: int, format: str) -> Any:
    return quantize(s.randn(n, k, std=k**-0.5), format)
