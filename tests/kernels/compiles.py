"""Counts what a card would compile over a training's picture sizes and ranks, without a card.

    python tests/kernels/compiles.py

Each of LAUNCHES calls an op at one layer shape in one dtype. Triton works out from the arguments under which key it
would look for the compiled kernel; keys are counted, and nothing is compiled or run. Prints {kernel: keys} as JSON.
An author of a kernel adds a launch of it; kernels in several formats are told apart by the launch's name.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from fluxq.kernels import Wants, quantize
from fluxq.kernels import triton as ops
from fluxq.kernels.triton import matmul, table
from fluxq.kernels.triton.matmul_8bit import matmul_8bit

CARD = 89
RANKS = (4, 16, 32, 100)
TEXT = 512
N, K = 768, 3072
HEADS = 24
SIZES = [  # the 20 buckets between 1:2 and 2:1 that a set of mixed pictures around 768 x 768 falls into
    *((544, 1088), (560, 1056), (576, 1024), (592, 992), (608, 960), (640, 928), (656, 896), (672, 880), (704, 832)),
    *((736, 800), (768, 768), (800, 736), (832, 704), (880, 672), (896, 656), (928, 640), (960, 608), (1024, 576)),
    *((1056, 560), (1088, 544)),
]

Launch = Callable[[int, int], object]
"""Called with the rows of the input and the rank of the LoRA."""


def fused(format: str, shape: str = "large") -> Launch:
    weight = quantize(torch.randn(N, K), format)
    weight = weight.bfloat16() if format == "bf16" else weight
    tiles = table.SHIPPED[f"lora_linear_{format}", CARD, shape]

    def launch(rows: int, rank: int) -> None:
        # As where the layer's input has room, and where it has not.
        for room in (0, ops.room(rank)):
            x = torch.empty(rows if shape == "large" else rows % 64 + 1, K + room, dtype=torch.bfloat16)
            s, up = x[:, :rank].contiguous(), torch.empty(N, rank, dtype=torch.bfloat16)
            matmul.linear(x[:, :K], weight, up[:, 0].contiguous(), s, up, tiles)

    return launch


def eight_bits(dtype: torch.dtype) -> Launch:
    """The forward product; that of the gradient, without scales of columns and bias, is another layer's."""
    b, scale, bias = torch.empty(N, K).to(dtype), torch.empty(N), torch.empty(N, dtype=torch.bfloat16)

    def launch(rows: int, rank: int) -> None:
        a = torch.empty(rows, K, dtype=torch.uint8).view(dtype)
        s, up = torch.empty(rows, rank), torch.empty(N, rank)
        matmul_8bit(a, torch.empty(rows), b, scale, torch.bfloat16, s, up, bias)

    return launch


def bf16(*shape: int) -> Tensor:
    """Memory that nobody touches."""
    return torch.empty(shape, dtype=torch.bfloat16)


def steps(length: int, rank: int) -> dict[str, Callable[[], object]]:
    """Each memory-bound step, as a block of FLUX calls it."""
    room = ops.room(rank)
    x, wide, h = bf16(1, length, K), bf16(1, length, K + room), bf16(1, length, 4 * K)
    shift, scale, gate = bf16(1, 6 * K)[:, None].chunk(6, -1)[:3]
    eight = Wants(dtype=torch.int8, down=bf16(rank, K))
    both = Wants(dtype=torch.int8, down=bf16(rank, 5 * K))
    streams = [(bf16(1, n, 3 * K), bf16(128), bf16(128)) for n in (TEXT, length - TEXT)]
    cos = torch.empty(1, 1, length, 64)
    q = bf16(1, length, HEADS, 128).transpose(1, 2)
    rstd, pairs, lengths = torch.empty(2, 1, length, HEADS), [s[1:] for s in streams], [TEXT, length - TEXT]
    dboth = bf16(1, length, 5 * K + room)[..., K : 5 * K]
    return {
        "modulate": lambda: ops.modulate(x, shift, scale, Wants(room=room)),
        "modulate, 8 bits": lambda: ops.modulate(x, shift, scale, eight),
        "modulate_backward": lambda: ops.modulate_backward(wide, x, scale, False),
        "gated_add": lambda: ops.gated_add(x, gate, x),
        "gated_add_backward": lambda: ops.gated_add_backward(x, gate, None),
        "gated_add_modulate": lambda: ops.gated_add_modulate(x, gate, x, shift, scale, Wants(room=room)),
        "gated_add_modulate, 8 bits": lambda: ops.gated_add_modulate(x, gate, x, shift, scale, eight),
        "gated_add_modulate_backward": lambda: ops.gated_add_modulate_backward(x, wide, x, gate, None, scale, False),
        "qk_norm_rope": lambda: ops.qk_norm_rope(streams, cos, cos),
        "qk_norm_rope_backward": lambda: ops.qk_norm_rope_backward(q, q, q, q, q, rstd, pairs, lengths, cos, cos, None),
        "gelu_tanh": lambda: ops.gelu_tanh(h, None, Wants(room=room)),
        "gelu_tanh, beside": lambda: ops.gelu_tanh(h, x, Wants(room=room)),
        "gelu_tanh, 8 bits": lambda: ops.gelu_tanh(h, x, both),
        "gelu_tanh_backward": lambda: ops.gelu_tanh_backward(dboth, h),
    }


LAUNCHES: dict[str, Callable[[], Launch]] = {
    "linear, nf4": lambda: fused("nf4"),
    "linear, fp8": lambda: fused("fp8"),
    "linear, int8": lambda: fused("int8"),
    "linear, bf16": lambda: fused("bf16"),
    "linear, nf4, few rows": lambda: fused("nf4", "few"),
    "linear, int8, few rows": lambda: fused("int8", "few"),
    "matmul, int8": lambda: eight_bits(torch.int8),
    "matmul, fp8": lambda: eight_bits(torch.float8_e4m3fn),
    **{name: lambda name=name: lambda rows, rank: steps(rows, rank)[name]() for name in steps(TEXT + 1, 1)},
}


class NoCard:
    """Triton's driver for a card that is not there."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", CARD, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def count() -> dict[str, int]:
    """How many keys each kernel of each launch has over all sizes and ranks."""
    keys: dict[str, set[str]] = defaultdict(set)
    launching = ""

    def remember(*, key: str, fn, **_) -> bool:
        keys[f"{launching}: {fn.name}"].add(str(key))
        return True  # it is taken as compiled, and the launch ends here

    triton.runtime.driver.set_active(NoCard())
    triton.knobs.runtime.jit_cache_hook = remember
    table.generation = lambda device: CARD
    for launching, make in LAUNCHES.items():  # noqa: B007  (read by `remember`)
        launch = make()
        for width, height in SIZES:
            for rank in RANKS:
                launch(TEXT + width * height // 256, rank)
    return {name: len(found) for name, found in keys.items()}


if __name__ == "__main__":
    print(json.dumps(count()))
