"""Streaming on against off: the same training steps with every unit resident, and with all and half of them streamed.

    python3 -m benchmarks.streaming --out DIR [--sizes 512 1024] [--policy recompute] [--slots 8]
    python3 -m benchmarks.streaming --device cpu --tiny --out DIR          only to try the script

Weights and LoRA are the same, so the loss must be the same. The target is the speed with streaming over that without.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch

from benchmarks.cases import Case, parser, run_part, target
from benchmarks.placed import RANK, T5_LENGTH, config_of, optimizer_of, planned, row_of
from fluxq.bench.timed_step import Setting
from fluxq.kernels import COMPUTES, FORMATS, POLICIES
from fluxq.model import FluxConfig

SAME_LOSS = 1e-3
"""Relative. Streaming changes no numbers, but a GPU may sum products in another order."""


def main() -> None:
    made = parser(__doc__ or "")
    made.add_argument("--sizes", type=int, nargs="+", default=(512, 1024), help="pixels of a side")
    made.add_argument("--format", choices=FORMATS[1:], default="nf4", help="how frozen weights are stored")
    made.add_argument("--compute", nargs="+", choices=COMPUTES, default=("bf16", "int8_dx"), help="how multiplied")
    made.add_argument("--policy", choices=POLICIES, default="recompute", help="what blocks keep for backward")
    made.add_argument("--slots", type=int, default=8, help="slots on the GPU for streamed units")
    made.add_argument("--steps", type=int, default=8, help="timed steps each, after three untimed ones")
    arguments = made.parse_args()
    device, a = torch.device(arguments.device), arguments
    if a.tiny:
        a.sizes, a.steps = (64,), 1

    def prepare(report: dict[str, Any]) -> Iterator[Case]:
        config, optimizer = config_of(a.tiny), optimizer_of()
        units = 2 * config.depth + config.depth_single_blocks
        report |= {"rank": RANK, "t5_length": T5_LENGTH, "optimizer": optimizer}
        for compute, size in product(a.compute, a.sizes):
            setting = Setting(a.format, compute, a.policy, size, 1, RANK, T5_LENGTH, slots=a.slots)
            name = f"streaming: {size} px, {a.format}, {compute}, {a.policy}"
            for swap in dict.fromkeys((0, units // 2, units // 4)):
                words = f"{2 * swap} units streamed" if swap else "all resident"
                run = partial(measure, setting, swap, config, device, optimizer, a.steps, report["rows"], name)
                yield Case(f"{name}, {words}", run)

    run_part("streaming", arguments, prepare)


def measure(
    setting: Setting,
    swap: int,
    config: FluxConfig,
    device: torch.device,
    optimizer: str,
    steps: int,
    rows: Sequence[dict[str, Any]],
    name: str,
) -> dict[str, Any]:
    """The row with `swap` blocks (2 units each) streamed. name: the prefix of the rows to compare it with."""
    pins = dict(blocks_to_swap=swap, slots=setting.slots, offload=False)
    made = planned(setting, config, device, optimizer, **pins)
    row = row_of(made, setting, config, device, optimizer, steps)
    resident = next((r for r in rows if r["case"] == f"{name}, all resident" and "ms" in r), None)
    if swap and resident and "ms" in row:
        ratio = resident["ms"]["step"]["median"] / row["ms"]["step"]["median"]
        row["ok"] = row["ok"] and math.isclose(row["loss"], resident["loss"], rel_tol=SAME_LOSS)
        row["resident_loss"] = resident["loss"]
        row.setdefault("targets", []).append(target("speed over all resident", ">= 0.95", ratio))
    return row


if __name__ == "__main__":
    main()
