"""`fluxq profile`: a row for every block-swap setting, in the numbers that sd-scripts' users know, marked predicted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from fluxq.bench import measured as measured_row
from fluxq.bench import profile
from fluxq.bench.timed_step import Setting
from fluxq.cli.main import main
from fluxq.model import FluxConfig
from fluxq.offload.gpus import GIB, GPUS


def rows(*arguments: str) -> list[dict]:
    result = CliRunner().invoke(main, ["profile", "--json", *arguments])
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["predicted"] is True and "nothing here was measured" in result.stderr
    return answer["rows"]


@pytest.mark.slow
def test_every_setting_has_a_row_and_what_is_swapped_is_saved(tmp_path: Path):
    found = rows(
        "--gpu", "rtx4060ti", "--resolution", "512", "--resolution", "1024", "--format", "nf4", "--out", str(tmp_path)
    )
    assert [r["blocks_to_swap"] for r in found] == 2 * [0, 8, 16, 18, 22, 28, 35, 38]
    assert [r["resident_units"] for r in found] == 2 * [76, 60, 44, 40, 32, 20, 6, 0]
    for resolution in (512, 1024):
        own = [r for r in found if r["resolution"] == resolution]
        peaks = [r["peak_gib"] for r in own]
        assert peaks == sorted(peaks, reverse=True)
        assert own[-1]["gb_moved_per_step"] > own[0]["gb_moved_per_step"]
        for r in own:
            assert abs(sum(r["peak_gib_by_owner"].values()) - r["peak_gib"]) < 0.01
    for name in ("profile", "timeline"):
        assert Image.open(tmp_path / f"{name}_rtx4060ti.png").size == (800, 450)
    assert json.loads((tmp_path / "profile_rtx4060ti.json").read_text())["rows"] == found


@pytest.mark.slow
def test_a_fast_gpu_behind_a_slow_bus_is_bound_by_the_bus():
    stalls = {
        name: rows("--gpu", name, "--resolution", "512", "--format", "int8", "--compute", "int8")[-1]
        for name in ("rtx3060", "rtx4090")
    }
    assert stalls["rtx4090"]["bound_by"] == "bus" and stalls["rtx4090"]["stall"] > stalls["rtx3060"]["stall"]


def test_one_line_says_that_python_is_the_limit(monkeypatch, capsys):
    monkeypatch.setattr(profile, "SWAPS", (0,))
    base = Setting(policy="keep_all", slots=2)
    for us, bound in ((1.0, "compute"), (1000.0, "python")):
        gpu = replace(GPUS["rtx4090"], launch_us=us)
        (row,), _ = profile.rows_of(gpu, None, base, ["nf4"], [512], 0)
        assert row["bound_by"] == bound and row["launching_s"] == pytest.approx(1e-6 * us * row["launches"], abs=1e-4)
        assert ("wait for Python to launch their kernels" in "".join(capsys.readouterr())) == (bound == "python")


def test_an_unknown_gpu_lists_those_known():
    result = CliRunner().invoke(main, ["profile", "--gpu", "voodoo2"])
    assert result.exit_code == 2 and "rtx3060" in result.stderr


def test_measuring_needs_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    result = CliRunner().invoke(main, ["profile"])
    assert result.exit_code == 2 and "no CUDA GPU to measure; name one with --gpu: rtx3060" in result.stderr


@pytest.mark.slow
def test_measured_figures_stand_next_to_predicted_ones(monkeypatch, capsys):
    """Rows of nano on the CPU posing as a GPU, without its memory."""
    monkeypatch.setattr(FluxConfig, "dev", FluxConfig.nano)
    monkeypatch.setattr(profile, "SWAPS", (0, 1, 3))
    base = Setting(policy="recompute", rank=2, t5_length=4, slots=2)
    found, plans = profile.rows_of(GPUS["rtx4090"], torch.device("cpu"), base, ["nf4", "bf16"], [32], 3)
    assert [(r["format"], r["blocks_to_swap"]) for r in found] == [("nf4", 0), ("nf4", 1), ("nf4", 3), ("bf16", 0)]
    for row, made in zip(found, plans, strict=True):
        ran = row["measured"]
        assert ran["it_s"] > 0 and ran["ms"]["runs"] == 3 and "peak_gib" not in ran
        for owner in ("weights", "slots"):
            assert ran["peak_gib_by_owner"][owner] * GIB == pytest.approx(made.peak[owner], rel=1e-3, abs=512), owner
        assert ran["gb_s"] == pytest.approx(ran["gb_moved_per_step"] * ran["it_s"])
        assert ran["stall"] >= 0 and ran["bound_by"] in ("bus", "compute")
        line = profile.line_of(row)
        assert line.count("|") == 2 and f"{row['it_s']:.3f}" in line and f"{ran['it_s']:.3f}" in line
    assert found[0]["measured"]["gb_moved_per_step"] == 0, "modulation comes before the timed steps"
    streamed = found[2]["measured"]["gb_moved_per_step"]
    assert streamed == pytest.approx(2 * 4 * plans[2].peak["slots"] / 2 / 1e9, rel=0.2), "2 (S - R) copies"
    json.dumps(found)


def test_out_of_memory_is_a_row(monkeypatch):
    def fail(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. And so on")

    monkeypatch.setattr(measured_row, "clock_steps", fail)
    made = profile.planned(Setting(blocks_to_swap=38, policy="recompute", slots=2), GPUS["rtx3060"])
    nano = replace(made, resident=(), slots=0, policies=("recompute",) * 4)
    row = measured_row.measured_row(
        FluxConfig.nano(), Setting(resolution=32, t5_length=4), nano, torch.device("cpu"), 3
    )
    assert row == {"out_of_memory": "CUDA out of memory"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_is_profiled_and_bytes_are_as_predicted(tmp_path: Path):
    result = CliRunner().invoke(
        main, ["profile", "--json", "--format", "nf4", "--resolution", "512", "--steps", "3", "--out", str(tmp_path)]
    )
    assert result.exit_code == 0, result.stderr
    for row in json.loads(result.stdout)["rows"]:
        assert row["measured"]["peak_gib"] == pytest.approx(row["peak_gib"], rel=0.05)
