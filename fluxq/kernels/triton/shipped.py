"""The shipped rows of the table (table.py): every kernel's path and tiles, by op, generation and shape class.

A generation is a compute capability as one number, 89 for 8.9; 0 is Triton's interpreter on a CPU. Shape classes are
`few` rows of input (modulation, embedders) and `large`; for `row_quantize`, which holds a row in registers, they are
widths. A finer class is added only if a measurement calls for it. All rows are predicted until measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ..chunks import CHUNKS, WHOLE

GENERATIONS = (80, 86, 89, 90, 120)
INTERPRETED = 0
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 120: 99}  # the most per block (CUDA programming guide, table 24)
WIDTHS = (1024, 2048, 4096, 8192, 16384, 32768)

FORMATS = ("nf4", "fp8", "int8", "bf16")
STREAMING = (
    *("modulate", "modulate_8bit", "modulate_8bit_down", "modulate_backward", "modulate_backward_sums"),
    *("gated_add", "gated_add_backward", "gated_add_backward_sums"),
    *("gelu_tanh", "gelu_tanh_8bit", "gelu_tanh_8bit_down", "gelu_tanh_backward"),
    *("qk_norm_rope", "qk_norm_rope_backward"),
    *("dequantize", "dequantize_transposed", "dequantize_transposed_rotated", "nf4_quantize", "row_quantize", "rotate"),
    *("fill_padding", "sum_shares", "drop"),
)
"""Ops that wait for memory: one path each, and tiles that only have to keep enough memory traffic in flight."""

PATHS = {
    **{f"lora_linear_{format}": ("extended", "plain", "fused") for format in FORMATS},
    **{f"lora_linear_backward_{format}": ("extended", "fused") for format in FORMATS},
    "matmul_int8": ("triton",),
    "matmul_fp8": ("triton", "scaled"),
    **dict.fromkeys(STREAMING, ("triton",)),
}
"""Op -> its paths; the op's own file explains them."""


