"""The rows of the table (table.py) as they are shipped: every kernel's path and tiles, by op, generation, shape class.

A generation is a compute capability as one number, 89 for 8.9; 0 is Triton's interpreter on a CPU. Shape classes
are `few` rows of input (modulation, embedders) and `large`; for `row_quantize`, which has a row in registers, they are
widths. None is finer without a measurement that asks for it. All rows are predicted until one is measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ..cutting import CHUNKS

GENERATIONS = (80, 86, 89, 90, 120)
INTERPRETED = 0
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 120: 99}  # that one block may have (CUDA programming guide, table 24)
WIDTHS = (1024, 2048, 4096, 8192, 16384, 32768)

FORMATS = ("nf4", "fp8", "int8", "bf16")
STREAMING = (
    *("modulate", "modulate_8bit", "modulate_8bit_down", "modulate_backward", "modulate_backward_sums"),
    *("gated_add", "gated_add_backward", "gated_add_backward_sums"),
    *("gelu_tanh", "gelu_tanh_8bit", "gelu_tanh_8bit_down", "gelu_tanh_backward"),
    *("qk_norm_rope", "qk_norm_rope_backward"),
    *("dequantize", "dequantize_transposed", "dequantize_transposed_rotated", "nf4_quantize", "row_quantize", "rotate"),
    *("fill_padding", "fill_tail", "sum_shares"),
)
"""Ops that wait for memory: one path each, and tiles that only have to keep enough of it on its way."""

PATHS = {
    **{f"lora_linear_{format}": ("extended", "plain", "fused") for format in FORMATS},
    **{f"lora_linear_backward_{format}": ("extended", "fused") for format in FORMATS},
    "matmul_int8": ("triton",),
    "matmul_fp8": ("triton", "scaled"),
    **dict.fromkeys(STREAMING, ("triton",)),
}
"""Op -> the paths there are; the op's own file says what each is."""


@dataclass(frozen=True)
class Choice:
    """A path and its sizes; 0 where the path has no such size.

    block_m, block_n, block_k: a program's tile of rows and columns, and what it contracts over at a time. step: how
    many of its rows it has in registers at a time. warps and stages as Triton means them. chunk: how many numbers of a
    weight are decoded at a time, or by one program. word: whether the row was `predicted` or `measured`; why: from
    what.
    """

    path: str
    block_m: int = 0
    block_n: int = 0
    block_k: int = 0
    warps: int = 4
    stages: int = 1
    chunk: int = 0
    word: str = "predicted"
    why: str = ""
    step: int = 0


Key = tuple[str, int, str]
"""Op, generation, shape class."""
Rows = Iterator[tuple[Key, Choice]]


def shape_classes(op: str) -> tuple[str, ...]:
    return (*map(str, WIDTHS), "wider") if op == "row_quantize" else ("few", "large")


def paths(op: str, gpu: int) -> tuple[str, ...]:
    """Those of `op` that there are on a GPU of that generation."""
    return tuple(path for path in PATHS[op] if path != "scaled" or gpu >= 120)


def _row(ops: str, gpus: tuple[int, ...], shape: str, choice: Choice) -> Rows:
    return (((op, gpu, shape), choice) for op in ops.split() for gpu in gpus)


ALL, GEFORCE, BIG, HERE = GENERATIONS, (86, 89, 120), (80, 90), (INTERPRETED,)
STORED = "lora_linear_nf4 lora_linear_fp8 lora_linear_int8"
BACKWARD = "lora_linear_backward_nf4 lora_linear_backward_fp8 lora_linear_backward_int8"
BACKWARD_BF16 = "lora_linear_backward_bf16"


