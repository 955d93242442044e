"""`fluxq bench steps` and `compare`: rows of the real training step on any machine, and results side by side."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from fluxq.bench import steps as bench_steps
from fluxq.bench import timed_step
from fluxq.bench.compare import ANCHORS, AXES
from fluxq.bench.random_model import random_flux
from fluxq.bench.steps import KIND, SlowBus, hold_to, line_of, on_slower_bus, row_of, settings
from fluxq.bench.timed_step import Setting, clock_steps, costs_of, ideal_seconds, rates, trainer
from fluxq.bench.timing import milliseconds
from fluxq.cli.main import main
from fluxq.errors import WrongRequest
from fluxq.kernels import FORMATS, dequantize
from fluxq.model import FluxConfig
from fluxq.model.linear import Linear
from fluxq.offload import HostInputs
from fluxq.offload.costs import Work
from fluxq.offload.gpus import GPUS
from fluxq.offload.streams import Immediate

CPU = torch.device("cpu")
TINY = Setting(resolution=32, t5_length=4, rank=2)
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU FLUX.1 dev is benched")


def run(*arguments: object):
    return CliRunner().invoke(main, ["bench", *map(str, arguments)])


@pytest.mark.slow
@on_cpu
def test_without_a_gpu_nano_is_measured_and_the_output_says_what_that_is_worth(tmp_path: Path):
    result = run("steps", "--json", "--steps", 3, "--resolution", 32, "--t5-length", 8, "--out", tmp_path / "a.json")
    assert result.exit_code == 0, result.stderr
    assert "nano" in result.stderr and "not how fast GPUs train" in result.stderr
    answer = json.loads(result.stdout)
    assert answer == json.loads((tmp_path / "a.json").read_text())
    (row,) = answer["rows"]
    assert row["ok"] and row["ms"]["runs"] == 3 and row["ms"]["p10"] <= row["ms"]["median"] <= row["ms"]["p90"]
    assert row["it_s"] == pytest.approx(1e3 / row["ms"]["median"]) and row["images_s"] == row["it_s"]
    assert row["t5_length"] == 8 and row["policies"] == {"keep_all": 4} and row["tflops"] > 0
    assert answer["about"]["model"] == "nano" and answer["about"]["optimizer"] == "adamw8bit"


@pytest.mark.slow
@on_cpu
def test_a_matrix_has_streamed_rows_and_its_results_can_be_compared(tmp_path: Path):
    small = ("--resolution", 32, "--t5-length", 4, "--rank", 2, "--steps", 3)
    assert run("steps", "--matrix", "quick", *small, "--out", tmp_path / "a.json").exit_code == 0
    assert run("steps", *small, "--out", tmp_path / "b.json").exit_code == 0
    result = run("compare", tmp_path / "a.json", tmp_path / "b.json", "--json", "--out", tmp_path / "x.png")
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout)
    assert len(answer["machines"]) == 2 and all(name.endswith(("[a]", "[b]")) for name in answer["machines"])
    assert sorted(len(line["machines"]) for line in answer["rows"]) == [1, 1, 1, 1, 2]
    assert any(line["resident_units"] == 0 for line in answer["rows"]) and {r["batch"] for r in answer["rows"]} == {
        1,
        4,
    }
    assert (
        all(anchor["source"].startswith("published") for anchor in answer["published"])
        and "published by others" in result.stderr
    )
    assert Image.open(tmp_path / "x.png").width > 800


def test_the_published_anchors_are_those_of_their_sources():
    found = {(a.trainer, a.gpu): a.images_s for a in ANCHORS}
    assert found["ai-toolkit", "A100"] == pytest.approx(4 * 0.348)
    assert found["ai-toolkit", "H100"] == pytest.approx(4 * 0.454)
    assert found["ai-toolkit", "L40S"] == 0.838 and found["ai-toolkit", "RTX 4090"] == 0.438
    assert 1 / found["ComfyUI-FluxTrainer", "RTX 4090"] == pytest.approx(2.42)
    assert 1 / found["HF QLoRA recipe", "RTX 4090"] == pytest.approx(0.88)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "cannot be read"),
        ("no json", "is not a result of fluxq bench steps"),
        ("[1]", "is not a result of fluxq bench steps"),
        ('{"predicted": true, "rows": []}', "is not a result of fluxq bench steps"),
        (
            '{"kind": "fluxq bench steps", "about": {"machine": "x", "model": "nano"}, "rows": [{"resolution": 1}]}',
            "is not a result",
        ),
        ('{"kind": "fluxq bench steps", "rows": []}', "is not a result"),
    ],
)
def test_a_file_that_is_not_a_result_is_one_sentence_and_exit_2(content, sentence, tmp_path):
    path = tmp_path / "some.json"
    if content is not None:
        path.write_text(content)
    result = run("compare", path)
    assert result.exit_code == 2 and "Traceback" not in result.output
    error = result.stderr.strip().splitlines()[-1]
    assert error.startswith("error: ") and sentence in error and "some.json" in error


@on_cpu
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--resolution", 100], "--resolution must be a multiple of 16, not 100"),
        (["--limit-vram", "12GiB"], "--limit-vram and --limit-bus need a CUDA GPU"),
        (["--limit-bus", "12GB/s"], "--limit-vram and --limit-bus need a CUDA GPU"),
        (["--limit-vram", "much"], "must be an amount of memory like 12GiB"),
        (["--blocks-to-swap", 9], "--blocks-to-swap must be 0 to 3, not 9"),
        (["--blocks-to-swap", 1, "--resident-units", 2], "set the same thing"),
    ],
)
def test_wrong_requests_are_one_sentence_and_exit_2(arguments, sentence):
    result = run("steps", *arguments)
    assert result.exit_code == 2 and sentence in result.stderr.strip().splitlines()[-1]


def test_out_of_memory_and_what_cannot_be_run_are_rows(monkeypatch):
    def fail(flux, setting, steps):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. And so on")

    monkeypatch.setattr(bench_steps, "measure_steps", fail)
    row = row_of(TINY, CPU, None, 3, None)
    assert row["out_of_memory"] == "CUDA out of memory" and "ms" not in row
    assert line_of(row).endswith("out of memory")
    row = row_of(replace(TINY, blocks_to_swap=30), CPU, None, 3, None)
    assert "must be 0 to 3, not 30" in row["not_run"] and "not run: " in line_of(row)


def test_matrices_are_fixed_lists_whose_fields_can_be_replaced():
    quick, full = settings("quick", {}, True), settings("full", {}, True)
    assert len(quick) == 7 and len(full) == 48 and len(set(full)) == 48
    assert {s.resident_units for s in full} == {None, 76, 38, 0}
    assert {s.t5_length for s in full} == {512} and {s.resolution for s in full} == {512, 768, 1024}
    assert {s.format for s in settings("full", {"format": "fp8"}, True)} == {"fp8"}
    assert {s.resident_units for s in settings("quick", {"blocks_to_swap": 18}, True)} == {None}
    assert settings(None, {"resolution": 768, "rank": None}, True) == [Setting(resolution=768)]
    with pytest.raises(WrongRequest, match="set the same thing"):
        settings("quick", {"blocks_to_swap": 1, "resident_units": 1}, True)


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_random_weights_have_real_magnitudes_and_can_be_streamed(format):
    whole = random_flux(FluxConfig.nano(), format, CPU, 2)
    for path, layer in whole.named_modules():
        if isinstance(layer, Linear):
            w = dequantize(layer.frozen, torch.float32)
            assert float(w.std()) * w.shape[1] ** 0.5 == pytest.approx(1, rel=0.05), path
    if format == "bf16":
        return
    streamed = random_flux(FluxConfig.nano(), format, CPU, 2, whole.blocks_units[0], 2)
    for flux in (whole, streamed):
        figures = clock_steps(trainer(flux, TINY), CPU, 1, 3)
        assert figures["ok"] and 0.1 < figures["loss"] < 100
    assert streamed.ring.copies > 0


def test_flops_of_a_step_are_counted_and_compared_with_measured_rates():
    """A GPU that multiplies bf16 at 100 and int8 at 200 TFLOP/s, at its peak for half of the step."""
    gpu = replace(GPUS["rtx4090"], bf16=100, int8=200, fp8=0)
    assert ideal_seconds(Work(bf16=1e12, int8=4e12, attention=2e12, attention_backward=1e12), gpu) == 0.06
    costs = costs_of(Setting(), FluxConfig.dev(), None)
    step = rates(costs, ["recompute"] * 57, 1000, gpu)
    tokens, weights, width = 1024 + 512, 113_246_208, 3072  # that a token meets in a block of either kind
    attention = 57 * 4 * tokens**2 * width
    kept = 2 * 2 * 57 * weights * tokens + 3.5 * attention
    replayed = 2 * (19 * 8 / 12 + 38 * 7 / 12) * weights * tokens + attention
    assert step["tflop"] == pytest.approx((kept + replayed) / 1e12, rel=0.015), "the rest is LoRA and modulation"
    assert step["tflops"] == pytest.approx(step["tflop"]) and step["share_of_peak"] == pytest.approx(
        step["tflop"] / 100
    )
    assert rates(costs, ["keep_all"] * 57, 1000, gpu)["tflop"] == pytest.approx(kept / 1e12, rel=0.015)


def test_one_clock_times_everything():
    assert milliseconds(lambda: None, CPU, 3) >= 0


@pytest.mark.slow
@pytest.mark.parametrize(("resident", "copies"), [(None, False), (0, True)])
def test_on_a_gpu_a_plan_places_the_weights_and_its_predictions_are_in_the_row(monkeypatch, resident, copies):
    """With nano's sizes on the CPU posing as a GPU."""
    monkeypatch.setattr(FluxConfig, "dev", FluxConfig.nano)
    setting = replace(TINY, policy="recompute", resident_units=resident, slots=2)
    row = row_of(setting, CPU, replace(GPUS["rtx4090"], name="imagined"), 3, None)
    assert row["ok"] and row["policies"] == {"recompute": 4}
    assert row["predicted_peak_gib"] > 0 and row["predicted_s"] > 0 and 0 < row["share_of_peak"] < 1
    assert row["streamed"] + row["resident"] == 6 and not row["offload"]
    assert (row["resident"], row["slots"]) == (0, 2) if copies else row["resident"] > 0
    assert "imagined" not in line_of(row) and f"{row['predicted_peak_gib']:.2f}" in line_of(row)
    refused = row_of(setting, CPU, GPUS["rtx4090"], 3, 1 << 20)
    assert "GiB" in refused["not_run"] and "ms" not in refused


