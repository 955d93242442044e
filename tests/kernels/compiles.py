"""Counts what a GPU would compile over a training's image sizes and ranks, without a GPU.

    python tests/kernels/compiles.py

Each of LAUNCHES calls an op at one layer shape in one dtype. Triton works out from the arguments under which key it
would look for the compiled kernel; keys are counted, and nothing is compiled or run. Prints {kernel: keys} as JSON. A
whole small FLUX calls most kernels for several layer shapes; what counts there is by how many times one image's keys
grow. An author of a kernel adds a launch of it; kernels in several formats are told apart by the launch's name.
"""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import triton
from helpers import randomize, tiny_config
from torch import Tensor
from triton.backends.compiler import GPUTarget

from fluxq.kernels import Wants, backend, dequantize, quantize
from fluxq.kernels import triton as ops
from fluxq.kernels.triton import matmul, table
from fluxq.kernels.triton.matmul_8bit import matmul_8bit
from fluxq.model import Flux, add_lora
from fluxq.model.embed import image_ids, text_ids
from fluxq.model.linear import Linear

GPU = 89
RANKS = (4, 16, 32, 100)
TEXT = 512
N, K = 768, 3072
HEADS = 24
SIZES = [  # the 20 buckets between 1:2 and 2:1 that a set of mixed images around 768 x 768 falls into
    *((544, 1088), (560, 1056), (576, 1024), (592, 992), (608, 960), (640, 928), (656, 896), (672, 880), (704, 832)),
    *((736, 800), (768, 768), (800, 736), (832, 704), (880, 672), (896, 656), (928, 640), (960, 608), (1024, 576)),
    *((1056, 560), (1088, 544)),
]

Launch = Callable[[int, int], object]
"""Called with the rows of the input and the rank of the LoRA."""


def fused(format: str, shape: str = "large") -> Launch:
    weight = quantize(torch.randn(N, K), format)
    weight = weight.bfloat16() if format == "bf16" else weight
    tiles = table.SHIPPED[f"lora_linear_{format}", GPU, shape]

    def launch(rows: int, rank: int) -> None:
        # With padding behind the rows of the input, and without.
        for padding in (0, ops.padding(rank)):
            x = torch.empty(rows if shape == "large" else rows % 64 + 1, K + padding, dtype=torch.bfloat16)
            s, up = x[:, :rank].contiguous(), torch.empty(N, rank, dtype=torch.bfloat16)
            matmul.linear(x[:, :K], weight, up[:, 0].contiguous(), s, up, tiles)

    return launch


def few_rows(format: str) -> Launch:
    """The gradient of an input of up to 64 rows."""
    weight = quantize(torch.randn(N, K), format)

    def launch(rows: int, rank: int) -> None:
        x, dy = bf16(rows % 64 + 1, K), bf16(rows % 64 + 1, N)
        ops.lora_linear_backward(dy, weight, x, bf16(len(x), rank), bf16(rank, K), bf16(N, rank), 1.0)

    return launch


def eight_bits(dtype: torch.dtype) -> Launch:
    """The forward product; that of the gradient, without scales of columns and bias, is another layer's."""
    b, scale, bias = torch.empty(N, K).to(dtype), torch.empty(N), torch.empty(N, dtype=torch.bfloat16)

    def launch(rows: int, rank: int) -> None:
        a = torch.empty(rows, K, dtype=torch.uint8).view(dtype)
        s, up = torch.empty(rows, rank), torch.empty(N, rank)
        matmul_8bit(a, torch.empty(rows), b, scale, torch.bfloat16, s, up, bias)

    return launch


