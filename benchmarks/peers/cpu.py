"""fluxq beside diffusers, peft and bitsandbytes on the CPU: CPU time forward and backward, and peak memory.

    OMP_NUM_THREADS=1 python -m benchmarks.peers.cpu --out FILE [--sizes 256 512]

One double and two single blocks of FLUX.1 dev at full width with everything around them, in NF4, all blocks recomputed,
LoRA of rank 16, 512 T5 tokens, one image per step. Random weights; the two programs take turns. What is computed is the
same but for the modulation, which fluxq computes for 64 images at a time, here in the warm-up. A GPU's kernels are not
used: this compares the arithmetic and the memory of two ways to write a step, not what a GPU would show.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import about, write
from benchmarks.peers.programs import FLUXQ, RECIPE, serve
from benchmarks.peers.turns import alternate, stopped
from benchmarks.placed import RANK, T5_LENGTH
from fluxq.bench.timed_step import Setting
from fluxq.model import FluxConfig

MIB = 2**20


def main() -> None:
    arguments = arguments_of()
    if arguments.program:
        config = FluxConfig.nano() if arguments.tiny else FluxConfig.dev()
        config = replace(config, depth=1, depth_single_blocks=2)
        setting = Setting("nf4", "bf16", "recompute", arguments.sizes[0], 1, RANK, T5_LENGTH)
        serve(arguments.program, setting, config, torch.device("cpu"), ResidentMemory())
        return
    report: dict[str, Any] = {"about": about(torch.device("cpu")), "rows": []}
    for size in arguments.sizes:
        command = [sys.executable, "-m", "benchmarks.peers.cpu", *["--tiny"] * arguments.tiny, f"--sizes={size}"]
        commands = {name: [*command, f"--program={name}"] for name in (FLUXQ, RECIPE)}
        for row in alternate(commands, {}, arguments.warm_up, arguments.rounds):
            report["rows"].append({"size": size} | row)
            print(in_words(report["rows"][-1]), flush=True)
        write(arguments.out, report)
    raise SystemExit(any("failed" in row for row in report["rows"]))


def arguments_of() -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, default=Path("benchmarks/results/peers_cpu.json"), help="the JSON file")
    made.add_argument("--sizes", type=int, nargs="+", default=(256, 512), help="pixels of a side")
    made.add_argument("--rounds", type=int, default=3, help="steps of each program that count")
    made.add_argument("--warm-up", type=int, default=1, help="steps of each before them")
    made.add_argument("--tiny", action="store_true", help="a narrow model: only to try the script")
    made.add_argument("--program", choices=(FLUXQ, RECIPE), help=argparse.SUPPRESS)
    return made.parse_args()


class ResidentMemory:
    """What the process has in RAM, the libraries that it has loaded included (Linux)."""

    def reset(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        self._before = status("VmRSS")

    def report(self) -> dict[str, Any]:
        return {"loaded_bytes": self._before, "peak_bytes": status("VmHWM"), "threads": torch.get_num_threads()}


def status(field: str) -> int:
    """Bytes, from /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def in_words(row: dict[str, Any]) -> str:
    words = f"{row['size']} px, {row['case']}: "
    if stopped(row):
        return words + (row.get("skipped") or row["failed"])
    parts = ", ".join(f"{part} {ms['median'] / 1e3:.2f} s" for part, ms in row["cpu_ms"].items())
    return words + f"{parts}; {row['loaded_bytes'] / MIB:.0f} MiB before a step, peak {row['peak_bytes'] / MIB:.0f} MiB"


if __name__ == "__main__":
    main()
