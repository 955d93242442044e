"""The parts of `make gpu` run from end to end, tiny and on the CPU, and write their rows."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest

from benchmarks import cases
from benchmarks.kernel_rows.setting import LAYERS
from fluxq.kernels import COMPUTES, POLICIES

ROOT = Path(__file__).parent.parent.parent

pytestmark = pytest.mark.slow


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a part and returns its rows by name. processes: as `make gpu` starts it; else all of it in this process."""

    def start(module, *options, processes=False):
        options = ["--device=cpu", "--tiny", f"--out={tmp_path}", *options]
        if processes:
            command = [sys.executable, "-m", f"benchmarks.{module}", *options]
            done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
            assert done.returncode == 0, done.stdout + done.stderr
        else:
            part = importlib.import_module(f"benchmarks.{module}")
            monkeypatch.setattr(part, "T5_LENGTH", 32, raising=False)
            monkeypatch.setattr(cases, "subprocess", SimpleNamespace(Popen=partial(InThisProcess, part.main, options)))
            assert exit_code(part.main, options) == 0
        (path,) = tmp_path.glob("*.json")
        report = json.loads(path.read_text())
        assert {"gpu", "torch", "packages", "commit", "date"} <= set(report["about"])
        assert report["summary"]["failed"] == 0
        return {row["case"]: row for row in report["rows"]}

    return start


class InThisProcess:
    """Stands for the process of a part's worker. The last two arguments of its command are the worker's own."""

    def __init__(self, main, options, command):
        self.returncode = exit_code(main, [*options, *command[-2:]])

    def wait(self, seconds):
        pass


def exit_code(main, options):
    with patch.object(sys, "argv", ["a part", *options]), pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def test_kernels_are_checked_and_timed_against_their_targets(run):
    rows = run("kernels", "--only=steps|8 bits|(storage|linear|errors).* mlp.0")
    assert {name.split(":")[0] for name in rows} == {"steps", "storage", "linear", "8 bits", "errors"}
    assert sum(name.startswith("8 bits") for name in rows) == len(LAYERS) * 4
    for name, row in rows.items():
        assert row["ok"] and row["errors"], name
        if name.startswith("errors"):
            continue
        assert {"median", "p10", "p90"} <= set(next(iter(row["ms"].values()))), name
        assert row["predicted_ms"] > 0, name
    for name in ("steps: modulate, M 136", "storage: nf4 -> int8, transposed, mlp.0"):
        assert rows[name]["bytes"] > 0 and {"ours", "clone", "plain"} == set(rows[name]["ms"])
        assert [t["wanted"] for t in rows[name]["targets"]] == [">= 0.8"]
    linear = rows["linear: bf16 over nf4, mlp.0, M 136"]
    assert [t["wanted"] for t in linear["targets"]][:2] == ["<= 1.08", "<= 1.08"]
    assert len(linear["targets"]) == 3 or linear["not_run"], "bitsandbytes and peft, or why not"
    (hopper,) = rows["8 bits: int8_dx, mlp.0, M 136"]["targets"]
    assert hopper["wanted"] == ">= 1.4" and hopper["met"] is None


def test_bytes_of_a_memory_bound_step_are_what_it_reads_and_writes(run):
    rows = run(
        "kernels", "--only=steps: (modulate|gelu_tanh.* beside), M|storage: (nf4 -> bf16|int8 -> int8)", processes=True
    )
    m, d = 136, 128
    assert rows["steps: modulate, M 136"]["bytes"] == 2 * (2 * m * d + 2 * d)
    assert rows["steps: gelu_tanh, attention beside, M 136"]["bytes"] == 2 * 2 * 5 * m * d
    assert rows["storage: nf4 -> bf16, mlp.0"]["bytes"] == 4 * d * d * (2 + 1 / 2 + 4 / 64)
    assert rows["storage: int8 -> int8, transposed, mlp.0"]["bytes"] == 2 * 4 * d * d


