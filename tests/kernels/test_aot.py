"""The ahead-of-time ring: every kernel, compiled for the GPUs in use at the tile sizes in use, keeps its promises."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent.parent / "benchmarks" / "aot.py"


@pytest.mark.slow
def test_kernels_compile_for_every_gpu_without_spills_and_with_tensor_cores(tmp_path):
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    report = tmp_path / "aot.json"
    run = subprocess.run(
        [sys.executable, str(SCRIPT), "--json", str(report)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode in (0, 1), run.stderr
    broken = [f"{r['case']} sm_{r['capability']}: {b}" for r in json.loads(report.read_text()) for b in r["broken"]]
    assert not broken, "\n".join(broken)
