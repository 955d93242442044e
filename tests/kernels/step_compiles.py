"""Counts what a card would compile of the memory-bound steps over a training's picture sizes and ranks, without a card.

    python tests/kernels/step_compiles.py

Triton works out from the arguments of a launch under which key it would look for the compiled kernel; keys are counted,
and nothing is compiled or run. Prints {launch and kernel: keys} as JSON.
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

from fluxq.kernels import Wants
from fluxq.kernels import triton as ops

CARD = 89
RANKS = (4, 16, 32, 100)
TEXT, WIDTH, HEADS = 512, 3072, 24
SIZES = [(32 + 2 * i, 72 - 2 * i) for i in range(19)] + [(33, 71)]  # in tokens; the last makes odd lengths


def bf16(*shape: int) -> Tensor:
    """Memory that nobody touches."""
    return torch.empty(shape, dtype=torch.bfloat16)


def steps(length: int, rank: int) -> dict[str, Callable[[], object]]:
    """Each op as a block of FLUX calls it."""
    room = -(-rank // 32) * 32
    x, wide, h = bf16(1, length, WIDTH), bf16(1, length, WIDTH + room), bf16(1, length, 4 * WIDTH)
    shift, scale, gate = bf16(1, 6 * WIDTH)[:, None].chunk(6, -1)[:3]
    eight = Wants(dtype=torch.int8, down=bf16(rank, WIDTH))
    both = Wants(dtype=torch.int8, down=bf16(rank, 5 * WIDTH))
    streams = [(bf16(1, n, 3 * WIDTH), bf16(128), bf16(128)) for n in (TEXT, length - TEXT)]
    cos = torch.empty(1, 1, length, 64)
    q = bf16(1, length, HEADS, 128).transpose(1, 2)
    rstd, pairs, lengths = torch.empty(2, 1, length, HEADS), [s[1:] for s in streams], [TEXT, length - TEXT]
    dboth = bf16(1, length, 5 * WIDTH + room)[..., WIDTH : 5 * WIDTH]
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
    for width, height in SIZES:
        for rank in RANKS:
            for launching, launch in steps(TEXT + width * height, rank).items():  # noqa: B007  (read by `remember`)
                launch()
    return {name: len(found) for name, found in keys.items()}


if __name__ == "__main__":
    print(json.dumps(count()))
