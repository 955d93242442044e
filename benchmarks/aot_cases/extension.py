"""What stands beside x and W in the one product of base, LoRA and bias."""

from __future__ import annotations

from typing import Any

from benchmarks.aot import CAPABILITIES, Case
from fluxq.kernels.triton import extension
from fluxq.kernels.triton.table import SHIPPED

KERNELS = {
    "fill_padding": (extension._fill_padding, dict(out_ptr="*bf16", s_ptr="*bf16")),
    "fill_tail": (extension._fill_tail, dict(out_ptr="*bf16", up_ptr="*fp32", bias_ptr="*bf16", scale="fp32")),
}


def case(gpu: int, op: str, kernel: Any, types: dict[str, str], eights: bool) -> Case:
    """For ranks that are multiples of eight, or for any: those rows begin anywhere and are read number by number."""
    tile = SHIPPED[op, gpu, "large"]
    numbers = {n: "i32" for n in kernel.arg_names if n not in types}
    constants = dict(EIGHTS=eights, ROWS=tile.block_m, COLUMNS=tile.block_n)
    return Case(
        op if eights else f"{op}_any_rank",
        kernel,
        numbers | types,
        constants,
        tile.warps,
        tile.stages,
        aligned=("out_stride", "width"),
        capabilities=(gpu,),
        narrow=("bias_ptr",) if eights else ("bias_ptr", "s_ptr", "up_ptr"),  # a bias has one number of a row
    )


CASES = [
    case(gpu, op, kernel, types, eights)
    for op, (kernel, types) in KERNELS.items()
    for eights in (True, False)
    for gpu in CAPABILITIES
]
