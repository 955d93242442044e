"""Matrix products at the tiles of the table: fused linear layers over stored weights, and 8-bit products."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.aot import CAPABILITIES, Case, Product
from fluxq.kernels.triton.matmul import _linear
from fluxq.kernels.triton.matmul_8bit import _matmul_8bit
from fluxq.kernels.triton.table import SHIPPED, Choice

LINEAR = dict(x_ptr="*bf16", bias_ptr="*bf16", s_ptr="*bf16", up_ptr="*bf16", y_ptr="*bf16") | dict.fromkeys(
    ("M", "N", "K", "R", "x_stride", "w_stride", "absmax_stride", "s_stride", "up_stride"), "i32"
)
# One number of a row, or of a block of 64; R of a row for any R; NF4's table of 16.
FEW = ("scale_ptr", "absmax_ptr", "levels_ptr", "bias_ptr", "s_ptr", "up_ptr")
WEIGHT = {
    "float": dict(w_ptr="*bf16"),
    "fp8": dict(w_ptr="*u8", scale_ptr="*fp32"),
    "int8": dict(w_ptr="*u8", scale_ptr="*fp32"),
    "nf4": dict(w_ptr="*i32", absmax_ptr="*fp32", levels_ptr="*fp32"),
}


def linear(format: str, shape: str, gpu: int, choice: Choice) -> Case:
    absent = {name: None for name in ("scale_ptr", "absmax_ptr", "levels_ptr") if name not in WEIGHT[format]}
    m, n = choice.block_m, choice.block_n
    return Case(
        name=f"linear_{format}_{shape}",
        kernel=_linear,
        types=LINEAR | WEIGHT[format],
        constants=blocks(choice) | absent | dict(FORM=format, EVEN_K=True),
        warps=choice.warps,
        stages=choice.stages,
        aligned=("N", "K", "x_stride", "w_stride", "absmax_stride"),
        capabilities=(gpu,),
        dots=(Product(m, n, choice.block_k, "bf16"), Product(m, n, 16, "bf16")),
        narrow=FEW if shape == "few" else None,
        permutes=128,
    )


def product(kind: str, gpu: int, choice: Choice, dx: bool = False) -> Case:
    """An 8-bit product with everything in its epilogue; or that of the gradient, without scales of columns and bias."""
    m, n = choice.block_m, choice.block_n
    absent = dict(b_scale_ptr=None, bias_ptr=None) if dx else {}
    eight = "*i8" if kind == "int8" else "*fp8e4nv"
    return Case(
        name=f"matmul_{kind}{'_scaled' if choice.path == 'scaled' else ''}{'_dx' if dx else ''}",
        kernel=_matmul_8bit,
        types=dict(a_ptr=eight, b_ptr=eight, a_scale_ptr="*fp32", b_scale_ptr="*fp32", up_ptr="*fp32")
        | dict(s_ptr="*bf16" if dx else "*fp32", bias_ptr="*bf16", y_ptr="*bf16")
        | dict.fromkeys(("M", "N", "K", "R", "a_stride", "b_stride", "s_stride", "up_stride"), "i32"),
        constants=blocks(choice) | absent | dict(EVEN_K=True, SCALED=choice.path == "scaled"),
        warps=choice.warps,
        stages=choice.stages,
        aligned=("N", "K", "a_stride", "b_stride"),
        capabilities=(gpu,),
        dots=(
            Product(m, n, choice.block_k, "fp8 scaled" if choice.path == "scaled" else kind),
            Product(m, n, 16, "bf16"),
        ),
        permutes=64,
    )


def blocks(choice: Choice) -> dict[str, int]:
    return dict(BLOCK_M=choice.block_m, BLOCK_N=choice.block_n, BLOCK_K=choice.block_k)


FORMATS = {"float": "bf16", "fp8": "fp8", "int8": "int8", "nf4": "nf4"}
CASES = [
    linear(format, shape, gpu, SHIPPED[f"lora_linear_{stored}", gpu, shape])
    for format, stored in FORMATS.items()
    for shape in ("large", "few")
    for gpu in CAPABILITIES
] + [
    product(kind, gpu, SHIPPED[f"matmul_{kind}", gpu, "large"], dx)
    for dx in (False, True)
    for kind, gpus in (("int8", CAPABILITIES), ("fp8", (89, 90, 120)))
    for gpu in gpus
]
# With block scales fp8 runs at full rate on RTX 50. No GPU has shown its numbers yet, so it is only a candidate there.
CASES += [product("fp8", 120, replace(SHIPPED["matmul_fp8", 120, "large"], path="scaled"), dx) for dx in (False, True)]
