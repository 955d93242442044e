"""Predicted against measured peak memory: plans for GPUs of several sizes, run on this one.

    python3 -m benchmarks.peaks --out DIR [--sizes 512 1024] [--vram 8 12 16 24]
    python3 -m benchmarks.peaks --device cpu --tiny --out DIR          only to try the script

Four steps each. A peak depends on the plan, not on the GPU, so a large GPU can run the plans of small ones. `fits`:
whether the allocator reserved no more than the small GPU has.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any

import torch

from benchmarks.cases import Case, Skip, parser, run_part
from benchmarks.placed import RANK, T5_LENGTH, config_of, optimizer_of, planned, row_of
from fluxq.bench.timed_step import Setting
from fluxq.errors import WrongRequest
from fluxq.model import FluxConfig
from fluxq.offload.gpus import GIB

WEIGHTS = (("nf4", "bf16"), ("int8", "int8_dx"), ("nf4", "int8_dx"))


def main() -> None:
    made = parser(__doc__ or "")
    made.add_argument("--sizes", type=int, nargs="+", default=(1024, 512), help="pixels of a side")
    made.add_argument("--vram", type=float, nargs="+", default=(12, 8, 16, 24), help="GiB that plans are made for")
    arguments = made.parse_args()
    device = torch.device(arguments.device)
    if arguments.tiny:
        arguments.sizes, arguments.vram = (64,), (12,)

    def prepare(report: dict[str, Any]) -> Iterator[Case]:
        config, optimizer = config_of(arguments.tiny), optimizer_of()
        report |= {"rank": RANK, "t5_length": T5_LENGTH, "optimizer": optimizer}
        for (format, compute), vram, size in product(WEIGHTS, arguments.vram, arguments.sizes):
            setting = Setting(format, compute, None, size, 1, RANK, T5_LENGTH)
            run = partial(measure, setting, int(vram * GIB), config, device, optimizer)
            yield Case(f"peaks: {size} px, {format}, {compute}, planned for {vram:g} GiB", run)

    run_part("peaks", arguments, prepare)


def measure(setting: Setting, vram: int, config: FluxConfig, device: torch.device, optimizer: str) -> dict[str, Any]:
    try:
        made = planned(setting, config, device, optimizer, vram)
    except WrongRequest as error:
        raise Skip(str(error)) from error
    row = row_of(made, setting, config, device, optimizer, steps=1)
    if "reserved_bytes" in row:
        row["fits"] = row["reserved_bytes"] <= vram
    return row


if __name__ == "__main__":
    main()
