"""GPUs: what follows from the rates, and the measurement on this machine."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from fluxq.kernels import reference
from fluxq.offload import gpus
from fluxq.offload.costs import Matmul, Work
from fluxq.offload.gpus import GPU, GPUS, MEASURED, Efficiency, filled, gpu_named, measure


def test_seconds_match_a_manual_calculation():
    gpu = GPU("c", 0, bf16=10, int8=40, fp8=0, memory_gb_s=100, memory_gib=8, bus_gb_s=10)
    gpu = dataclasses.replace(gpu, efficiency=Efficiency(0.5, 0.25, 0.2, 0.1, 0.8))
    assert gpu.seconds(Work(bf16=5e12)) == pytest.approx(1)
    assert gpu.seconds(Work(int8=10e12)) == pytest.approx(1)
    assert gpu.seconds(Work(attention=2e12, attention_backward=1e12)) == pytest.approx(2)
    assert gpu.seconds(Work(moved=80e9) + Work(bf16=5e12)) == pytest.approx(2)
    assert gpu.seconds(Work(fp8=1)) == math.inf and gpu.vram == 8 * 2**30
    half = Work(bf16=5e12, int8=10e12, products=(Matmul("bf16", 128, 5 * 128, 5e12),))
    assert dataclasses.replace(gpu, sms=10).seconds(half) == pytest.approx(2 + 1), "five multiprocessors wait"


@pytest.mark.parametrize(
    ("rows", "columns", "sms", "share"),
    [
        (1536, 9216, 28, 864 / (31 * 28)),  # q, k and v at 512 pixels on an RTX 3060: 864 tiles in 31 waves
        (1536, 9216, 128, 864 / (7 * 128)),
        (1536, 3072, 128, 288 / (3 * 128)),  # on an RTX 4090 the third wave is a quarter full
        (512, 3072, 128, 96 / 128),  # one wave, of text
        (4608, 12288, 132, 3456 / (27 * 132)),
        (4608, 3072, 170, 864 / (6 * 170)),
        (128, 128, 1, 1.0),
        (64, 130, 4, 64 * 130 / (2 * 128 * 128) * 2 / 4),  # tiles at the edge are computed whole
        (333, 1000, 0, 1.0),  # unknown
    ],
)
def test_a_product_waits_for_its_last_wave(rows, columns, sms, share):
    assert filled(rows, columns, sms) == pytest.approx(share)


def test_products_that_fill_whole_waves_lose_nothing_and_larger_ones_little():
    for sms in (24, 28, 68, 84, 128, 132, 170):
        assert filled(128 * sms, 128, sms) == filled(128, 256 * sms, sms) == 1
        assert filled(4608, 12288, sms) > 0.95 * filled(1536, 12288, sms) and filled(36864, 12288, sms) > 0.99


def test_geforce_multiplies_int8_at_four_times_and_fp8_at_twice_the_rate():
    for name, gpu in GPUS.items():
        if name.startswith("rtx"):
            assert gpu.int8 == pytest.approx(4 * gpu.bf16, rel=0.01), name
            assert gpu.fp8 == (0 if gpu.capability < 89 else pytest.approx(2 * gpu.bf16, rel=0.02)), name


@pytest.mark.parametrize(
    ("names", "gpu"),
    [
        (("3060", "RTX 3060", "rtx3060-12gb", "NVIDIA GeForce RTX 3060", "rtx_3060 12 GB", "3060-12GiB"), "rtx3060"),
        (("4060 Ti", "RTX 4060 Ti 16GB", "4060ti16gb"), "rtx4060ti"),
        (("NVIDIA GeForce RTX 4070 Ti SUPER",), "rtx4070tisuper"),
        (("A100", "NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe"), "a100"),
        (("NVIDIA H100 80GB HBM3", "h100"), "h100"),
    ],
)
def test_a_gpu_has_many_names(names, gpu):
    assert all(gpu_named(name) is GPUS[gpu] for name in (*names, gpu))


def test_other_gpus_and_memories_are_unknown():
    for name in ("2080", "RTX 3060 8GB", "a100-40gb", "RTX 4090 Laptop GPU", "rtx", "", "12gb", "30", "GTX 3060"):
        assert gpu_named(name) is None, name
    small, large = gpu_named("RTX 4060 Ti 8GB"), GPUS["rtx4060ti"]
    assert small and small == dataclasses.replace(large, name="rtx4060ti-8gb", memory_gib=8)


def test_measured_rates_are_saved(tmp_path):
    small = dict(device="cpu", shapes=((48, 64, 64), (80, 64, 64)), seconds=0.01, copied=1 << 16, width=64)
    (tmp_path / f"card-cpu-{torch.__version__.replace('.', '-').replace('+', '-')}.json").write_text("of before")
    gpu = measure(tmp_path, **small)
    assert gpu.word == "measured" and gpu.efficiency == MEASURED
    assert gpu.bf16 > 0 and gpu.int8 > 0 and gpu.memory_gb_s > 0 and gpu.bus_gb_s > 0 and gpu.fp8 == 0
    assert 1 < gpu.launch_us < 10_000, "Python takes its time"
    (saved,) = tmp_path.glob("gpu-cpu-*-v3.json")
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
    small = dict(device="cpu", shapes=((48, 64, 64),), seconds=0.01, copied=1 << 16, width=64)
    assert measure(tmp_path / "file" / "sub", **small).bf16 > 0
