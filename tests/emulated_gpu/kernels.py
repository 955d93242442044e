"""Launches every Triton kernel once on the emulated GPU: compiled for it, loaded, and with a grid that it can have.

    python tests/emulated_gpu/run.py --gpu h100 -- python tests/emulated_gpu/kernels.py

The cases are those of `make aot`, at FLUX.1's shapes. Of each kernel the first launch is made for each kind of products
in it; the others are passed over, as their compilations are `make aot`'s to check. A launch that the GPU cannot do
raises.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import fluxq  # noqa: F401, I001 - before torch, whose allocator it sets up
import emulated
import torch
import triton

from benchmarks.aot import kernels, run_cases
from benchmarks.launches import launch_of
from benchmarks.promises import promise
from fluxq.kernels import FORMATS, backend
from fluxq.kernels.triton import table


def main() -> None:
    launched: set[tuple[str, tuple[str, ...]]] = set()

    def seen_before(*, key: str, fn: Any, compile: Mapping[str, Any], **_: Any) -> bool:
        """Triton asks this before it compiles a kernel; if the answer is yes, it neither compiles nor launches it."""
        launch = launch_of(key, fn, compile)
        kind = launch.name, tuple(dot.kind for dot in promise(launch).dots)
        seen = kind in launched
        launched.add(kind)
        return seen

    device = torch.device("cuda")
    triton.knobs.runtime.jit_cache_hook = seen_before
    with backend("triton"):
        for _ in run_cases(table.generation(device), FORMATS, "cuda"):
            pass
    report = emulated.report()
    name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    if absent := kernels() - {kernel for kernel, _ in launched}:
        raise SystemExit(f"{name}: not launched: {', '.join(sorted(absent))}")
    if report["errors"]:
        raise SystemExit(f"{name}: calls failed: {report['errors']}")
    modules, kinds = report["calls"]["modules loaded"], len(launched)
    if modules != kinds:
        raise SystemExit(f"{name}: {kinds} launches were to be made, but {modules} modules were loaded")
    print(f"{name}, {'.'.join(map(str, capability))}: {len(kernels())} kernels, {kinds} compiled, loaded and launched")


if __name__ == "__main__":
    main()
