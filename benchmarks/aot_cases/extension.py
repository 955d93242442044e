"""What stands beside x and W in the one product of base, LoRA and bias."""

from __future__ import annotations

from typing import Any

from benchmarks.aot import CAPABILITIES, Case
from fluxq.kernels.triton import extension
from fluxq.kernels.triton.table import SHIPPED


# Stores are wide; s and up, R numbers wide for any R, are read one by one: they are in the cache, or few.
def case(card: int, op: str, kernel: Any, types: dict[str, str]) -> Case:
    tile = SHIPPED[op, card, "large"]
    numbers = {n: "i32" for n in kernel.arg_names if n not in types}
    constants = dict(ROWS=tile.block_m, COLUMNS=tile.block_n)
    return Case(
        op, kernel, numbers | types, constants, tile.warps, tile.stages, ("out_stride", "width"), (card,), vector=0.1
    )


CASES = [
    made
    for card in CAPABILITIES
    for made in (
        case(card, "fill_room", extension._fill_room, dict(out_ptr="*bf16", s_ptr="*bf16")),
        case(
            card,
            "fill_tail",
            extension._fill_tail,
            dict(out_ptr="*bf16", up_ptr="*fp32", bias_ptr="*bf16", scale="fp32"),
        ),
    )
]
