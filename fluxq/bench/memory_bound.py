"""The memory-bound ops at any size: the steps between a block's products, and weights changing their form.

A `Step` is an op with its inputs. From these follow its outputs on any backend, the exact outputs, and the bytes that
it must move. Operands are created with the step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fluxq.kernels import Activations, NF4Weight, RowScaled, Wants, backend, quantize, reference
from fluxq.kernels.rotation import rotate as rotate_by
from fluxq.kernels.rotation import rotation_block

EIGHT_BITS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True)
class Sizes:
    """By default FLUX.1's at 768 x 768 pixels. tokens: text and image together."""

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
    """A memory-bound op on fixed inputs: `call(ops, wants, inputs)` gives its outputs.

    width: of its Activations, without padding; 0 if it feeds no linear layer. rank: of that layer's LoRA. dtype: of
    the 8-bit rows that the layer takes, None for a layer in bf16; inputs["down"]: the LoRA whose product is wanted
    next to such rows. rotation: the block in which 8-bit rows are rotated, 0 for none. extra: bytes of outputs that
    are not written. stores: whether it converts a matrix, which is its first input, from one form to another.
    """

    op: str
    inputs: Mapping[str, Any]
    call: Callable[[ModuleType, Wants, Mapping[str, Any]], Any]
    width: int = 0
    rank: int = 0
    dtype: torch.dtype | None = None
    rotation: int = 0
    extra: int = 0
    stores: bool = False

    def run(self, on: ModuleType) -> Any:
        padding = on.padding(self.rank) if self.width and self.dtype is None else 0
        return self.call(on, Wants(padding, self.dtype, self.inputs.get("down"), self.rotation), self.inputs)

    def moved(self, outputs: Any) -> int:
        """Bytes: every input read once, every output without its padding written once."""
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
        s.rank,
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
        s.rank,
    )


def gated_add_modulate_backward(s: Sizes, sums: bool = False) -> Step:
    def call(o: ModuleType, _: Wants, i: Mapping[str, Any]) -> Any:
        return o.gated_add_modulate_backward(i["dx"], i["dy"], i["x"], i["gate"], i.get("y"), i["scale"], sums)

    given = _rows(s, "dx", "dy", "x", *["y"] * sums) | _vectors(s, "gate", "scale")
    return Step("modulate_backward" + "_sums" * sums, given, call)


