"""The memory-bound steps of a block at FLUX's widths: rows of 3,072, 24 heads of 128, an MLP of 12,288."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from benchmarks.aot import Case

# by their full names: the package gives the public functions the names of their modules
gelu, modulate, qk_norm_rope = (
    import_module(f"fluxq.kernels.triton.{m}") for m in ("gelu", "modulate", "qk_norm_rope")
)

POINTERS = {"values_ptr": "*u8", "row_scale_ptr": "*fp32", "s_ptr": "*fp32", "sums_ptr": "*fp32", "rstd_ptr": "*fp32"}
POINTERS |= {"cos_ptr": "*fp32", "sin_ptr": "*fp32"}
RUNTIME = {"L", "R", "start", "length"}  # the other numbers are strides, and those of FLUX's rows multiples of 16


def case(name: str, kernel: Any, constants: Mapping[str, Any], warps: int, absent: Sequence[str] = ()) -> Case:
    """A case in bf16, without the pointers in `absent`."""
    constants = dict(constants) | {f"{n}_ptr": None for n in absent}
    names = [n for n in kernel.arg_names if n not in constants]
    types = {n: POINTERS.get(n, "*bf16") if n.endswith("_ptr") else "i32" for n in names}
    aligned = tuple(n for n in names if types[n] == "i32" and n not in RUNTIME)
    return Case(name, kernel, types, constants, warps, aligned=aligned, vector=True)


def modulates() -> list[Case]:
    found = []
    for gated, absent in (("", ("gate", "add", "sum")), ("gated_add_", ())):
        for form in ("", "_int8", "_fp8"):
            for down, block_r in (("", 16), ("_down_r16", 16), ("_down", 64)):
                if down and not form:
                    continue
                rows, step, warps = modulate._TILES["down" if down else "8 bits" if form else "plain"]
                constants = dict(D=3072, BLOCK=4096, ROWS=rows, STEP=step, INT8=form == "_int8")
                constants |= dict(BLOCK_R=block_r, BLOCK_K=128, PRECISION="ieee")
                left_out = (*absent, *(() if form else ("values", "row_scale")), *(() if down else ("down", "s")))
                name = f"{gated}modulate{form}{down}"
                found.append(case(name, modulate._modulate, constants, warps, left_out))
    return found


def modulate_backwards() -> list[Case]:
    frozen, gate = ("add", "sums"), ("gate", "d_add", "dx")
    shapes = {
        "modulate_backward": (frozen + gate, "backward", False),
        "modulate_backward_rows": (("add", *gate), "sums", True),
        "gated_add_modulate_backward": (frozen, "backward", False),
        "gated_add_modulate_backward_rows": ((), "sums", True),
    }
    found = []
    for name, (absent, kind, shift) in shapes.items():
        rows, step, warps = modulate._TILES[kind]
        constants = dict(D=3072, BLOCK=4096, ROWS=rows, STEP=step, SHIFT=shift)
        found.append(case(name, modulate._modulate_backward, constants, warps, absent))
    return found


def gated_adds() -> list[Case]:
    rows, step, warps = modulate._TILES["gated_add"]
    constants = dict(D=3072, BLOCK=1024, ROWS=rows)
    found = [case("gated_add", modulate._gated_add, constants, warps)]
    backward = modulate._gated_add_backward
    found.append(case("gated_add_backward", backward, constants | dict(STEP=step), warps, ("y", "sums")))
    rows, step, warps = modulate._TILES["gated_sums"]
    found.append(case("gated_add_backward_rows", backward, constants | dict(ROWS=rows, STEP=step), warps))
    return found


def qk_norm_ropes() -> list[Case]:
    forward, backward, warps = qk_norm_rope._forward, qk_norm_rope._backward, qk_norm_rope._WARPS
    heads = dict(H=24, W=128, HEADS=32)
    return [
        case("qk_norm_rope", forward, heads, warps["forward"]),
        case("qk_norm_rope_backward", backward, heads, warps["backward"], ("qkv",)),
        case("qk_norm_rope_backward_inputs", backward, heads, warps["backward"]),
    ]


def gelus() -> list[Case]:
    rows, warps = gelu._TILES["plain"]
    tile = dict(W=12288, BLOCK=1024, ROWS=rows)
    found = [
        case("gelu_tanh", gelu._gelu, tile | dict(D=0), warps, ("beside",)),
        case("gelu_tanh_beside", gelu._gelu, tile | dict(D=3072), warps),
    ]
    rows, warps = gelu._TILES["backward"]
    found.append(case("gelu_tanh_backward", gelu._gelu_backward, tile | dict(ROWS=rows), warps))
    for form in ("_int8", "_fp8"):
        for beside, width in (("", 0), ("_beside", 3072)):
            for down, block_r in (("", 16), ("_down_r16", 16), ("_down", 64)):
                rows, warps = gelu._TILES["down" if down else "8 bits"]
                constants = dict(W=12288, D=width, BLOCK_W=16384, BLOCK_D=4096 if width else 16, ROWS=rows)
                constants |= dict(INT8=form == "_int8", BLOCK_R=block_r, BLOCK_K=128, PRECISION="ieee")
                left_out = (*(() if down else ("down", "s")), *(() if beside else ("beside",)))
                name = f"gelu_tanh{beside}{form}{down}"
                found.append(case(name, gelu._gelu_8_bits, constants, warps, left_out))
    return found


CASES = [*modulates(), *modulate_backwards(), *gated_adds(), *qk_norm_ropes(), *gelus()]
