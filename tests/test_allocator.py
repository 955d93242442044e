"""Torch's allocator has segments that grow, wherever torch has them and the user says nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fluxq.allocator import VARIABLES, has_expandable_segments, use_expandable_segments

ROOT = Path(__file__).parent.parent
GROWING = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}


def test_segments_grow_on_linux(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    environment = {}
    use_expandable_segments(environment)
    assert environment == GROWING


@pytest.mark.parametrize("value", ["max_split_size_mb:128", "expandable_segments:False", ""])
@pytest.mark.parametrize("name", VARIABLES)
def test_what_the_user_set_is_left_alone(name, value, monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    environment = {name: value}
    use_expandable_segments(environment)
    assert environment == {name: value}


@pytest.mark.parametrize("platform", ["win32", "darwin"])
def test_nothing_is_set_where_torch_has_no_such_segments(platform, monkeypatch):
    monkeypatch.setattr(sys, "platform", platform)
    environment = {}
    use_expandable_segments(environment)
    assert environment == {}


SEEN_BY_TORCH = """
import os, runpy, sys
def show_and_leave(event, about):
    if event == "import" and about[0] == "torch":
        print(os.environ.get("PYTORCH_ALLOC_CONF"), flush=True)
        os._exit(0)
sys.addaudithook(show_and_leave)
try:
    {start}
except SystemExit:
    pass
import torch
"""


@pytest.mark.skipif(sys.platform != "linux", reason="torch has such segments on Linux only")
@pytest.mark.parametrize(
    "start",
    [
        "import fluxq.cli",
        "import fluxq.train",
        "sys.argv[1:] = ['--help']; runpy.run_path('cli.py', run_name='__main__')",
        *(
            f"sys.argv[1:] = ['--help']; runpy.run_module('benchmarks.{name}', run_name='__main__')"
            for name in ("gpu", "gpu_tests", "kernels", "blocks")
        ),
    ],
)
def test_it_is_set_before_torch_is_imported(start):
    """Whatever module imports torch first."""
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    code = SEEN_BY_TORCH.format(start=start)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.stdout.splitlines()[-1:] == ["expandable_segments:True"], done.stdout + done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.skipif(sys.platform != "linux", reason="torch has such segments on Linux only")
def test_torch_says_that_segments_grow():
    code = """
import fluxq, torch
torch.zeros(1 << 20, device="cuda")
seen = torch.cuda.memory._snapshot()
print(seen["allocator_settings"]["expandable_segments"], {s["is_expandable"] for s in seen["segments"]})
"""
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.stdout.split() == ["True", "{True}"] and not done.stderr, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("environment", "system", "grow"),
    [
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:True"}, "linux", True),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:True"}, "win32", False),
        ({"PYTORCH_CUDA_ALLOC_CONF": "", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}, "linux", False),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:False"}, "linux", False),
        ({}, "linux", False),
    ],
)
def test_plans_know_whether_segments_can_grow(environment, system, grow, monkeypatch):
    monkeypatch.setattr("sys.platform", system)
    assert has_expandable_segments(environment) is grow
