"""The demo with frozen weights multiplied in 8 bits, both ways, from NF4: it ends where bf16 ends."""

from __future__ import annotations

import pytest
from test_demo import run_demo

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def demos(tmp_path_factory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("demo")
    return {compute: run_demo(folder / compute, "nf4", compute) for compute in ("bf16", "int8_dx", "fp8_dx")}


@pytest.mark.parametrize("compute", ["int8_dx", "fp8_dx"])
def test_eight_bits_both_ways_end_within_3_percent_of_bf16(compute, demos):
    """The loss of what is taught, and of ordinary pictures. Same seeds: only the arithmetic differs."""
    assert demos[compute]["concept_after"] <= 1.03 * demos["bf16"]["concept_after"]
    assert demos[compute]["ordinary_after"] <= 1.03 * demos["bf16"]["ordinary_after"]
