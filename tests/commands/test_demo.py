"""The demo: the creature is learned, ordinary images stay, NF4 costs little, and nothing uses the network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import short_demo
import torch
from PIL import Image

from fluxq.commands.demo import one_core_spared
from fluxq.console import silent
from fluxq.kernels import backend
from fluxq.train import train
from fluxq.training.report import read_log

pytestmark = pytest.mark.slow

EXACT, NF4, INT8, FP8 = RUNS = [("bf16", "bf16"), ("nf4", "bf16"), ("nf4", "int8_dx"), ("fp8", "fp8_dx")]
"""Format and compute. In int8_dx, weights in NF4 are rounded to int8 too: stored in int8, they can only do better."""


@pytest.fixture(scope="module")
def shown(tmp_path_factory) -> dict:
    """What the demo came to, from NF4 in bf16."""
    command = [sys.executable, short_demo.__file__, str(tmp_path_factory.mktemp("demo"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def losses(shown) -> dict[tuple[str, str], dict[str, float]]:
    """The held-out losses before and after 32 steps of 4 images, three in five of the creature, by format, compute."""
    folder, found = Path(shown["lora"]).parent, {}
    for run in RUNS:
        config = short_demo.demo_config(folder, *run)
        training = replace(config.training, steps=32, batch=4, learning_rate=4e-3)
        output, data = replace(config.output, out=folder.joinpath(*run)), short_demo.repeated(config.data, 4)
        config = replace(config, training=training, data=data, output=output)
        with backend("reference"), one_core_spared():
            found[run] = validation(asdict(train(config, notify=silent)))
    return found


def validation(result: dict) -> dict[str, float]:
    return {
        f"{name}_{when}": loss for when in ("before", "after") for name, loss in result[f"validation_{when}"].items()
    }


def test_the_demo_teaches_the_creature_and_keeps_the_rest(shown):
    assert shown["concept_change"] <= -0.25
    assert shown["ordinary_change"] <= 0.10


@pytest.mark.parametrize("run", [NF4, INT8, FP8])
def test_every_format_and_compute_ends_within_3_percent_of_bf16(run, losses):
    """The loss of what is taught. Same seeds, so the same images, noise and times; only the rounding differs."""
    taught = "creature_held_out_after"
    assert losses[EXACT][taught] <= 0.5 * losses[EXACT]["creature_held_out_before"], "much is taught"
    assert losses[run][taught] <= 1.03 * losses[EXACT][taught]


@pytest.mark.parametrize("run", [NF4, INT8, FP8])
def test_ordinary_captions_lose_no_more_than_rounding_itself_costs(run, losses):
    """What rounding costs before any training (22 % in NF4) only shrinks."""
    before, after = (
        losses[run][key] / losses[EXACT][key] for key in ("ordinary_held_out_before", "ordinary_held_out_after")
    )
    assert after <= before


@pytest.mark.parametrize(("run", "exact"), [(INT8, NF4), (FP8, EXACT)])
def test_eight_bits_both_ways_end_within_3_percent(run, exact, losses):
    """The loss of what is taught, and of ordinary images: INT8 beside the same weights in NF4, FP8 beside bf16."""
    for loss in ("creature_held_out_after", "ordinary_held_out_after"):
        assert losses[run][loss] <= 1.03 * losses[exact][loss]


def test_the_demo_leaves_what_it_promises(shown):
    run = Path(shown["lora"]).parent
    for name in ("config.toml", "log.jsonl", "result.json", "state/state.safetensors"):
        assert (run / name).stat().st_size > 0
    assert Image.open(shown["loss_plot"]).size == (800, 900)
    assert min(Image.open(shown["grid"]).size) > 200
    result = json.loads((run / "result.json").read_text())
    assert [r["step"] for r in read_log(run / "log.jsonl")] == list(range(1, result["steps"] + 1))
    assert result["validation_after"]["creature_held_out"] == shown["concept_after"]


@pytest.mark.parametrize(("cpus", "before", "inside"), [(4, 4, 3), (4, 2, 2), (2, 2, 1), (1, 1, 1), (None, 1, 1)])
def test_one_core_is_left_to_other_programs_and_then_taken_again(cpus, before, inside, monkeypatch):
    threads = [before]
    monkeypatch.setattr(os, "cpu_count", lambda: cpus)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    with pytest.raises(ValueError), one_core_spared():
        raise ValueError
    assert threads == [before, inside, before]
