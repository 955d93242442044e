"""Neither a new image size nor a new rank makes a kernel compile again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compiles.py")


@pytest.mark.slow
def test_a_kernel_compiles_twice_at_most_over_6_sizes_and_4_ranks():
    """In a process of its own: here Triton interprets."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(SCRIPT.parents[2])
    run = subprocess.run([sys.executable, SCRIPT], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    counted = json.loads(run.stdout)
    assert counted and {name: n for name, n in counted.items() if n > 2} == {}