@pytest.mark.slow
def test_a_plan_with_offload_stores_inputs_in_ram(monkeypatch):
    monkeypatch.setattr(FluxConfig, "dev", FluxConfig.nano)
    stored, store = [], HostInputs.store
    monkeypatch.setattr(HostInputs, "store", lambda self, tensors: stored.append(1) or store(self, tensors))
    pins = partial(bench_steps.Pins, offload=True)
    monkeypatch.setattr(bench_steps, "Pins", pins)
    row = row_of(replace(TINY, policy="recompute"), CPU, GPUS["rtx4090"], 3, None, 1.5)
    assert row["ok"] and row["offload"] and len(stored) == 4 * (3 + timed_step.WARM_UP)


def test_a_process_can_be_limited_to_a_part_of_the_gpu(monkeypatch):
    held = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=24 << 30))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda.memory, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch._C, "_cuda_setMemoryFraction", lambda *given: held.append(given), raising=False)
    for gib in (12, 48):
        hold_to(gib << 30, torch.device("cuda"))
    assert held == [(0.5, 0), (1.0, 0)]


def test_a_slower_bus_is_imitated_by_repeated_copies(monkeypatch):
    copied = []

    class Counting(Immediate):
        def copy(self, slot, source):
            copied.append(len(source))
            super().copy(slot, source)

    slow, source = SlowBus(Counting(), 2.5), torch.arange(100, dtype=torch.uint8)
    slot = torch.zeros(128, dtype=torch.uint8)
    slow.copy(slot, source)
    assert copied == [100, 100, 50] and torch.equal(slot[:100], source) and slow.copied() is None
    gpu, times = on_slower_bus(GPUS["rtx4090"], "10 GB/s")
    assert (gpu.bus_gb_s, times) == (10, 2.45)
    for text in ("fast", "0", "30GB/s"):
        with pytest.raises(WrongRequest, match=r"below this machine's 24.5 GB/s"):
            on_slower_bus(GPUS["rtx4090"], text)
    monkeypatch.setattr(FluxConfig, "dev", FluxConfig.nano)
    row = row_of(replace(TINY, resident_units=0), CPU, gpu, 3, None, times)
    assert row["ok"] and row["streamed"] == 6


