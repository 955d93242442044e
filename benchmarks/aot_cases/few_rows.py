"""The gradient of an input of few rows, over the weight as it is stored."""

from __future__ import annotations

from benchmarks.aot import CAPABILITIES, Case, Product
from benchmarks.aot_cases.matmul import FORMATS, WEIGHT, blocks
from fluxq.kernels.triton import few_rows
from fluxq.kernels.triton.table import SHIPPED


def shares(format: str, card: int, rows: int) -> Case:
    # Numbers of 8 bits come 64 bits at a time at 16 rows, as the tensor cores want to read them; scales one by one.
    tile = SHIPPED["lora_linear_backward_nf4", card, "few"]  # bf16 has no row of its own, but may be asked for
    absent = {name: None for name in ("scale_ptr", "absmax_ptr", "levels_ptr") if name not in WEIGHT[format]}
    numbers = dict.fromkeys(("M", "N", "K", "dy_stride", "w_stride", "absmax_stride"), "i32")
    return Case(
        name=f"few_rows_backward_{FORMATS[format]}_{rows}",
        kernel=few_rows._shares,
        types=dict(dy_ptr="*bf16", sums_ptr="*fp32") | WEIGHT[format] | numbers,
        constants=blocks(tile) | absent | dict(FORM=format, SHARE=tile.chunk // tile.block_n, BLOCK_M=rows),
        warps=tile.warps,
        stages=tile.stages,
        aligned=("N", "K", "dy_stride", "w_stride", "absmax_stride"),
        capabilities=(card,),
        dots=(Product(rows, tile.block_n, tile.block_k, "bf16"),),
        vector={"nf4": 0.35, "float": 0.75}.get(format, 0.0),
        permutes=64,
    )


def sum_shares(card: int) -> Case:
    tile = SHIPPED["sum_shares", card, "large"]
    pointers = dict(sums_ptr="*fp32", ds_ptr="*bf16", down_ptr="*bf16", out_ptr="*bf16")
    numbers = ("shares", "M", "K", "R", "ds_stride", "down_stride", "out_stride")
    return Case(
        "sum_shares",
        few_rows._sum_shares,
        pointers | dict.fromkeys(numbers, "i32"),
        dict(ROWS=tile.block_m, COLUMNS=tile.block_n),
        tile.warps,
        tile.stages,
        ("K", "down_stride", "out_stride"),
        (card,),
        dots=(Product(tile.block_m, tile.block_n, 16, "bf16"),),
    )


CASES = [shares(format, card, rows) for format in FORMATS for rows in (16, 64) for card in CAPABILITIES]
CASES += [sum_shares(card) for card in CAPABILITIES]
