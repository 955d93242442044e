"""The memory-bound steps of a block at FLUX's widths: rows of 3,072, 24 heads of 128, an MLP of 12,288."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from benchmarks.aot import CAPABILITIES, Case, Product
from fluxq.kernels.triton import eight_bits
from fluxq.kernels.triton.table import SHIPPED

# by their full names: the package gives the public functions the names of their modules
gelu, modulate, qk_norm_rope = (
    import_module(f"fluxq.kernels.triton.{m}") for m in ("gelu", "modulate", "qk_norm_rope")
)

POINTERS = {"values_ptr": "*u8", "row_scale_ptr": "*fp32", "s_ptr": "*fp32", "sums_ptr": "*fp32", "rstd_ptr": "*fp32"}
POINTERS |= {"cos_ptr": "*fp32", "sin_ptr": "*fp32"}
RUNTIME = {"L", "R", "start", "length"}  # the other numbers are strides, and those of FLUX's rows multiples of 16
ROW, INNER = dict(D=3072, BLOCK=4096), dict(W=12288)


def case(name: str, kernel: Any, op: str, gpu: int, constants: Mapping[str, Any], absent: Sequence[str] = ()) -> Case:
    """A case in bf16 at the tile of `op` on that GPU, without the pointers in `absent`."""
    tile = SHIPPED[op, gpu, "large"]
    sizes = {"ROWS": tile.block_m, "STEP": tile.step, "BLOCK": tile.block_n, "BLOCK_K": tile.block_k}
    given = {n: size for n, size in sizes.items() if n in kernel.arg_names}
    constants = given | dict(constants) | {f"{n}_ptr": None for n in absent}
    names = [n for n in kernel.arg_names if n not in constants]
    types = {n: POINTERS.get(n, "*bf16") if n.endswith("_ptr") else "i32" for n in names}
    aligned = tuple(n for n in names if types[n] == "i32" and n not in RUNTIME)
    dots = (Product(tile.block_m, constants["BLOCK_R"], tile.block_k, "bf16"),) if "down_ptr" in names else ()
    return Case(
        name,
        kernel,
        types,
        constants,
        tile.warps,
        tile.stages,
        eight_bits.registers(tile.warps) if "INT8" in kernel.arg_names else None,
        aligned,
        (gpu,),
        dots,
        narrow=("row_scale_ptr", "rstd_ptr", "s_ptr"),  # one number of a row, of a head, R of a row for any R
    )


def modulates(gpu: int) -> list[Case]:
    found = []
    for gated, absent in (("", ("gate", "add", "sum")), ("gated_add_", ())):
        for form in ("", "_int8", "_fp8", "_int8_rotated"):
            for down, block_r in (("", 16), ("_down_r16", 16), ("_down", 64)):
                if down and form not in ("_int8", "_fp8"):
                    continue
                op = "modulate" + ("_8bit" if form else "") + ("_down" if down else "")
                constants = ROW | dict(INT8="_int8" in form, ROTATION=256 if "rotated" in form else 0)
                constants |= dict(BLOCK_R=block_r, PRECISION="ieee")
                left_out = (*absent, *(() if form else ("values", "row_scale")), *(() if down else ("down", "s")))
                name = f"{gated}modulate{form}{down}"
                found.append(case(name, modulate._modulate, op, gpu, constants, left_out))
    return found


def modulate_backwards(gpu: int) -> list[Case]:
    frozen, gate = ("add", "sums"), ("gate", "d_add", "dx")
    shapes = {
        "modulate_backward": (frozen + gate, "", False),
        "modulate_backward_rows": (("add", *gate), "_sums", True),
        "gated_add_modulate_backward": (frozen, "", False),
        "gated_add_modulate_backward_rows": ((), "_sums", True),
    }
    kernel = modulate._modulate_backward
    return [
        case(name, kernel, f"modulate_backward{kind}", gpu, ROW | dict(SHIFT=shift), absent)
        for name, (absent, kind, shift) in shapes.items()
    ]


def gated_adds(gpu: int) -> list[Case]:
    width, backward = dict(D=3072), modulate._gated_add_backward
    return [
        case("gated_add", modulate._gated_add, "gated_add", gpu, width),
        case("gated_add_backward", backward, "gated_add_backward", gpu, width, ("y", "sums")),
        case("gated_add_backward_rows", backward, "gated_add_backward_sums", gpu, width),
    ]


def qk_norm_ropes(gpu: int) -> list[Case]:
    forward, backward, heads = qk_norm_rope._forward, qk_norm_rope._backward, dict(H=24, W=128, HEADS=32)
    return [
        case("qk_norm_rope", forward, "qk_norm_rope", gpu, heads),
        case("qk_norm_rope_backward", backward, "qk_norm_rope_backward", gpu, heads, ("qkv",)),
        case("qk_norm_rope_backward_inputs", backward, "qk_norm_rope_backward", gpu, heads),
    ]


def gelus(gpu: int) -> list[Case]:
    found = [
        case("gelu_tanh", gelu._gelu, "gelu_tanh", gpu, INNER | dict(D=0), ("beside",)),
        case("gelu_tanh_beside", gelu._gelu, "gelu_tanh", gpu, INNER | dict(D=3072)),
        case("gelu_tanh_backward", gelu._gelu_backward, "gelu_tanh_backward", gpu, INNER),
    ]
    for form in ("_int8", "_fp8", "_int8_rotated"):
        for beside, width in (("", 0), ("_beside", 3072)):
            for down, block_r in (("", 16), ("_down_r16", 16), ("_down", 64)):
                if down and "rotated" in form:
                    continue
                constants = INNER | dict(D=width, BLOCK=16384)
                constants |= dict(INT8="_int8" in form, ROTATION=256 if "rotated" in form else 0)
                constants |= dict(BLOCK_R=block_r, PRECISION="ieee")
                left_out = (*(() if down else ("down", "s")), *(() if beside else ("beside",)))
                name, op = f"gelu_tanh{beside}{form}{down}", "gelu_tanh_8bit" + ("_down" if down else "")
                found.append(case(name, gelu._gelu_8_bits, op, gpu, constants, left_out))
    return found


TOPICS = (modulates, modulate_backwards, gated_adds, qk_norm_ropes, gelus)
CASES = [case for topic in TOPICS for gpu in CAPABILITIES for case in topic(gpu)]
