"""Rows in 8 bits on the shapes of FLUX.1: activations, and weights of every stored form; beside plain PyTorch, a copy.

pytest benchmarks/bench_rows.py
"""

from __future__ import annotations

from benchmarks.pytest_cases import measured, of_tokens, of_weights
from fluxq.bench.kernel_steps import EIGHT_BITS, STORAGE, row_quantize

WIDTHS = (3072, 12288, 15360, 21504)
ACTIVATIONS = {
    f"{bits} rows of {width}{', rotated' * rotated}": of_tokens(
        lambda s, k=width, bits=bits, rotated=rotated: row_quantize(s, s.tokens, k, bits, rotated)
    )
    for width in WIDTHS
    for bits in EIGHT_BITS
    for rotated in (False, True)
}
WEIGHTS = {name: make for name, make in STORAGE.items() if not name.startswith("bf16") and "-> bf16" not in name}

test_speed, test_share_of_a_copy = measured(ACTIVATIONS)
test_speed_of_weights, test_share_of_a_copy_of_weights = of_weights(WEIGHTS, ["mlp_up"])