def qk_norm_rope(s: Sizes, streams: int = 1) -> Step:
    """For one stream, or for text and image."""
    head = s.width // s.heads
    angles = torch.rand(1, 1, s.tokens, head // 2, device=s.device) * 6
    given = {f"qkv{n}": s.randn(1, length, 3 * s.width) for n, length in enumerate(_lengths(s, streams))}
    given |= {f"{x}_scale{n}": 1 + s.randn(head, std=0.1) for n in range(streams) for x in "qk"}
    given |= {"cos": angles.cos(), "sin": angles.sin()}

    def call(o: ModuleType, _: Wants, i: Mapping[str, Any]) -> Any:
        joined = [(i[f"qkv{n}"], i[f"q_scale{n}"], i[f"k_scale{n}"]) for n in range(streams)]
        return o.qk_norm_rope(joined, i["cos"], i["sin"])

    return Step("qk_norm_rope", given, call)


def qk_norm_rope_backward(s: Sizes, streams: int = 1, from_qkv: bool = False) -> Step:
    made = qk_norm_rope(s, streams)
    q, k, _, rstd = made.run(reference)
    given = {f"d{n}": s.randn(*q.transpose(1, 2).shape).transpose(1, 2) for n in "qkv"} | dict(q=q, k=k, rstd=rstd)
    given |= {name: t for name, t in made.inputs.items() if from_qkv or not name.startswith("qkv")}

    def call(o: ModuleType, _: Wants, i: Mapping[str, Any]) -> Any:
        scales = [(i[f"q_scale{n}"], i[f"k_scale{n}"]) for n in range(streams)]
        tensors = (i[n] for n in ("dq", "dk", "dv", "q", "k", "rstd"))
        qkv = [i[f"qkv{n}"] for n in range(streams)] if from_qkv else None
        return o.qk_norm_rope_backward(*tensors, scales, _lengths(s, streams), i["cos"], i["sin"], qkv)

    return Step("qk_norm_rope_backward", given, call)


def gelu_tanh(s: Sizes, prepend: bool = False) -> Step:
    given = {"h": s.randn(1, s.tokens, 4 * s.width)} | (_rows(s, "prepend") if prepend else {})
    call = lambda o, wants, i: o.gelu_tanh(i["h"], i.get("prepend"), wants)  # noqa: E731
    return Step("gelu_tanh", given, call, (4 + prepend) * s.width, s.rank)


def gelu_tanh_backward(s: Sizes) -> Step:
    given = {name: s.randn(1, s.tokens, 4 * s.width) for name in ("dy", "h")}
    return Step("gelu_tanh_backward", given, lambda o, _, i: o.gelu_tanh_backward(i["dy"], i["h"]))


def rotate(s: Sizes, dtype: torch.dtype = torch.bfloat16) -> Step:
    given = {"x": s.randn(1, s.tokens, s.width).to(dtype)}
    return Step("rotate", given, lambda o, _, i: o.rotate(i["x"], rotation_block(s.width)))


def drop(s: Sizes, adds: bool = False) -> Step:
    """adds: to another tensor, which `call` copies first."""
    key = torch.tensor([0x123456789ABCDEF0], device=s.device)
    call = lambda o, _, i: o.drop(i["x"], 0.3, key, i["onto"].clone() if adds else None)  # noqa: E731
    return Step("drop", _rows(s, "x", *["onto"] * adds), call)


def in_8_bits(make: Callable[[Sizes], Step], dtype: torch.dtype, down: bool, rotated: bool, s: Sizes) -> Step:
    """That step, feeding a layer that multiplies in 8 bits."""
    step = make(s)
    rotation = rotation_block(step.width) if rotated else 0
    given = {"down": s.randn(s.rank, step.width, std=step.width**-0.5)} if down else {}
    op, given = step.op + "_8bit" + "_down" * down, {**step.inputs, **given}
    return replace(step, op=op, inputs=given, dtype=dtype, rotation=rotation)


FEEDING: dict[str, Callable[[Sizes], Step]] = {
    "modulate": modulate,
    "gated_add_modulate": gated_add_modulate,
    "gelu_tanh": gelu_tanh,
    "gelu_tanh, attention beside": partial(gelu_tanh, prepend=True),
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
    "gated_add_modulate_backward, with sums": partial(gated_add_modulate_backward, sums=True),
    "qk_norm_rope, one stream": qk_norm_rope,
    "qk_norm_rope, two streams": partial(qk_norm_rope, streams=2),
    "qk_norm_rope_backward, one stream": qk_norm_rope_backward,
    "qk_norm_rope_backward, two streams": partial(qk_norm_rope_backward, streams=2),
    "qk_norm_rope_backward, from qkv": partial(qk_norm_rope_backward, from_qkv=True),
    "gelu_tanh_backward": gelu_tanh_backward,
}
"""By name, the steps between the products of a block."""


def decode(s: Sizes, n: int, k: int, format: str, transposed: bool = False, wide: bool = False) -> Step:
    """A weight (N, K) to bf16. wide: into a scratch that also has LoRA's columns."""
    weight, out = _stored(s, n, k, format), s.randn(n, k + 32)[:, :k] if wide else None
    call = lambda o, _, i: o.dequantize(i["weight"], torch.bfloat16, out, transposed)  # noqa: E731
    return Step("dequantize" + "_transposed" * transposed, {"weight": weight}, call, stores=True)


def to_rows(s: Sizes, n: int, k: int, format: str, bits: str, transposed: bool = False, rotated: bool = False) -> Step:
    """A weight to 8-bit rows. If it has such rows already, its scales are passed on, neither read nor written."""
    weight, extra = _stored(s, n, k, format), 8 * n if format == bits else 0
    rotation = rotation_block(k) if rotated else 0
    call = lambda o, _, i: o.to_rows(i["weight"], EIGHT_BITS[bits], transposed, rotation)  # noqa: E731
    op = "dequantize_transposed" + "_rotated" * rotated if transposed else "row_quantize"
    return Step(op, {"weight": weight}, call, rotation=rotation, extra=extra, stores=True)


def to_nf4(s: Sizes, n: int, k: int, dtype: torch.dtype = torch.bfloat16) -> Step:
    given = {"w": s.randn(n, k, std=k**-0.5).to(dtype)}
    return Step("nf4_quantize", given, lambda o, _, i: o.nf4_quantize(i["w"]), stores=True)


def row_quantize(
    s: Sizes, n: int, k: int, bits: str, rotated: bool = False, columns: bool = False, fp32: bool = False
) -> Step:
    """columns: multiply the columns first, as those of a gradient are by the scales of the weight's rows."""
    rotation = rotation_block(k) if rotated else 0
    given = {"x": s.randn(n, k).float() if fp32 else s.randn(n, k)} | (
        {"columns": torch.rand(k, device=s.device) + 0.5} if columns else {}
    )
    call = lambda o, _, i: o.row_quantize(i["x"], EIGHT_BITS[bits], i.get("columns"), rotation)  # noqa: E731
    return Step("row_quantize", given, call, rotation=rotation, stores=True)


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
"""By name, a weight (N, K) converted from one stored form to another."""

ROWS: dict[str, Callable[[Sizes], Step]] = {
    f"{bits} rows of {times} D{way}": (
        lambda s, times=times, bits=bits, given=given: row_quantize(s, s.tokens, times * s.width, bits, **given)
    )
    for times in (1, 4, 5, 7)
    for bits in EIGHT_BITS
    for way, given in (("", {}), (", a gradient's", dict(columns=True)), (", rotated", dict(rotated=True)))
    if bits == "int8" or not given.get("rotated")  # training rotates no fp8
}
"""By name, rows in 8 bits: inputs of layers and gradients of their outputs, in multiples of the width D."""
RARE_STEPS: dict[str, Callable[[Sizes], Step]] = {
    **{
        f"{name} for {bits}, no LoRA": partial(in_8_bits, make, dtype, False, False)
        for name, make in FEEDING.items()
        for bits, dtype in EIGHT_BITS.items()
        if f"{name} for {bits}, no LoRA" not in STEPS
    },
    **{
        f"{name} for {bits}, rank 64": lambda s, make=make, dtype=dtype: in_8_bits(
            make, dtype, True, False, replace(s, rank=64)
        )
        for name, make in FEEDING.items()
        for bits, dtype in EIGHT_BITS.items()
    },
    "int8 rows of 13 D in fp32, in pieces": lambda s: row_quantize(s, s.tokens, 13 * s.width, "int8", fp32=True),
    "rotate, fp32": partial(rotate, dtype=torch.float32),
    "drop": drop,
    "drop, added": partial(drop, adds=True),
}
RARE_STORAGE: dict[str, Callable[[Sizes, int, int], Step]] = {
    **{f"{format} -> bf16, transposed": partial(decode, format=format, transposed=True) for format in EIGHT_BITS},
    **{
        f"{format} -> {bits}{way}": partial(to_rows, format=format, bits=bits, **given)
        for format in ("bf16", *EIGHT_BITS)
        for bits in EIGHT_BITS
        for way, given in (
            ("", {}),
            (", transposed", dict(transposed=True)),
            (", transposed, rotated", dict(transposed=True, rotated=True)),
        )
        if (given or format != "bf16") and (bits == "int8" or "rotated" not in given)
        if f"{format} -> {bits}{way}" not in STORAGE and (format != bits or given)
    },
    "fp8 -> fp8, rotated": partial(to_rows, format="fp8", bits="fp8", rotated=True),
    "int8 -> int8, rotated by 64": lambda s, n, k: to_rows(s, n, k - 64, "int8", "int8", rotated=True),
    "fp32 -> nf4": partial(to_nf4, dtype=torch.float32),
}
"""What training seldom does, or only with other settings: compiled and checked, but not timed."""


def numbers(step: Step, outputs: Any) -> list[Tensor]:
    """Outputs of `step` as tensors of numbers: padding cut off, 8-bit rows times their scales, NF4 decoded."""
    if step.op == "nf4_quantize":
        return [_matrix(NF4Weight(*outputs))]
    return _comparable(outputs, step.width or None)


def numbers_exactly(step: Step) -> list[Tensor]:
    """What `numbers` should give, in fp64: the op by the reference, or the matrix before it was converted."""
    if not step.stores:
        double = {name: t.double() for name, t in step.inputs.items()}
        outputs = step.call(reference, Wants(), double)
        return _comparable(_with_rows(outputs, step, double.get("down")), step.width or None)
    matrix = _matrix(next(iter(step.inputs.values())))
    matrix = matrix * step.inputs["columns"].double() if "columns" in step.inputs else matrix
    matrix = rotate_by(matrix, step.rotation) if step.rotation else matrix
    return [matrix.t() if "transposed" in step.op else matrix]


def _with_rows(outputs: Any, step: Step, down: Tensor | None) -> Any:
    """Exact outputs with what stands for 8-bit rows: the rows unrounded, rotated if `step` rotates; and their product
    with `down`.
    """
    if step.dtype is None or isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, Activations):
        rows = outputs.x.flatten(0, -2)
        s = None if down is None else rows @ down.t()
        rows = rotate_by(rows, step.rotation) if step.rotation else rows
        return Activations(outputs.x, rows, rows.new_ones(len(rows)), s)
    return tuple(_with_rows(part, step, down) for part in outputs)


