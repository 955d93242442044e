"""Full width, small depth: the commands that a user runs, on files with the real widths, within the promised memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GIB = 2**30

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is sampled from /proc"),
]


def test_quantize_cache_and_a_step_stay_within_their_memory(tmp_path):
    """One block of each kind and of T5. Quantizing and caching do not grow with depth; training grows by its units."""
    pytest.importorskip("skimage")
    command = [sys.executable, "-m", "benchmarks.fullsize", "--folder", str(tmp_path), "--out", str(tmp_path / "out")]
    command += ["--depth", "1", "1", "--t5-length", "32", "--resolution", "64"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (report,) = (tmp_path / "out").glob("*.json")
    peaks = {name: stage["peak_anonymous_bytes"] for name, stage in json.loads(report.read_text())["stages"].items()}
    bare = subprocess.run(
        [sys.executable, "-c", "import torch; print(open('/proc/self/status').read().split('RssAnon:')[1].split()[0])"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert peaks["quantize"] < int(bare.stdout) * 1024 + 2 * GIB
    assert peaks["cache"] < 3 * GIB
    assert 0 < peaks["train"] < 3 * GIB
