"""`fluxq bench kernels`: rows on any machine; choices are measured, kept and used."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner

from fluxq.bench import kernel_cases
from fluxq.bench import kernels as bench
from fluxq.cli.main import main
from fluxq.errors import WrongRequest
from fluxq.kernels import backend
from fluxq.models import tuning


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(kernel_cases, "SMALL", replace(kernel_cases.SMALL, tokens=20, width=64, heads=2))


def test_every_op_is_checked_and_timed_on_any_machine(small):
    result = CliRunner().invoke(main, ["bench", "kernels", "--json"])
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout)
    ops = {(row["op"], row["shape_class"]) for row in answer["rows"]}
    assert {("lora_linear_nf4", "large"), ("lora_linear_nf4", "few"), ("matmul_int8", "large")} <= ops
    assert all(row["ms"] > 0 and row["ratio"] > 0 for row in answer["rows"]) and answer["tuned"] == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to tune")
def test_tuning_needs_a_gpu():
    result = CliRunner().invoke(main, ["bench", "kernels", "--tune"])
    assert result.exit_code == 2 and "--tune measures Triton kernels on a CUDA GPU" in result.stderr


def test_a_wrong_answer_is_not_timed(small):
    case = next(bench.cases(torch.device("cpu")))
    with pytest.raises(AssertionError, match="lora_linear_nf4 is off by"):
        bench.check(replace(case, run=lambda: case.run() * 1.1))


@pytest.mark.slow
def test_the_fastest_right_choice_is_kept_and_used(small, monkeypatch, tmp_path):
    """On an imaginary GPU, whose clock decides which of three choices is fast; the fastest gives wrong answers."""
    pytest.importorskip("triton")
    from fluxq.kernels.triton import table

    key = ("lora_linear_nf4", 89, "large")
    shipped = table.SHIPPED[key]
    slow, wrong, fast = (replace(shipped, chunk=chunk, word="measured") for chunk in (64, 128, 192))
    monkeypatch.setattr(table, "generation", lambda device: 89)
    monkeypatch.setattr(table, "candidates", lambda op, gpu, shape: [shipped, slow, wrong, fast])

    def clock(run, device, runs):
        used = table.choose("lora_linear_nf4", device, 65)
        return {64: 3.0, 128: 0.5, 192: 1.0}.get(used.chunk, 2.0)

    monkeypatch.setattr(bench, "milliseconds", clock)
    with backend("triton"):
        case = next(bench.cases(torch.device("cpu")))
        right = case.run

        def run():
            return right() * (2.0 if table.choose(case.op, torch.device("cpu"), 96).chunk == 128 else 1.0)

        assert bench.best_choice(replace(case, run=run), torch.device("cpu"), 1) == (key, fast)

    monkeypatch.setenv("FLUXQ_CACHE", str(tmp_path))
    path, said, gpu = tuning.tuned_file("NVIDIA GeForce RTX 4090"), [], torch.device("cuda")
    assert path == tmp_path / "kernels-nvidia-geforce-rtx-4090.json"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 4090")
    tuning.use_tuned(gpu, said.append)
    assert said == []
    table.write(path, {key: fast}, "NVIDIA GeForce RTX 4090")
    try:
        tuning.use_tuned(gpu, said.append)
        assert table.choose("lora_linear_nf4", gpu, 96) == fast and str(path) in said[0]
    finally:
        table.use_measured({})
    path.write_text("{}")
    with pytest.raises(WrongRequest, match="is not a table of kernel choices"):
        tuning.use_tuned(gpu, said.append)


def test_earlier_choices_are_kept_and_a_damaged_file_is_replaced(monkeypatch, tmp_path):
    pytest.importorskip("triton")
    from fluxq.kernels.triton import table

    monkeypatch.setenv("FLUXQ_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    key = ("lora_linear_nf4", 89, "large")
    rows = {key: replace(table.SHIPPED[key], chunk=64, word="measured")}
    try:
        assert bench.earlier_choices(torch.device("cuda")) == {}
        bench.keep(rows, "a GPU")
        assert bench.earlier_choices(torch.device("cuda")) == rows
        tuning.tuned_file("a GPU").write_text("{}")
        assert bench.earlier_choices(torch.device("cuda")) == {}
    finally:
        table.use_measured({})
