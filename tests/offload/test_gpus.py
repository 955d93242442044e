"""GPUs: what follows from the rates, and the measurement on this machine."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from fluxq.kernels import reference
from fluxq.offload import gpus
from fluxq.offload.costs import Work
from fluxq.offload.gpus import GPU, GPUS, MEASURED, Efficiency, measure


def test_seconds_match_a_manual_calculation():
    gpu = GPU("c", 0, bf16=10, int8=40, fp8=0, memory_gb_s=100, memory_gib=8, bus_gb_s=10)
    gpu = dataclasses.replace(gpu, efficiency=Efficiency(0.5, 0.25, 0.2, 0.1, 0.8))
    assert gpu.seconds(Work(bf16=5e12)) == pytest.approx(1)
    assert gpu.seconds(Work(int8=10e12)) == pytest.approx(1)
    assert gpu.seconds(Work(attention=2e12, attention_backward=1e12)) == pytest.approx(2)
    assert gpu.seconds(Work(moved=80e9) + Work(bf16=5e12)) == pytest.approx(2)
    assert gpu.seconds(Work(fp8=1)) == math.inf and gpu.vram == 8 * 2**30


def test_geforce_multiplies_int8_at_four_times_and_fp8_at_twice_the_rate():
    for name, gpu in GPUS.items():
        if name.startswith("rtx"):
            assert gpu.int8 == pytest.approx(4 * gpu.bf16, rel=0.01), name
            assert gpu.fp8 == (0 if gpu.capability < 89 else pytest.approx(2 * gpu.bf16, rel=0.02)), name


def test_measured_rates_are_saved(tmp_path):
    small = dict(device="cpu", shapes=((48, 64, 64), (80, 64, 64)), seconds=0.01, copied=1 << 16)
    (tmp_path / f"card-cpu-{torch.__version__.replace('.', '-').replace('+', '-')}.json").write_text("of before")
    gpu = measure(tmp_path, **small)
    assert gpu.word == "measured" and gpu.efficiency == MEASURED
    assert gpu.bf16 > 0 and gpu.int8 > 0 and gpu.memory_gb_s > 0 and gpu.bus_gb_s > 0 and gpu.fp8 == 0
    (saved,) = tmp_path.glob("gpu-cpu-*-v2.json")
    assert measure(tmp_path, **small) == gpu
    saved.write_text(json.dumps(json.loads(saved.read_text()) | {"bf16": 123.0}))
    assert measure(tmp_path, **small).bf16 == 123.0
    saved.write_text("{ half a fi")
    assert measure(tmp_path, **small).bf16 != 123.0


def test_the_products_measured_are_training_s_own_with_random_numbers(monkeypatch):
    """Constant numbers take less power; another kernel has another rate."""
    seen = []
    monkeypatch.setattr(reference, "matmul_8bit", lambda a, *rest: seen.append(a))
    products = gpus._products(((48, 64, 64), (80, 64, 64)), "cpu")
    seen.clear()
    products["int8"]()
    assert [tuple(a.shape) for a in seen] == [(48, 64), (80, 64)]
    assert all(len(a.unique()) > 50 and a.dtype == torch.int8 for a in seen)
    assert [m for m, *_ in gpus.SHAPES] == [1536, 4608], "the rows of 512 and 1024 pixels"


def test_a_read_only_folder_does_not_matter(tmp_path):
    (tmp_path / "file").touch()
    assert (
        measure(tmp_path / "file" / "sub", device="cpu", shapes=((48, 64, 64),), seconds=0.01, copied=1 << 16).bf16 > 0
    )