def test_blocks_are_right_under_every_policy_and_compute(run):
    """Every policy in bf16 and, for the single block, every compute; the reference and diffusers' block beside them."""
    rows = run("blocks", "--only=bf16|eager$|single.*recompute$")
    alone = [name for name in rows if "diffusers" not in name]
    assert len(alone) == 2 * (len(POLICIES) + 2) + len(COMPUTES) - 1
    for name in alone:
        row = rows[name]
        assert row["ok"] and set(row["errors"]) == {"output", "d_input", "d_lora"} and row["bound_ms"] > 0, name
    eager = rows["blocks: double, M 150, against diffusers, eager"]
    if "skipped" not in eager:
        assert eager["ok"] and [t["wanted"] for t in eager["targets"]] == [">= 2", ">= 2"]
        assert set(eager["errors_of_diffusers"]) == {"output", "d_input"}


def test_steps_follow_the_command_line(run):
    options = ["--sizes=64", "--steps=1", "--format", "nf4", "int8", "--compute=int8", "--policy=keep_qkv"]
    rows = run("gpu", *options, "--vram=12GiB", "--seconds=1")
    ours = [f"steps: 64 px, {format}, int8, keep_qkv" for format in ("nf4", "int8")]
    assert list(rows) == [*ours, "steps: 64 px, published QLoRA recipe"]
    for name in ours:
        row = rows[name]
        assert row["ms"]["step"]["runs"] == 1 and row["loss"] > 0 and row["bound_ms"] > 0
        assert row["predicted_peak_bytes"] > 0
    recipe = rows["steps: 64 px, published QLoRA recipe"]
    if "skipped" not in recipe:
        assert recipe["ok"] and [(t["wanted"], t["met"]) for t in recipe["targets"]] == [(">= 2", None)]


def test_planned_steps_come_first_and_are_compared_with_the_recipe(run):
    rows = run("gpu", "--sizes=64", "--steps=1", "--compute=bf16", "--policy", "planned", "recompute", "--seconds=1")
    planned, recipe, resident = rows
    assert planned == "steps: 64 px, nf4, bf16, planned" and "recipe" in recipe and resident.endswith("recompute")
    assert rows[planned]["plan"]["resident"] > 0 and rows[planned]["loss"] > 0
    assert rows[planned]["predicted_peak_bytes"] > 0
    assert "skipped" in rows[recipe] or [t["wanted"] for t in rows[recipe]["targets"]] == [">= 1.5"]


def test_streaming_changes_no_loss_and_is_compared_with_all_resident(run):
    rows = run("streaming", "--compute=bf16")
    resident, streamed = rows.values()
    assert resident["plan"]["streamed"] == 0 and streamed["plan"]["streamed"] == 2
    assert streamed["loss"] == resident["loss"]
    assert [t["what"] for t in streamed["targets"]] == ["speed over all resident"]


def test_peaks_are_those_of_plans_for_other_gpus(run):
    for name, row in run("peaks").items():
        assert name.endswith("planned for 12 GiB")
        assert row["ok"] and row["predicted_peak_bytes"] > 0 and sum(row["plan"]["policies"].values()) == 2


def test_cpu_time_is_measured_in_steps(run):
    rows = run("host")
    assert len(rows) == 4 and [row["plan"]["streamed"] for row in rows.values()] == [0, 0, 3, 0]
    assert all(row["ok"] and row["ms"]["step"]["median"] > 0 for row in rows.values())


def test_tests_are_counted_file_by_file(run, tmp_path):
    passing, skipped = tmp_path / "test_passing.py", tmp_path / "test_skipped.py"
    passing.write_text("import pytest\n\n@pytest.mark.parametrize('n', range(6))\ndef test_n(n): ...\n")
    skipped.write_text("import pytest\n\npytest.skip('needs a CUDA GPU', allow_module_level=True)\n")
    rows = run("gpu_tests", "--jobs=2", str(passing), str(skipped))
    assert rows[f"tests: {passing}"]["passed"] == 6
    assert rows[f"tests: {skipped}"]["skipped"] == "needs a CUDA GPU"
