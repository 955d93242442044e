"""Every kernel, compiled ahead of time for every GPU generation at a tile in use, keeps its promises."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_kernels_compile_for_every_gpu_without_spills_and_with_tensor_cores(tmp_path):
    """One launch of each kernel for each kind of products in it, disassembled only where a promise is about opcodes; a
    kernel without products for the oldest and the newest GPU. `make aot` compiles and disassembles every launch.
    """
    pytest.importorskip("triton")
    from benchmarks.aot import kernels
    from fluxq.kernels.triton.shipped import GENERATIONS

    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    report = tmp_path / "aot.json"
    command = [sys.executable, "-m", "benchmarks.aot", "--quick", "--jobs=2", f"--json={report}"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode in (0, 1), run.stderr
    reports = json.loads(report.read_text())
    broken = [f"{r['case']} sm_{r['capability']}: {b}" for r in reports for b in r["broken"]]
    assert not broken, "\n".join(broken)
    compiled = {(r["kernel"], r["capability"]) for r in reports}
    assert {kernel for kernel, gpu in compiled if gpu == GENERATIONS[0]} == kernels()
    assert {kernel for kernel, gpu in compiled if gpu == GENERATIONS[-1]} == kernels()
    multiplying = {r["kernel"] for r in reports if any("MMA" in opcode for opcode in r["opcodes"])}
    assert len(multiplying) >= 4
    assert {(kernel, gpu) for kernel in multiplying for gpu in GENERATIONS} <= compiled