def _linear_layers() -> Rows:
    """Products in 16 bits: the tiles are those of the fused kernel, for whoever asks for that path."""
    small, whole = CHUNKS[86], CHUNKS[90]
    why = "decoding once beats decoding in the loop above 512 rows on every GPU (bitsandbytes' measured dispatch); "
    short = why + "19 MB at a time stay in the second-level cache of most GPUs until they are multiplied"
    long = why + "each of FLUX's layers in one piece, 94 MB: many multiprocessors want long products"
    yield from _row(STORED, GEFORCE, "large", Choice("extended", 128, 128, 64, 8, 3, small, why=short))
    yield from _row(STORED, BIG, "large", Choice("extended", 128, 128, 64, 8, 3, whole, why=long))
    spills = "; with Triton 3.6 a fused tile twice as wide spills"
    yield from _row(
        "lora_linear_nf4", GEFORCE, "large", Choice("extended", 128, 64, 64, 8, 3, small, why=short + spills)
    )
    yield from _row("lora_linear_nf4", (80,), "large", Choice("extended", 128, 64, 64, 8, 3, whole, why=long + spills))
    why = "a weight in 16 bits needs no decoding, and copying it costs what the LoRA's own pass over y does"
    yield from _row("lora_linear_bf16", BIG, "large", Choice("plain", 128, 128, 64, 8, 3, why=why))
    yield from _row("lora_linear_bf16", GEFORCE, "large", Choice("plain", 128, 128, 32, 8, 3, why=why))
    why = "reading the weight is all the work, so it is read as it is stored; narrow tiles fill the GPU, and 2 warps "
    why += "read even NF4 128 bits at a time"
    yield from _row(STORED, ALL, "few", Choice("fused", 16, 32, 64, 2, 4, why=why))
    why = "a vendor's product of few rows reads the weight at the memory's speed"
    yield from _row("lora_linear_bf16", ALL, "few", Choice("plain", 16, 32, 64, 2, 4, why=why))
    why = "as forward; chunks are of columns, since the sum over rows must be rounded once"
    yield from _row(BACKWARD, GEFORCE, "large", Choice("extended", 64, 128, 64, 8, 3, small, why=why))
    yield from _row(BACKWARD, BIG, "large", Choice("extended", 64, 128, 64, 8, 3, whole, why=why))
    why = "as forward; dy too comes 128 bits at a time; shares of 1,024 rows make 864 programs of modulation's layer"
    yield from _row(BACKWARD, GEFORCE, "few", Choice("fused", 16, 64, 64, 4, 3, 1 << 16, why=why))
    why = "as forward; shares of 512 rows make 1,728 programs of modulation's layer, and fast memory wants more stages"
    yield from _row(BACKWARD, BIG, "few", Choice("fused", 16, 64, 64, 4, 5, 1 << 15, why=why))
    why = "a weight in 16 bits needs no decoding, and a vendor's product reads it at the memory's speed"
    yield from _row(BACKWARD_BF16, ALL, "large", Choice("extended", 64, 128, 64, 8, 3, why=why))

    why = "tests have a hundred rows and still want several programs"
    yield from _row(STORED, HERE, "large", Choice("extended", 32, 32, 64, chunk=64 * 192, why=why))
    yield from _row(STORED, HERE, "few", Choice("fused", 16, 32, 64, why=why))
    yield from _row("lora_linear_bf16", HERE, "large", Choice("plain", 32, 32, 64, why=why))
    yield from _row(BACKWARD, HERE, "large", Choice("extended", 32, 64, 32, chunk=64 * 192, why=why))
    yield from _row(BACKWARD, HERE, "few", Choice("fused", 16, 64, 32, chunk=64 * 64, why=why))
    yield from _row(BACKWARD_BF16, HERE, "large", Choice("extended", 32, 64, 32, why=why))


def _products() -> Rows:
    """In 8 bits."""
    both = "matmul_int8 matmul_fp8"
    why = "neither spills nor permutes bytes; each byte read takes part in 128 products"
    yield from _row(both, (80, 86, 89, 120), "large", Choice("triton", 128, 128, 64, 8, 3, why=why))
    why = "a warp group multiplies 64 rows at once; a deep tile pays for its barriers"
    yield from _row(both, (90,), "large", Choice("triton", 128, 128, 128, 8, 4, why=why))
    why = "tests have a hundred rows and still want several programs"
    yield from _row(both, HERE, "large", Choice("triton", 32, 32, 64, why=why))


