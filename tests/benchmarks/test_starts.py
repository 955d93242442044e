"""The study of LoRA's variants: when a loss is reached, and which runs a table compares."""

from __future__ import annotations

import math

from benchmarks.starts import EVERY, SEEDS, VARIANTS, spread, steps_to, table


def test_a_loss_is_reached_between_two_measurements_in_proportion():
    assert steps_to([2.0, 1.5, 1.0], 1.25) == 1.5 * EVERY
    assert steps_to([2.0, 1.5, 1.6, 1.0], 1.5) == EVERY, "the first time counts"
    assert steps_to([2.0, 1.5], 1.0) == math.inf


def test_a_table_has_only_the_seeds_that_all_variants_have():
    runs = {
        f"{name}, seed {s}": {"validation": [2.0, 1.0], "start_cpu_seconds": 1.0}
        for name in VARIANTS
        for s in SEEDS[:2]
    }
    runs["plain, seed 2"] = {"validation": [2.0, 0.5], "start_cpu_seconds": 1.0}
    assert "| plain | 10 (10 to 10) | 1.0000 (1.0000 to 1.0000) |" in table(runs)
    assert len(table(runs).splitlines()) == 2 + len(VARIANTS)
    assert spread([1.0, math.inf, math.inf], ".0f") == "never (1 to never)"