@dataclass(frozen=True)
class Choice:
    """A path and its sizes; 0 if the path has no such size.

    block_m, block_n, block_k: a program's tile of rows and columns, and how much it contracts over at a time. step: how
    many of its rows it holds in registers at a time. warps and stages as in Triton. chunk: how many weights are decoded
    at a time, or by one program. word: whether the row is `predicted` or `measured`; why: the reason.
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

    def __hash__(self) -> int:  # of the generated one, most would be spent on the reason
        return hash((self.path, self.block_m, self.block_n, self.block_k, self.warps, self.chunk))


Key = tuple[str, int, str]
"""Op, generation, shape class."""
Rows = Iterator[tuple[Key, Choice]]


def shape_classes(op: str) -> tuple[str, ...]:
    return (*map(str, WIDTHS), "wider") if op == "row_quantize" else ("few", "large")


def paths(op: str, gpu: int) -> tuple[str, ...]:
    """The paths of `op` on a GPU of that generation."""
    return tuple(path for path in PATHS[op] if path != "scaled" or gpu >= 120)


def _row(ops: str, gpus: tuple[int, ...], shape: str, choice: Choice) -> Rows:
    return (((op, gpu, shape), choice) for op in ops.split() for gpu in gpus)


ALL, GEFORCE, BIG, HERE = GENERATIONS, (86, 89, 120), (80, 90), (INTERPRETED,)
STORED = "lora_linear_nf4 lora_linear_fp8 lora_linear_int8"
BACKWARD = "lora_linear_backward_nf4 lora_linear_backward_fp8 lora_linear_backward_int8"
BACKWARD_BF16 = "lora_linear_backward_bf16"


def _linear_layers() -> Rows:
    """Products in 16 bits. The tiles are those of the fused kernel, in case that path is chosen."""
    decode = "decoding once beats decoding in the loop above 512 rows on every GPU (bitsandbytes' measured dispatch); "
    l2 = "half of the largest layers, 57 MB: it stays in a large L2 cache until it is multiplied (predicted)"
    waves = "each of FLUX's layers in one piece: the fewest launches, and products that fill whole waves (predicted)"
    spills = "; with Triton 3.6 a fused tile twice as wide spills"
    for gpu in ALL:
        chunk, why = CHUNKS[gpu], decode + (waves if CHUNKS[gpu] == WHOLE else l2)
        yield from _row(STORED, (gpu,), "large", Choice("extended", 128, 128, 64, 8, 3, chunk, why=why))
        if gpu != 90:
            narrow = Choice("extended", 128, 64, 64, 8, 3, chunk, why=why + spills)
            yield from _row("lora_linear_nf4", (gpu,), "large", narrow)
        why = "as forward; chunks are columns, since the sum over rows must be rounded once"
        yield from _row(BACKWARD, (gpu,), "large", Choice("extended", 64, 128, 64, 8, 3, chunk, why=why))
    why = "a weight in 16 bits needs no decoding, and copying it costs as much as the LoRA's own pass over y"
    yield from _row("lora_linear_bf16", BIG, "large", Choice("plain", 128, 128, 64, 8, 3, why=why))
    yield from _row("lora_linear_bf16", GEFORCE, "large", Choice("plain", 128, 128, 32, 8, 3, why=why))
    why = "reading the weight is all the work, so it is read as stored; narrow tiles fill the GPU, and 2 warps "
    why += "read even NF4 128 bits at a time"
    yield from _row(STORED, ALL, "few", Choice("fused", 16, 32, 64, 2, 4, why=why))
    why = "the vendor's product of few rows reads the weight at memory speed"
    yield from _row("lora_linear_bf16", ALL, "few", Choice("plain", 16, 32, 64, 2, 4, why=why))
    why = "as forward; dy is also read 128 bits at a time; shares of 1,024 rows make 864 programs of modulation's layer"
    yield from _row(BACKWARD, GEFORCE, "few", Choice("fused", 16, 64, 64, 4, 3, 1 << 16, why=why))
    why = "as forward; shares of 512 rows make 1,728 programs of modulation's layer, and fast memory needs more stages"
    yield from _row(BACKWARD, BIG, "few", Choice("fused", 16, 64, 64, 4, 5, 1 << 15, why=why))
    why = "a weight in 16 bits needs no decoding, and the vendor's product reads it at memory speed"
    yield from _row(BACKWARD_BF16, ALL, "large", Choice("extended", 64, 128, 64, 8, 3, why=why))

    why = "tests have a hundred rows and still need several programs"
    yield from _row(STORED, HERE, "large", Choice("extended", 32, 32, 64, chunk=64 * 192, why=why))
    yield from _row(STORED, HERE, "few", Choice("fused", 16, 32, 64, why=why))
    yield from _row("lora_linear_bf16", HERE, "large", Choice("plain", 32, 32, 64, why=why))
    yield from _row(BACKWARD, HERE, "large", Choice("extended", 32, 64, 32, chunk=64 * 192, why=why))
    yield from _row(BACKWARD, HERE, "few", Choice("fused", 16, 64, 32, chunk=64 * 64, why=why))
    yield from _row(BACKWARD_BF16, HERE, "large", Choice("extended", 32, 64, 32, why=why))


def _products() -> Rows:
    """Products in 8 bits."""
    both = "matmul_int8 matmul_fp8"
    why = "neither spills nor permutes bytes; each byte read from L2 is used in 128 products"
    yield from _row(both, (80, 86, 89, 120), "large", Choice("triton", 128, 128, 64, 8, 3, why=why))
    why = "each byte read from L2 is used in 171 products: a tile of 128 rows needs all that an RTX 4090's L2 gives; "
    why += "246 registers"
    yield from _row("matmul_int8", (86, 89), "large", Choice("triton", 256, 128, 64, 8, 3, why=why))
    why = "fp8 runs at half the rate of int8, so L2 keeps up with 128 rows; with 256, the second sum would spill"
    yield from _row("matmul_fp8", (89,), "large", Choice("triton", 128, 128, 64, 8, 3, why=why))
    why = "without scales, these GPUs multiply e4m3 at half rate (OneTrainer's measurement)"
    yield from _row("matmul_fp8", (120,), "large", Choice("scaled", 128, 128, 64, 8, 3, why=why))
    why = "a warp group multiplies 64 rows at once; a deep tile pays for its barriers"
    yield from _row(both, (90,), "large", Choice("triton", 128, 128, 128, 8, 4, why=why))
    why = "tests have a hundred rows and still need several programs"
    yield from _row(both, HERE, "large", Choice("triton", 32, 32, 64, why=why))


def _steps() -> Rows:
    """The ops between a block's matrix products; sized by registers at widths of 3,072 and 12,288."""

    def row(op: str, m: int, n: int, k: int, warps: int, step: int, why: str) -> Rows:
        return _row(op, (*ALL, *HERE), "large", Choice("triton", m, n, k, warps, 3, why=why, step=step))

    yield from row("modulate", 1, 0, 0, 4, 1, "24 numbers per thread, 5 or more rows in flight on a multiprocessor")
    why = "8-bit rows are stored 16 numbers per thread: 8 warps for 4,096 of them"
    yield from row("modulate_8bit", 1, 0, 0, 8, 1, why)
    why = "a tensor core multiplies 16 rows; two at a time hide each other's sums"
    yield from row("modulate_8bit_down", 16, 0, 128, 8, 2, why)
    yield from row("modulate_backward", 1, 0, 0, 8, 1, "4 warps would need 91 registers, with a third less in flight")
    why = "158 registers for the sums: the rarer case; it writes 1/16 of a row per row"
    yield from row("modulate_backward_sums", 16, 0, 0, 8, 1, why)
    why = "four rows share the gate; blocks divide FLUX's widths"
    yield from row("gated_add gated_add_backward", 4, 1024, 0, 4, 4, why)
    why = "the gate's gradient is written once for 16 rows"
    yield from row("gated_add_backward_sums", 16, 1024, 0, 4, 2, why)
    why = "32 numbers per thread, and no two programs share a cache line; blocks divide FLUX's widths"
    yield from row("gelu_tanh gelu_tanh_backward", 4, 1024, 0, 4, 0, why)
    why = "a row of 15,360 takes 64 registers per thread: two rows in flight on a multiprocessor"
    yield from row("gelu_tanh_8bit", 1, 0, 0, 16, 0, why)
    why = "16 rows share one read of `down`; 8 warps read 128 columns of them 128 bits at a time, and 128 registers "
    why += "hold a row"
    yield from row("gelu_tanh_8bit_down", 16, 0, 128, 8, 0, why)
    why = "24 heads of 128 are 12 numbers per thread, and two loads for each of q, k and v"
    yield from row("drop", 4, 1024, 0, 4, 0, "as gelu_tanh, with two hashes per number")
    yield from row("qk_norm_rope qk_norm_rope_backward", 0, 0, 0, 8, 0, why)