def _steps() -> Rows:
    """What stands between a block's products; from registers at widths of 3,072 and 12,288."""

    def row(op: str, m: int, n: int, k: int, warps: int, step: int, why: str) -> Rows:
        return _row(op, (*ALL, *HERE), "large", Choice("triton", m, n, k, warps, 3, why=why, step=step))

    yield from row("modulate", 1, 0, 0, 4, 1, "24 numbers a thread, 5 rows or more in flight on a multiprocessor")
    why = "8-bit rows are stored 16 numbers a thread: 8 warps for 4,096 of them"
    yield from row("modulate_8bit", 1, 0, 0, 8, 1, why)
    why = "16 rows are what a tensor core multiplies; two at a time hide the sums of one another"
    yield from row("modulate_8bit_down", 16, 0, 128, 8, 2, why)
    yield from row("modulate_backward", 1, 0, 0, 8, 1, "at 4 warps 91 registers, and a third less in flight")
    why = "158 registers for the sums: the rarer case, and 1/16 of a row is written for each row"
    yield from row("modulate_backward_sums", 16, 0, 0, 8, 1, why)
    why = "four rows share the gate; blocks divide FLUX's widths"
    yield from row("gated_add gated_add_backward", 4, 1024, 0, 4, 4, why)
    why = "the gate's gradient is written once for 16 rows"
    yield from row("gated_add_backward_sums", 16, 1024, 0, 4, 2, why)
    why = "32 numbers a thread, and no two programs share a line of memory; blocks divide FLUX's widths"
    yield from row("gelu_tanh gelu_tanh_backward", 4, 1024, 0, 4, 0, why)
    why = "a row of 15,360 in 64 registers a thread: two rows in flight on a multiprocessor"
    yield from row("gelu_tanh_8bit", 1, 0, 0, 16, 0, why)
    why = "16 rows share a reading of `down`; 8 warps read 128 columns of them 128 bits at a time, and 128 registers "
    why += "hold a row"
    yield from row("gelu_tanh_8bit_down", 16, 0, 128, 8, 0, why)
    why = "24 heads of 128 are 12 numbers a thread, and each of q, k and v two loads"
    yield from row("qk_norm_rope qk_norm_rope_backward", 0, 0, 0, 8, 0, why)


def _storage() -> Rows:
    """Weights into stored forms and back."""

    def row(op: str, shape: str, gpus: tuple[int, ...], m: int, n: int, warps: int, why: str) -> Rows:
        return _row(op, gpus, shape, Choice("triton", m, n, 0, warps, 3, why=why))

    why = "with 32 weights a thread so few registers (40) that all of a GPU's threads can run"
    yield from row("dequantize", "large", ALL, 4, 1024, 4, why)
    why = "a square tile: both its sides are whole sectors of memory"
    yield from row("dequantize_transposed", "large", ALL, 64, 64, 4, why)
    why = "as wide as a rotation's block, and 32 rows, so that what is written across them is whole sectors too"
    yield from row("dequantize_transposed_rotated", "large", (*ALL, *HERE), 32, 256, 8, why)
    yield from row("rotate", "large", (*ALL, *HERE), 0, 4096, 4, "32 numbers a thread, as rows are quantized")
    why = "measured: with tiles of 4 rows the tests of stored weights take a quarter longer"
    yield from row("dequantize dequantize_transposed", "large", HERE, 64, 1024, 4, why)
    why = "a row's 32 columns are 4 stores of 128 bits; as many rows as give each thread two of them"
    yield from row("fill_padding fill_tail", "large", (*ALL, *HERE), 64, 32, 4, why)
    why = "narrow, so that a gradient of 3,072 columns is 96 programs, of threads that store 128 bits at a time; "
    why += "block_n divides FLUX's widths"
    yield from row("sum_shares", "large", (*ALL, *HERE), 16, 32, 2, why)
    why = "32 weights a thread, so that codes too leave 128 bits at a time; block_m counts blocks of 64"
    yield from row("nf4_quantize", "large", (*ALL, *HERE), 64, 0, 4, why)
    # The narrowest class that holds a row.
    why = "with 32 numbers a thread bytes leave 128 bits at a time; 64 registers at most let half a GPU's threads run"
    for width in WIDTHS:
        yield from row("row_quantize", str(width), (*ALL, *HERE), 0, width, width // 1024, why)
    yield from row(
        "row_quantize", "wider", (*ALL, *HERE), 0, 8192, 8, "a piece of the row at a time, which is read again"
    )


SHIPPED: Mapping[Key, Choice] = {
    key: choice for rows in (_linear_layers, _products, _steps, _storage) for key, choice in rows()
}