def _comparable(outputs: Any, width: int | None = None) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs]
    if isinstance(outputs, Activations):
        rows = [] if outputs.values is None else [_scaled(outputs.values, outputs.scale)]
        return [outputs.x[..., :width], *rows, *([] if outputs.s is None else [outputs.s])]
    if len(outputs) == 2 and isinstance(outputs[0], Tensor) and outputs[0].dtype in EIGHT_BITS.values():
        return [_scaled(*outputs)]
    return [t for part in outputs if part is not None for t in _comparable(part, width)]


def _scaled(values: Tensor, scale: Tensor | None) -> Tensor:
    """8-bit rows times their scales; or columns, of a matrix that was transposed after it was quantized."""
    assert scale is not None
    return values.double() * (scale.double()[:, None] if len(values) == len(scale) else scale.double())


def _matrix(weight: Any) -> Tensor:
    """A stored matrix in fp64: NF4's levels times their scales are exact there."""
    if isinstance(weight, Tensor):
        return weight.double()
    if isinstance(weight, RowScaled):
        return weight.values.double() * weight.scale.double()[:, None]
    levels = torch.tensor(reference.NF4_LEVELS, dtype=torch.float32, device=weight.codes.device).double()
    codes = torch.stack([weight.codes >> 4, weight.codes & 15], -1).flatten(1).long()
    return (levels[codes].view(-1, 64) * weight.absmax.double().view(-1, 1)).view(codes.shape)


