"""Stored weights quantized and decoded, at the tiles in use."""

from __future__ import annotations

from typing import Any

from benchmarks.aot import CAPABILITIES, Case
from fluxq.kernels.triton import nf4, rows, storage
from fluxq.kernels.triton.rotation import _rotate
from fluxq.kernels.triton.stored import LARGEST
from fluxq.kernels.triton.table import SHIPPED, Choice, shape_class

TYPES = {"nf4": "*i32", "int8": "*u8", "fp8": "*u8", "bytes": "*u8", "bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32"}
# One number of a row, or of a block of 64; and tables of 16, a thread reading one.
FEW = ("scale_ptr", "scales_ptr", "divisor_ptr", "absmax_ptr", "levels_ptr", "midpoints_ptr")
CONVERSIONS = [
    *[(form, "bf16", transposed) for form in ("nf4", "int8", "fp8") for transposed in (False, True)],
    *[(form, to, True) for form in ("nf4", "bf16") for to in ("int8", "fp8")],
    ("int8", "fp8", True),
    ("fp8", "int8", True),
    ("bytes", "bytes", True),
]


def pointers(form: str, **given: str) -> tuple[dict[str, str], dict[str, Any]]:
    """Types and constants of the arguments that every kernel has for a weight of that form; `given` are the others."""
    types = {"numbers_ptr": TYPES[form], **given}
    if form == "nf4":
        types |= {"absmax_ptr": "*fp32", "levels_ptr": "*fp32"}
    if form in LARGEST:
        types |= {"scale_ptr": "*fp32"}
    names = ("absmax_ptr", "levels_ptr", "scale_ptr", "divisor_ptr", "columns_ptr", "out_ptr")
    return types, {name: None for name in names if name not in types}


def plain(form: str) -> str:
    return "float" if TYPES[form] == "*" + form else form


def conversion(gpu: int, form: str, to: str, transposed: bool, rotation: int = 0) -> Case:
    divisor = {"divisor_ptr": "*fp32"} if to in LARGEST else {}
    types, constants = pointers(
        form, out_ptr=TYPES[to], N="i32", K="i32", stride="i32", absmax_stride="i32", out_stride="i32", **divisor
    )
    constants = {name: value for name, value in constants.items() if name != "columns_ptr"}
    way = f"{'_transposed' if transposed else ''}{'_rotated' if rotation else ''}"
    tile = SHIPPED[f"dequantize{way}", gpu, "large"]
    return Case(
        f"{form} to {to}{way.replace('_', ' ')}",
        storage._convert,
        types,
        {
            **constants,
            "FROM": plain(form),
            "TO": plain(to),
            "ROTATION": rotation,
            "TRANSPOSED": transposed,
            "ROWS": tile.block_m,
            "COLUMNS": tile.block_n,
        },
        **launched(gpu, tile),
        aligned=("N", "K", "stride", "absmax_stride", "out_stride"),
        narrow=FEW,
        permutes=112,  # three for each of a thread's 32 numbers, and some to rotate
    )


def row_case(
    gpu: int, form: str, to: str, width: int, columns: bool = False, values: bool = True, rotation: int = 0
) -> Case:
    given = {"columns_ptr": "*fp32"} if columns else {}
    given |= {"out_ptr": "*u8"} if values else {}
    types, constants = pointers(form, scales_ptr="*fp32", N="i32", K="i32", stride="i32", absmax_stride="i32", **given)
    constants = {name: value for name, value in constants.items() if name != "divisor_ptr"}
    tile = SHIPPED["row_quantize", gpu, shape_class("row_quantize", width)]
    return Case(
        f"rows of {width} {form} {'to' if values else 'scales for'} {to}{' times columns' if columns else ''}"
        + (f" rotated by {rotation}" if rotation else ""),
        rows._rows,
        types,
        {
            **constants,
            "FROM": plain(form),
            "TO": to,
            "ROTATION": rotation,
            "LARGEST": LARGEST[to],
            "ONCE": tile.block_n >= width,
            "COLUMNS": tile.block_n,
        },
        **launched(gpu, tile),
        aligned=("K", "stride"),
        narrow=FEW,
        permutes=112 if rotation else 64,  # two for each of a thread's 32 numbers, rotated three
    )


def quantizer(gpu: int, dtype: str) -> Case:
    tile = SHIPPED["nf4_quantize", gpu, "large"]
    return Case(
        f"{dtype} to nf4",
        nf4._quantize,
        {
            "w_ptr": TYPES[dtype],
            "codes_ptr": "*i32",
            "absmax_ptr": "*fp32",
            "midpoints_ptr": "*fp32",
            "blocks": "i32",
        },
        {"BLOCKS": tile.block_m},
        **launched(gpu, tile),
        aligned=("blocks",),
        narrow=FEW,
    )


def rotate(gpu: int, dtype: str) -> Case:
    tile = SHIPPED["rotate", gpu, "large"]
    pointers = dict(x_ptr=TYPES[dtype], y_ptr=TYPES[dtype], blocks="i32")
    sizes = dict(BLOCK=256, NUMBERS=tile.block_n)
    return Case(f"rotate {dtype}", _rotate, pointers, sizes, **launched(gpu, tile), narrow=())


def launched(gpu: int, tile: Choice) -> dict[str, Any]:
    return dict(warps=tile.warps, stages=tile.stages, capabilities=(gpu,))


def on(gpu: int) -> list[Case]:
    """A width stands for all that take the same tile."""
    return [
        *[conversion(gpu, *c) for c in CONVERSIONS],
        *[row_case(gpu, "bf16", to, width) for to in LARGEST for width in (3072, 15360, 21504)],
        *[row_case(gpu, "bf16", to, width, columns=True) for to in LARGEST for width in (3072, 12288, 21504)],
        *[row_case(gpu, "nf4", to, width) for to in LARGEST for width in (3072, 15360)],
        row_case(gpu, "nf4", "int8", 15360, values=False),
        row_case(gpu, "int8", "fp8", 3072),
        row_case(gpu, "fp8", "int8", 3072),
        row_case(gpu, "fp32", "int8", 40000),
        *[conversion(gpu, form, "int8", True, rotation=256) for form in ("nf4", "fp8", "int8", "bf16")],
        *[row_case(gpu, "bf16", "int8", width, rotation=256) for width in (3072, 15360)],
        *[row_case(gpu, "nf4", "int8", width, rotation=256) for width in (3072, 15360)],
        *[row_case(gpu, "nf4", "int8", width, values=False, rotation=256) for width in (3072, 15360)],
        row_case(gpu, "int8", "int8", 3072, rotation=64),
        row_case(gpu, "fp8", "fp8", 3072, rotation=256),
        *[rotate(gpu, dtype) for dtype in ("bf16", "fp32")],
        *[quantizer(gpu, dtype) for dtype in ("bf16", "fp32")],
    ]


CASES = [case for gpu in CAPABILITIES for case in on(gpu)]
