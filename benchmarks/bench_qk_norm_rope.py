"""Norm and RoPE of queries and keys, text and image joined, at FLUX.1's size: beside plain PyTorch and a copy.

pytest benchmarks/bench_qk_norm_rope.py
"""

from __future__ import annotations

from benchmarks.pytest_cases import measured, of_tokens
from fluxq.bench.kernel_steps import STEPS

NAMES = [name for name in STEPS if "qk" in name]
test_speed, test_share_of_a_copy = measured({name: of_tokens(STEPS[name]) for name in NAMES})