def has_fp8(device: torch.device) -> bool:
    """Whether the GPU multiplies fp8; a CPU's reference does."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


def tensors(outputs: Any) -> list[Tensor]:
    """Every tensor in an op's inputs or outputs, which may be nested and contain None."""
    if isinstance(outputs, Tensor):
        return [outputs]
    if isinstance(outputs, NF4Weight | RowScaled):
        return [getattr(outputs, field.name) for field in fields(outputs)]
    return [t for part in outputs if part is not None for t in tensors(part)]


def nbytes(parts: Sequence[Tensor]) -> int:
    """Bytes of reading or writing each of `parts` once; expanded tensors have none of their own."""
    return sum(t.numel() * t.element_size() for t in parts if t.numel() and 0 not in t.stride())


def _rows(s: Sizes, *names: str) -> dict[str, Tensor]:
    return {name: s.randn(1, s.tokens, s.width) for name in names}


def _vectors(s: Sizes, *names: str) -> dict[str, Tensor]:
    return {name: s.randn(1, 1, s.width) for name in names}


def _lengths(s: Sizes, streams: int) -> list[int]:
    return [s.tokens] if streams == 1 else [s.text, s.tokens - s.text]


def _stored(s: Sizes, n: int, k: int, format: str) -> Any:
    with backend("reference"):  # what is measured has no part in making its operands
        return quantize(s.randn(n, k, std=k**-0.5), format)
