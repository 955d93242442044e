"""The planner's memory against the allocator's: peak by owner, and what the allocator reserves and refuses.

    python3 -m benchmarks.emulated --gpu rtx3060 --out FILE [--sizes 1024 512] [--weights nf4:bf16] [--policy planned]

Only memory is measured, so the GPU may be an emulated one that runs no kernels: what is allocated does not depend on
what is computed. `--gpu` names the GPU whose rates the plan is made with; the machine's must have its compute
capability. Every row runs in a process of its own, whose allocator is empty, and is added to FILE. Set
PYTORCH_ALLOC_CONF=expandable_segments:False to measure an allocator without them, as on Windows.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.placed import RANK, T5_LENGTH, config_of, row_of
from fluxq.allocator import VARIABLES
from fluxq.bench.timed_step import OPTIMIZER, Setting, costs_of
from fluxq.kernels.chunks import chunk_of
from fluxq.kernels.replay import POLICIES
from fluxq.memory.machine import free_gpu_bytes
from fluxq.memory.share import take_share
from fluxq.model.blocks import Scale
from fluxq.offload.gpus import GIB, GPUS
from fluxq.offload.planner import plan
from fluxq.offload.plans import Pins

PLANNED = "planned"
STEPS = 1  # after the untimed ones; a step's peak does not change


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--gpu", choices=GPUS, required=True)
    made.add_argument("--out", type=Path, required=True)
    made.add_argument("--sizes", type=int, nargs="+", default=(1024, 512), help="pixels of a side")
    made.add_argument(
        "--weights", nargs="+", default=("nf4:bf16", "nf4:int8_dx", "int8:int8_dx"), help="format:compute"
    )
    made.add_argument("--policy", nargs="+", choices=(PLANNED, *POLICIES), default=(PLANNED,))
    made.add_argument("--resident", type=int, help="units that stay on the GPU; by default the planner chooses")
    made.add_argument("--slots", type=int)
    made.add_argument("--offload", action=argparse.BooleanOptionalAction, help="block inputs are kept in RAM")
    made.add_argument("--vram", type=float, help="GiB that the plan is made for; by default what is free")
    made.add_argument("--row", help=argparse.SUPPRESS)
    arguments = made.parse_args()
    if arguments.row:
        print(json.dumps(measure(arguments, *arguments.row.split(":"))))
        return
    for size, weights, policy in product(arguments.sizes, arguments.weights, arguments.policy):
        command = [sys.executable, "-m", "benchmarks.emulated", *sys.argv[1:], f"--row={size}:{weights}:{policy}"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        row = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"failed": done.returncode}
        rows = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
        rows.append({"gpu": arguments.gpu, "case": f"{size} px, {weights}, {policy}"} | row)
        arguments.out.write_text(json.dumps(rows, indent=1) + "\n")
        print(in_words(rows[-1]), flush=True)


def measure(arguments: argparse.Namespace, size: str, format: str, compute: str, policy: str) -> dict[str, Any]:
    """A row: the plan, its peak by owner beside the measured one, and the allocator's figures."""
    gpu, device = GPUS[arguments.gpu], torch.device("cuda")
    major, minor = torch.cuda.get_device_capability(device)
    if 10 * major + minor != gpu.capability:
        raise SystemExit(f"{gpu.name} has compute capability {gpu.capability}, this GPU {10 * major + minor}")
    Scale.divides_out = property(lambda self: True)  # type: ignore[assignment, method-assign] - zeros, where no kernel runs
    setting = Setting(format, compute, None if policy == PLANNED else policy, int(size), 1, RANK, T5_LENGTH)
    if not arguments.vram:
        take_share()
    config, free = config_of(False), free_gpu_bytes()
    pins = Pins(None, None, arguments.resident, None, setting.policy, arguments.slots, arguments.offload)
    vram = int(arguments.vram * GIB) if arguments.vram else free
    made = plan([costs_of(setting, config, chunk_of(gpu.capability))], gpu, vram, pins=pins)
    row = row_of(made, setting, config, device, OPTIMIZER, STEPS)
    stats = torch.cuda.memory_stats(device)
    return row | {
        "predicted_gib_by_owner": {owner: nbytes / GIB for owner, nbytes in made.peak.items()},
        "predicted_reserved_bytes": made.reserved,
        "free_bytes": free,
        "allocator": next((os.environ[name] for name in VARIABLES if name in os.environ), ""),
        "retries": stats["num_alloc_retries"],
        "refused": stats["num_ooms"],
    }


def in_words(row: dict[str, Any]) -> str:
    if "peak_bytes" not in row:
        return f"{row['case']}: {row.get('out_of_memory', 'failed')}"
    figures = (row[f"{name}_bytes"] / GIB for name in ("predicted_peak", "predicted_reserved", "peak", "reserved"))
    words = "predicted {:.2f}, reserved {:.2f}; measured {:.2f}, reserved {:.2f} GiB".format(*figures)
    return f"{row['case']}: {words}, {row['retries']} retries"


if __name__ == "__main__":
    main()
