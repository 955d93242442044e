"""GELU, also beside attention's output and in 8 bits, as FLUX.1's blocks use it: beside plain PyTorch and a copy.

pytest benchmarks/bench_gelu.py
"""

from __future__ import annotations

from benchmarks.pytest_cases import measured, of_tokens
from fluxq.bench.kernel_steps import STEPS

NAMES = [name for name in STEPS if "gelu" in name]
test_speed, test_share_of_a_copy = measured({name: of_tokens(STEPS[name]) for name in NAMES})