def _storage() -> Rows:
    """Conversion of weights to and from the stored forms."""

    def row(op: str, shape: str, gpus: tuple[int, ...], m: int, n: int, warps: int, why: str) -> Rows:
        return _row(op, gpus, shape, Choice("triton", m, n, 0, warps, 3, why=why))

    why = "32 weights per thread need so few registers (40) that all of a GPU's threads can run"
    yield from row("dequantize", "large", ALL, 4, 1024, 4, why)
    why = "a square tile: both sides are whole memory sectors"
    yield from row("dequantize_transposed", "large", ALL, 64, 64, 4, why)
    why = "as wide as a rotation's block, and 32 rows, so that writes across them are whole sectors too"
    yield from row("dequantize_transposed_rotated", "large", (*ALL, *HERE), 32, 256, 8, why)
    yield from row("rotate", "large", (*ALL, *HERE), 0, 4096, 4, "32 numbers per thread, as in row quantization")
    why = "measured: with tiles of 4 rows, the tests of stored weights take a quarter longer"
    yield from row("dequantize dequantize_transposed", "large", HERE, 64, 1024, 4, why)
    why = "a row's 32 columns are 4 stores of 128 bits; 64 rows give each thread two of them"
    yield from row("fill_padding", "large", (*ALL, *HERE), 64, 32, 4, why)
    why = "narrow, so that a gradient of 3,072 columns makes 96 programs whose threads store 128 bits at a time; "
    why += "block_n divides FLUX's widths"
    yield from row("sum_shares", "large", (*ALL, *HERE), 16, 32, 2, why)
    why = "32 weights per thread, so that codes are also stored 128 bits at a time; block_m counts blocks of 64"
    yield from row("nf4_quantize", "large", (*ALL, *HERE), 64, 0, 4, why)
    # The narrowest class that holds a row.
    why = "with 32 numbers per thread, bytes are stored 128 bits at a time; 64 registers let half a GPU's threads run"
    for width in WIDTHS:
        yield from row("row_quantize", str(width), (*ALL, *HERE), 0, width, width // 1024, why)
    yield from row(
        "row_quantize", "wider", (*ALL, *HERE), 0, 8192, 8, "a piece of the row at a time; each is read twice"
    )


SHIPPED: Mapping[Key, Choice] = {
    key: choice for rows in (_linear_layers, _products, _steps, _storage) for key, choice in rows()
}
