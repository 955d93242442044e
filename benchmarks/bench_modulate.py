"""LayerNorm with shift and scale, and the gated sum before it, on rows of FLUX.1: beside plain PyTorch and a copy.

pytest benchmarks/bench_modulate.py
"""

from __future__ import annotations

from benchmarks.pytest_cases import measured, of_tokens
from fluxq.bench.kernel_steps import STEPS

NAMES = [name for name in STEPS if "modulate" in name or "gated" in name]
test_speed, test_share_of_a_copy = measured({name: of_tokens(STEPS[name]) for name in NAMES})
