"""The gradient of an input of few rows, over the weight as it is stored."""

from __future__ import annotations

from benchmarks.aot import CAPABILITIES, Case, Product
from benchmarks.aot_cases.matmul import FEW, FORMATS, WEIGHT, blocks
from fluxq.kernels.triton import few_rows
from fluxq.kernels.triton.table import SHIPPED, Choice


def tile_of(format: str, gpu: int) -> Choice:
    """bf16 takes the vendor's product and has no row for few; who asks for this path gets the tile of large inputs."""
    op = f"lora_linear_backward_{FORMATS[format]}"
    return SHIPPED.get((op, gpu, "few")) or SHIPPED[op, gpu, "large"]


def shares(format: str, gpu: int, rows: int) -> Case:
    # Numbers of 8 bits go 64 bits at a time to where the tensor cores read them across rows.
    tile = tile_of(format, gpu)
    absent = {name: None for name in ("scale_ptr", "absmax_ptr", "levels_ptr") if name not in WEIGHT[format]}
    numbers = dict.fromkeys(("M", "N", "K", "dy_stride", "w_stride", "absmax_stride"), "i32")
    return Case(
        name=f"few_rows_backward_{FORMATS[format]}_{rows}",
        kernel=few_rows._shares,
        types=dict(dy_ptr="*bf16", sums_ptr="*fp32") | WEIGHT[format] | numbers,
        constants=blocks(tile)
        | absent
        | dict(FORM=format, SHARE=max(tile.chunk // tile.block_n, tile.block_k), BLOCK_M=rows),
        warps=tile.warps,
        stages=tile.stages,
        aligned=("N", "K", "dy_stride", "w_stride", "absmax_stride"),
        capabilities=(gpu,),
        dots=(Product(rows, tile.block_n, tile.block_k, "bf16"),),
        narrow=FEW if format in ("nf4", "float") else (*FEW, "w_ptr"),
        permutes=64,
    )


def sum_shares(gpu: int) -> Case:
    tile = SHIPPED["sum_shares", gpu, "large"]
    pointers = dict(sums_ptr="*fp32", ds_ptr="*bf16", down_ptr="*bf16", out_ptr="*bf16")
    numbers = ("shares", "M", "K", "R", "ds_stride", "down_stride", "out_stride")
    return Case(
        "sum_shares",
        few_rows._sum_shares,
        pointers | dict.fromkeys(numbers, "i32"),
        dict(ROWS=tile.block_m, COLUMNS=tile.block_n),
        tile.warps,
        tile.stages,
        aligned=("K", "down_stride", "out_stride"),
        capabilities=(gpu,),
        dots=(Product(tile.block_m, tile.block_n, 16, "bf16"),),
        narrow=("ds_ptr",),  # R of a row for any R
    )


CASES = [
    shares(format, gpu, rows)
    for format in FORMATS
    for rows in (16, 64)
    for gpu in CAPABILITIES
    if rows >= tile_of(format, gpu).block_m
]
CASES += [sum_shares(gpu) for gpu in CAPABILITIES]