def flux(policy: str, compute: str) -> Launch:
    """Forward and backward of a small FLUX in NF4, with an eighth of the tokens."""

    @cache
    def model(rank: int) -> Flux:
        made = randomize(Flux(tiny_config(depth=1, depth_single_blocks=1)))
        add_lora(made, rank=rank, alpha=rank, targets="all")
        for module in made.modules():
            if isinstance(module, Linear):
                module.store(quantize(module.weight, "nf4" if module.in_features % 64 == 0 else "bf16"))
        made.set_policy(policy)
        made.set_compute(compute)
        return made

    def launch(rows: int, rank: int) -> None:
        made, tokens = model(rank), (rows - TEXT) // 8
        img, txt, vec = bf16(1, tokens, 16), bf16(1, TEXT // 8, 40), bf16(1, 24)
        ids = image_ids(1, tokens), text_ids(TEXT // 8)
        with backend("triton"):
            out = made(img, ids[0], txt, ids[1], torch.ones(1), vec, torch.ones(1))
            torch.autograd.grad(out, list(made.parameters()), torch.ones_like(out))

    return launch


def rows_in_8_bits(format: str) -> Launch:
    """A weight into rows, and a gradient whose columns are multiplied by their scales."""
    weight = quantize(torch.randn(N, K), format)

    def launch(rows: int, rank: int) -> None:
        _, scale = ops.to_rows(weight, torch.int8, transposed=True)
        ops.row_quantize(bf16(rows, N), torch.int8, scale)

    return launch


def rotated_rows(rows: int, rank: int) -> None:
    """An input into rotated rows, and its gradient back."""
    ops.row_quantize(bf16(rows, K), torch.int8, rotation=256)
    ops.rotate(bf16(rows, K), 256)


def hidden_rows(rows: int, rank: int) -> None:
    """The hidden layer into int8 rows and back, as keep_all8 keeps it."""
    values, scale = ops.row_quantize(bf16(rows, 4 * K), torch.int8)
    ops.row_dequantize(values, scale, torch.bfloat16)


def decoded(format: str) -> Launch:
    """A weight into the scratch beside LoRAs of several ranks."""
    weight = quantize(torch.randn(N, K), format)

    def launch(rows: int, rank: int) -> None:
        dequantize(weight, torch.bfloat16)
        ops.dequantize(weight, torch.bfloat16, bf16(N, K + ops.padding(rank))[:, :K])

    return launch


def bf16(*shape: int) -> Tensor:
    """Memory that nobody touches."""
    return torch.empty(shape, dtype=torch.bfloat16)


def steps(length: int, rank: int) -> dict[str, Callable[[], object]]:
    """Each memory-bound step, as a block of FLUX calls it."""
    padding = ops.padding(rank)
    x, wide, h = bf16(1, length, K), bf16(1, length, K + padding), bf16(1, length, 4 * K)
    shift, scale, gate = bf16(1, 6 * K)[:, None].chunk(6, -1)[:3]
    eight = Wants(dtype=torch.int8, down=bf16(rank, K))
    both = Wants(dtype=torch.int8, down=bf16(rank, 5 * K))
    rotated = Wants(dtype=torch.int8, rotation=256)
    streams = [(bf16(1, n, 3 * K), bf16(128), bf16(128)) for n in (TEXT, length - TEXT)]
    cos = torch.empty(1, 1, length, 64)
    q = bf16(1, length, HEADS, 128).transpose(1, 2)
    rstd, pairs, lengths = torch.empty(2, 1, length, HEADS), [s[1:] for s in streams], [TEXT, length - TEXT]
    dboth = bf16(1, length, 5 * K + padding)[..., K : 5 * K]
    return {
        "modulate": lambda: ops.modulate(x, shift, scale, Wants(padding=padding)),
        "modulate, 8 bits": lambda: ops.modulate(x, shift, scale, eight),
        "modulate, rotated": lambda: ops.modulate(x, shift, scale, rotated),
        "modulate_backward": lambda: ops.modulate_backward(wide, x, scale, False),
        "gated_add": lambda: ops.gated_add(x, gate, x),
        "gated_add_backward": lambda: ops.gated_add_backward(x, gate, None),
        "gated_add_modulate": lambda: ops.gated_add_modulate(x, gate, x, shift, scale, Wants(padding=padding)),
        "gated_add_modulate, 8 bits": lambda: ops.gated_add_modulate(x, gate, x, shift, scale, eight),
        "gated_add_modulate_backward": lambda: ops.gated_add_modulate_backward(x, wide, x, gate, None, scale, False),
        "qk_norm_rope": lambda: ops.qk_norm_rope(streams, cos, cos),
        "qk_norm_rope_backward": lambda: ops.qk_norm_rope_backward(q, q, q, q, q, rstd, pairs, lengths, cos, cos, None),
        "gelu_tanh": lambda: ops.gelu_tanh(h, None, Wants(padding=padding)),
        "gelu_tanh, beside": lambda: ops.gelu_tanh(h, x, Wants(padding=padding)),
        "gelu_tanh, 8 bits": lambda: ops.gelu_tanh(h, x, both),
        "gelu_tanh, rotated": lambda: ops.gelu_tanh(h, x, rotated),
        "gelu_tanh_backward": lambda: ops.gelu_tanh_backward(dboth, h),
    }


LAUNCHES: dict[str, Callable[[], Launch]] = {
    "linear, nf4": lambda: fused("nf4"),
    "linear, fp8": lambda: fused("fp8"),
    "linear, int8": lambda: fused("int8"),
    "linear, bf16": lambda: fused("bf16"),
    "linear, nf4, few rows": lambda: fused("nf4", "few"),
    "linear, int8, few rows": lambda: fused("int8", "few"),
    "few rows back, nf4": lambda: few_rows("nf4"),
    "few rows back, fp8": lambda: few_rows("fp8"),
    "matmul, int8": lambda: eight_bits(torch.int8),
    "matmul, fp8": lambda: eight_bits(torch.float8_e4m3fn),
    "rows, from nf4": lambda: rows_in_8_bits("nf4"),
    "rows, from int8": lambda: rows_in_8_bits("int8"),
    "rows, rotated": lambda: rotated_rows,
    "rows, kept": lambda: hidden_rows,
    "decoded, nf4": lambda: decoded("nf4"),
    "decoded, fp8": lambda: decoded("fp8"),
    "flux, recompute in bf16": lambda: flux("recompute", "bf16"),
    "flux, keep_all8 in int8_dx": lambda: flux("keep_all8", "int8_dx"),
    "flux, keep_all8 in fp8": lambda: flux("keep_all8", "fp8"),
    **{name: lambda name=name: lambda rows, rank: steps(rows, rank)[name]() for name in steps(TEXT + 1, 1)},
}


class NoGPU:
    """Triton's driver for a GPU that is not there."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", GPU, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def count() -> dict[str, int]:
    """How many keys each kernel of each launch has over all sizes and ranks, for each that it has for one of them."""
    keys: dict[str, dict[tuple[int, int], set[str]]] = defaultdict(lambda: defaultdict(set))
    launching, case = "", (0, 0)

    def remember(*, key: str, fn, **_) -> bool:
        keys[f"{launching}: {fn.name}"][case].add(str(key))
        return True  # it is taken as compiled, and the launch ends here

    triton.runtime.driver.set_active(NoGPU())
    triton.knobs.runtime.jit_cache_hook = remember
    table.generation = lambda device: GPU
    for launching, make in LAUNCHES.items():  # noqa: B007  (read by `remember`)
        launch = make()
        for width, height in SIZES:
            for rank in RANKS:
                case = TEXT + width * height // 256, rank  # (read by `remember`)
                launch(*case)
    return {name: growth(name, found) for name, found in keys.items()}


def growth(name: str, found: dict[tuple[int, int], set[str]]) -> int:
    together = len(set().union(*found.values()))
    return -(-together // max(map(len, found.values()))) if name.startswith("flux") else together


if __name__ == "__main__":
    print(json.dumps(count()))