def test_flux_and_nano_are_told_apart(tmp_path):
    row = dict.fromkeys(AXES[1:]) | dataclasses.asdict(TINY) | {"it_s": 1.0, "images_s": 1.0, "ms": {}}
    row |= {"peak_gib": 5.25, "predicted_launching_s": 0.25}
    for model in ("nano", "FLUX.1 dev, random weights"):
        about = {"machine": f"of {model}", "model": model}
        (tmp_path / f"{model[:4]}.json").write_text(json.dumps({"kind": KIND, "about": about, "rows": [row]}))
    result = run("compare", *tmp_path.glob("*.json"), "--json", "--out", tmp_path / "x.png")
    answer = json.loads(result.stdout)
    assert [len(line["machines"]) for line in answer["rows"]] == [1, 1]
    assert "1.000 (5.2 GiB, Python 0.25 s)" in result.stderr
    assert "nano, 32 px" in result.stderr


def test_a_result_with_former_keys_is_compared(tmp_path):
    row = dict.fromkeys(AXES[1:]) | dataclasses.asdict(TINY) | {"it_s": 1.0, "images_s": 1.0, "ms": {}}
    old = {{"resolution": "size", "images_s": "pictures_s"}.get(key, key): value for key, value in row.items()}
    for name, one in (("new", row), ("old", old)):
        about = {"machine": name, "model": "nano"}
        (tmp_path / f"{name}.json").write_text(json.dumps({"kind": KIND, "about": about, "rows": [one]}))
    result = run("compare", *tmp_path.glob("*.json"), "--json")
    assert [sorted(line["machines"]) for line in json.loads(result.stdout)["rows"]] == [["new", "old"]]


def test_energy_comes_from_the_gpus_counter_if_it_has_one(monkeypatch):
    """With an NVML that counts 2,000 millijoules a call."""
    assert timed_step.energy_counter(CPU)() is None
    asked, gpu = [], torch.device("cuda")

    class Nvml:
        def nvmlInit_v2(self):
            return 0

        def nvmlDeviceGetHandleByUUID(self, uuid, handle):
            asked.append(uuid)
            return 0

        def nvmlDeviceGetTotalEnergyConsumption(self, handle, millijoules):
            millijoules._obj.value += 2000 * len(asked)
            return 0 if len(asked) < 2 else 3  # not supported

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1-2"))
    monkeypatch.setattr(timed_step.ctypes, "CDLL", lambda name: Nvml())
    assert timed_step.energy_counter(gpu)() == 2 and asked == [b"GPU-1-2"]
    assert timed_step.energy_counter(gpu)() is None
    monkeypatch.setattr(timed_step.ctypes, "CDLL", lambda name: (_ for _ in ()).throw(OSError("no such library")))
    assert timed_step.energy_counter(gpu)() is None
