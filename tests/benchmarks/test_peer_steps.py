"""Steps of several programs in turns: who is compared with whom, and what the page says. No program is started."""

from __future__ import annotations

import argparse
import sys

import pytest

from benchmarks.peers import sd_scripts, steps, worker
from fluxq.bench.timed_step import Setting

STATUS = "Name:\tpython\nVmHWM:\t    2048 kB\nVmRSS:\t    1024 kB\n"
MIB = 1 << 20


@pytest.fixture
def rows(monkeypatch):
    """The rows of a run with sd-scripts, with steps that take 1, 2 and 3 times as long as fluxq's first."""
    monkeypatch.delenv("EMULATED_GPU_ORDER", raising=False)
    made = steps.rows_of(arguments(sd_scripts=steps.Path("nowhere")), 512)
    for row in made:
        slow = {"recipe": 2.0, "sd-scripts": 4.0}.get(row["program"], 1.0)
        row["steps"] = [dict.fromkeys(steps.PARTS, slow * ms) for ms in (10.0, 20.0, 30.0)]
        row["cpu_ms"] = {part: {"median": 20.0 * slow} for part in steps.PARTS}
        row["loaded"] = {"allocated": 7 * MIB, "trained": 1000, "tensors": 2, "packages": {"torch": "2.14.1"}}
        row["counts"] = {"launches": 4536.2, "peak": 8 * MIB, "reserved": 9 * MIB}
    return made


def arguments(**given):
    common = {"device": "cuda", "tiny": False, "depth": (1, 2), "pairs_only": False, "sd_scripts": None}
    return argparse.Namespace(**common | {"sd_scripts_python": sys.executable} | given)


def test_fluxq_is_compared_with_the_program_of_its_format_only(rows):
    step = {row["what"]: row["median"] for row in steps.ratios(rows) if row["part"] == "step"}
    assert step == {"fluxq, nf4 / QLoRA recipe, nf4": 0.5, "fluxq, fp8 / sd-scripts, fp8": 0.25}


def test_a_ratio_is_taken_round_by_round(rows):
    rows[0]["steps"][2]["step"] = 60.0
    ratio = next(row for row in steps.ratios(rows) if row["part"] == "step")
    assert (ratio["least"], ratio["median"], ratio["most"]) == (0.5, 0.5, 1.0)


def test_pairs_only_leaves_out_what_is_not_compared():
    names = [row["name"] for row in steps.rows_of(arguments(pairs_only=True), 512)]
    assert names == ["fluxq, nf4", "QLoRA recipe, nf4"]


def test_the_page_has_a_line_per_program_and_ratio(rows):
    about = {"gpu": "a GPU", "commit": "0123456789", "torch": "2.14.1", "date": "today"}
    settings = {"device": "cuda", "depth": (1, 2), "rounds": 3}
    report = {"settings": settings, "about": about, "emulated": "rtx4090", "rows": rows, "ratios": steps.ratios(rows)}
    lines = steps.page(report).splitlines()
    assert lines[0].endswith("512 px") and "1 + 2 blocks, an emulated rtx4090" in lines[2] and "0123456" in lines[2]
    assert "| sd-scripts, fp8 | 80 | 80 | 80 | 80 | 4,536 | 0 | 0 | 7 | 8 | 9 |" in lines
    assert "- fluxq, nf4 / QLoRA recipe, nf4, step: 0.50 (0.50 to 0.50)" in lines
    assert "- QLoRA recipe, nf4: 1,000 weights in 2 tensors; torch 2.14.1." in lines


def test_counts_of_the_emulated_gpu_are_per_step():
    calls = {"device synchronizations": 4, "stream synchronizations": 2, "cudaMalloc": 9}
    moved = {"host to GPU": 8, "GPU to host": 2, "on the GPU": 5}
    found = worker.per_step({"launches": 10, "calls": calls, "copies": moved, "bytes": moved}, 2)
    assert (found["launches"], found["waits"], found["bytes, host to GPU"]) == (5, 3, 4)


def test_resident_memory_is_read_in_bytes():
    assert worker.resident("VmRSS", STATUS) == MIB and worker.resident("VmHWM", STATUS) == 2 * MIB


def test_a_step_is_split_where_the_program_calls_backward(monkeypatch):
    torch = worker.torch
    monkeypatch.setattr(torch.Tensor, "backward", torch.Tensor.backward)
    weight = torch.ones(3, requires_grad=True)

    def step(index):
        loss = (index * weight).sum()
        loss.backward()
        return float(loss)

    found = worker.Clock(step)(2)
    assert found["loss"] == 6 and weight.grad.tolist() == [2, 2, 2]
    assert found["step"] == pytest.approx(sum(found[part] for part in steps.PARTS[1:])) and found["backward"] > 0


def test_training_in_a_thread_makes_one_step_when_told_to():
    taken, done = sd_scripts.Steps(), []

    def train():
        for index in range(2):
            taken.reached("the network")
            done.append(index)
        raise OSError("full")

    assert taken.start(train) == "the network" and done == []
    taken.step(0)
    assert done == [0]
    with pytest.raises(OSError, match="full"):
        taken.step(1)


def test_sd_scripts_batch_has_the_shapes_of_the_setting():
    batch = sd_scripts.batch(Setting(resolution=64, t5_length=5))
    assert batch["latents"].shape == (1, 16, 8, 8)
    assert [tuple(t.shape[1:]) for t in batch["text_encoder_outputs_list"]] == [(768,), (5, 4096), (5, 3), (5,)]
