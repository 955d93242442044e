"""What each kernel promises of its compilation, and what a launch of it is called."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.launches import Launch

DTYPES = {"*bf16": "bf16", "*fp32": "fp32", "*fp16": "fp16"}
FEW = ("scale_ptr", "scales_ptr", "divisor_ptr", "columns_ptr", "absmax_ptr", "levels_ptr", "midpoints_ptr")
"""One number of a row, of a column or of a block of 64; and NF4's tables of 16."""


L2_TB_S = {80: ("a100", 5.0), 86: ("rtx3060", 1.0), 89: ("rtx4090", 5.0), 90: ("h100", 6.0), 120: ("rtx5090", 6.3)}
"""Generation -> a GPU and the TB/s that its L2 gives. Assumptions, none measured; an RTX 5090's is that of an RTX 4090,
times multiprocessors and clock."""


@dataclass(frozen=True)
class Product:
    """One `tl.dot` of a (m, k) by a (k, n) tile, of numbers of `kind`: "bf16", "int8", "fp8" or "fp8 scaled"."""

    m: int
    n: int
    k: int
    kind: str


@dataclass(frozen=True)
class Promise:
    """dots: the products in the code, each as often as it is written; the assembler may unroll the loop around a single
    one.

    narrow: if the kernel is memory-bound, the pointers through which it may move fewer than 128 bits at a time, since
    they hold a few numbers of each row or block; None if it is not. permutes: the most byte permutes (PRMT) allowed.
    """

    dots: tuple[Product, ...] = ()
    narrow: tuple[str, ...] | None = None
    permutes: int | None = None


def promise(launch: Launch) -> Promise:
    """No kernel spills, or takes more shared memory than its GPU has; this is what it promises beyond that."""
    c = launch.constants
    match launch.name:
        case "extension._fill_padding":
            return Promise(narrow=() if c["EIGHTS"] else ("s_ptr",))  # rows of other ranks begin anywhere
        case "dropout._drop":
            return Promise(narrow=("key_ptr",))
        case "few_rows._shares":
            # Numbers of 8 bits go 64 bits at a time to where tensor cores read them across rows.
            narrow = FEW if c["FORM"] in ("nf4", "float") else (*FEW, "w_ptr")
            return Promise((Product(c["BLOCK_M"], c["BLOCK_N"], c["BLOCK_K"], "bf16"),), narrow, 64)
        case "few_rows._sum_shares":
            return Promise((Product(c["ROWS"], c["COLUMNS"], 16, "bf16"),), ("ds_ptr",))  # R of a row, for any R
        case "matmul._linear":
            m, n = c["BLOCK_M"], c["BLOCK_N"]
            narrow = (*FEW, "bias_ptr", "s_ptr", "up_ptr") if m == 16 else None
            return Promise((Product(m, n, c["BLOCK_K"], "bf16"), Product(m, n, 16, "bf16")), narrow, 128)
        case "matmul_8bit._matmul_8bit":
            kind = "fp8 scaled" if c["SCALED"] else eight_bits(launch)
            m, n = c["BLOCK_M"], c["BLOCK_N"]
            return Promise((Product(m, n, c["BLOCK_K"], kind), Product(m, n, 16, "bf16")), None, 64)
        case "convert._convert":
            # of up R numbers of a row, for any R; permutes: three for each of 32 numbers, and some to rotate
            return Promise(narrow=(*FEW, "up_ptr", "bias_ptr"), permutes=112)
        case "rows._rows":
            return Promise(narrow=FEW, permutes=112 if c["ROTATION"] else 64)  # two for each number, rotated three
        case "nf4._quantize" | "rotation._rotate":
            return Promise(narrow=FEW)
        case "modulate._modulate" | "gelu._gelu_8_bits" if given(launch, "down"):
            dots = (Product(c["ROWS"], c["BLOCK_R"], c["BLOCK_K"], "bf16"),)
            return Promise(dots, ("row_scale_ptr", "s_ptr"))  # one number of a row, and R of a row, for any R
        case _:
            return Promise(narrow=("row_scale_ptr", "rstd_ptr"))


def l2_bytes(block_m: int, block_n: int) -> float:
    """Bytes that a product in 8 bits reads from L2 for each operation (two for each pair of numbers), by its tile."""
    return (block_m + block_n) / (2 * block_m * block_n)


def label(launch: Launch) -> str:
    """What the page of `make aot` calls it."""
    c, function = launch.constants, launch.kernel.__name__.removeprefix("_")
    match launch.name:
        case "extension._fill_padding":
            return function + "_any_rank" * (not c["EIGHTS"])
        case "few_rows._shares":
            return f"few_rows_backward_{c['FORM'].replace('float', 'bf16')}_{c['BLOCK_M']}"
        case "matmul._linear":
            return f"linear_{c['FORM']}_{'few' if c['BLOCK_M'] == 16 else 'large'}"
        case "matmul_8bit._matmul_8bit":
            return f"matmul_{eight_bits(launch)}{'_scaled' * c['SCALED']}{'_dx' * (not given(launch, 'b_scale'))}"
        case "modulate._modulate":
            return "gated_add_" * given(launch, "gate") + function + written(launch)
        case "modulate._modulate_backward":
            return "gated_add_" * given(launch, "gate") + function + "_rows" * c["SHIFT"]
        case "modulate._gated_add_backward":
            return function + "_rows" * given(launch, "y")
        case "qk_norm_rope._forward":
            return "qk_norm_rope"
        case "qk_norm_rope._backward":
            return "qk_norm_rope_backward" + "_inputs" * given(launch, "qkv")
        case "gelu._gelu" | "gelu._gelu_8_bits":
            return "gelu_tanh" + "_prepend" * given(launch, "prepend") + written(launch)
        case "gelu._gelu_backward":
            return "gelu_tanh_backward"
        case "convert._convert":
            to = c["TO"] if c["TO"] != "float" else DTYPES[launch.signature["out_ptr"]]
            way = " transposed" * c["TRANSPOSED"] + " rotated" * bool(c["ROTATION"])
            return f"{stored(launch)} to {to}{way}"
        case "rows._rows":
            way = "to" if given(launch, "out") else "scales for"
            more = " times columns" * given(launch, "columns")
            more += f" rotated by {c['ROTATION']}" if c["ROTATION"] else ""
            width = f"up to {c['COLUMNS']}" if c["ONCE"] else "any width"
            return f"rows of {width} {stored(launch)} {way} {c['TO']}{more}"
        case "nf4._quantize":
            return f"{DTYPES[launch.signature['w_ptr']]} to nf4"
        case "rotation._rotate":
            return f"rotate {DTYPES[launch.signature['x_ptr']]}"
        case _:
            return function


def given(launch: Launch, pointer: str) -> bool:
    """Whether the kernel has that pointer in this launch, and it is not None."""
    name = f"{pointer}_ptr"
    return name in launch.signature and launch.constants.get(name, name) is not None


def eight_bits(launch: Launch) -> str:
    return "int8" if launch.signature["a_ptr"] == "*i8" else "fp8"


def stored(launch: Launch) -> str:
    """The form of the matrix that is read."""
    form = launch.constants["FROM"]
    return DTYPES[launch.signature["numbers_ptr"]] if form == "float" else form


def written(launch: Launch) -> str:
    """What a producer of a layer's input writes in addition to the input in 16 bits."""
    c: Any = launch.constants
    if not given(launch, "values"):
        return ""
    rows = ("_int8" if c["INT8"] else "_fp8") + "_rotated" * bool(c["ROTATION"])
    return rows + ("_down_r16" if c["BLOCK_R"] == 16 else "_down") * given(launch, "down")
