"""Steps of several programs in turns: what is compared, counted and written. Nothing is trained here."""

from __future__ import annotations

import argparse

import pytest
import torch

from benchmarks.peers import sd_scripts, steps, worker
from fluxq.bench.timed_step import Setting


def test_each_pair_differs_in_the_program_only(tmp_path):
    options = dict(device="cuda", tiny=False, depth=(19, 38), pairs_only=False)
    alone = steps.rows_of(argparse.Namespace(**options, sd_scripts=None), 512)
    assert [row["program"] for row in alone] == ["fluxq", "recipe", "fluxq", "fluxq"]
    theirs = argparse.Namespace(**options, sd_scripts=tmp_path, sd_scripts_python="theirs")
    rows = steps.rows_of(theirs, 512)
    for pair in ("nf4", "fp8"):
        ours, other = (row for row in rows if row["pair"] == pair)
        assert ours["program"] == "fluxq" != other["program"]
        assert ours["setting"] == other["setting"] and ours["setting"]["policy"] == "recompute"
    assert [row["python"] for row in rows].count("theirs") == 1


def test_ratios_are_taken_round_by_round():
    def row(name, *cpu_ms, pair="nf4"):
        parts = [dict.fromkeys(steps.PARTS, ms) for ms in cpu_ms]
        return {"name": name, "pair": pair, "setting": {"resolution": 512}, "steps": parts}

    rows = [row("ours", 1, 8, 3), row("theirs", 2, 4, 4), row("alone", 9, 9, 9, pair=None)]
    step, *_ = found = steps.ratios(rows)
    assert [each["part"] for each in found] == ["step", "forward", "backward"]
    assert (step["least"], step["median"], step["most"]) == (0.5, 0.75, 2.0)


def test_counts_are_per_step_and_every_kind_of_wait_is_one():
    waits = dict.fromkeys(("device synchronizations", "stream synchronizations", "event synchronizations"), 2)
    sizes = {"host to GPU": 8, "GPU to host": 4, "on the GPU": 100}
    found = worker.per_step(
        {"launches": 10, "calls": waits | {"pageable copies to the GPU": 4}, "copies": sizes, "bytes": sizes}, 2
    )
    assert (found["launches"], found["waits"], found[worker.PAGEABLE]) == (5, 3, 2)
    assert found["bytes, host to GPU"] == 4


def test_resident_memory_is_read_in_kib():
    assert worker.resident("VmHWM", "VmPeak:\t  9 kB\nVmHWM:\t     123 kB\nVmRSS:\t 7 kB\n") == 123 * 1024


def test_training_stands_still_between_steps():
    done, turns = [], sd_scripts.Steps()

    def train():
        for index in range(3):
            turns.reached("LoRA")
            done.append(index)

    assert turns.start(train) == "LoRA" and done == []
    turns.step(0)
    assert done == [0]
    turns.step(1)
    assert done == [0, 1]
    with pytest.raises(RuntimeError, match="training has ended"):
        turns.step(2)


def test_an_error_in_training_is_raised_where_the_step_was_asked_for():
    def train():
        raise ValueError("out of range")

    with pytest.raises(ValueError, match="out of range"):
        sd_scripts.Steps().start(train)


def test_their_batch_has_the_shapes_of_the_setting():
    batch = sd_scripts.batch(Setting(resolution=64, t5_length=4))
    assert batch["latents"].shape == (1, 16, 8, 8)
    assert [tuple(t.shape) for t in batch["text_encoder_outputs_list"]] == [(1, 768), (1, 4, 4096), (1, 4, 3), (1, 4)]


def test_the_page_says_what_was_measured_and_with_what():
    setting = {"resolution": 512}
    spread = {"median": 1234.5, "p10": 1.0, "p90": 2.0, "runs": 3}
    row = {
        "name": "theirs",
        "setting": setting,
        "commit": "48d368fa55",
        "cpu_ms": dict.fromkeys(steps.PARTS, spread),
        "loaded": {"allocated": 5 << 20, "trained": 1000, "tensors": 2, "packages": {"torch": "2.14"}},
        "counts": {"launches": 23579.0, "waits": 467.0, worker.PAGEABLE: 9.0, "peak": 7 << 20, "reserved": 8 << 20},
    }
    report = {
        "about": {"commit": "f78b68048f", "torch": "2.14.1", "date": "today", "gpu": "cuda GPU"},
        "settings": {"device": "cuda", "rounds": 3, "depth": (19, 38)},
        "emulated": "rtx4090",
        "rows": [row],
        "ratios": [{"what": "ours / theirs", "part": "step", "median": 0.5, "least": 0.4, "most": 0.6}],
    }
    page = steps.page(report)
    assert "| theirs | 1,234 | 1,234 | 1,234 | 1,234 | 23,579 | 467 | 9 | 5 | 7 | 8 |" in page
    assert "an emulated rtx4090: host time only; commit f78b680, torch 2.14.1" in page
    assert "- ours / theirs, step: 0.50 (0.40 to 0.60)" in page
    assert "1,000 weights in 2 tensors; torch 2.14; commit 48d368f." in page


def test_a_step_is_split_where_the_program_calls_backward(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "backward", torch.Tensor.backward)  # which a clock replaces
    weight = torch.ones(3, requires_grad=True)

    def step(index):
        loss = (index * weight).sum()
        loss.backward()
        return float(loss)

    found = worker.Clock(step)(2)
    assert found["loss"] == 6 and weight.grad.tolist() == [2, 2, 2] and found["backward"] > 0
    assert found["step"] == pytest.approx(sum(found[part] for part in steps.PARTS[1:]))
