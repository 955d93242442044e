"""CPU time of a training step: how long Python and PyTorch take to launch a step's kernels.

    python3 -m benchmarks.host --out DIR
    python3 -m benchmarks.host --device cpu --tiny --out DIR          only to try the script

The step is that of FLUX.1 dev with all its blocks, but so narrow that the GPU finishes each kernel before the next is
launched: the wall time is CPU time. A GPU that computes the full width faster than this is limited by the CPU. If the
kernels of a GPU cut large weights into parts, the full width launches more than is counted here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.cases import Case, parser, run_part
from benchmarks.placed import RANK, T5_LENGTH, config_of, optimizer_of, planned, row_of
from fluxq.bench.timed_step import Setting
from fluxq.model import FluxConfig

WIDTH, HEADS, SIZE = 256, 2, 256
ROWS = (
    ("nf4", "bf16", "keep_all", False),
    ("nf4", "bf16", "recompute", False),
    ("nf4", "bf16", "keep_all", True),
    ("nf4", "int8_dx", "keep_all", False),
)  # format, compute, policy, whether all units are streamed


def main() -> None:
    made = parser(__doc__ or "")
    made.add_argument("--steps", type=int, default=10, help="timed steps each, after three untimed ones")
    arguments = made.parse_args()
    device, steps = torch.device(arguments.device), 1 if arguments.tiny else arguments.steps

    def prepare(report: dict[str, Any]) -> Iterator[Case]:
        config, optimizer = config_of(arguments.tiny), optimizer_of()
        if not arguments.tiny:
            config = replace(config, hidden_size=WIDTH, num_heads=HEADS)
        report |= {"rank": RANK, "t5_length": T5_LENGTH, "optimizer": optimizer, "width": config.hidden_size}
        for format, compute, policy, streamed in ROWS:
            words = "streamed" if streamed else "resident"
            setting = Setting(format, compute, policy, SIZE, 1, RANK, T5_LENGTH, slots=4 if streamed else None)
            run = partial(measure, setting, config, device, optimizer, steps, streamed)
            yield Case(f"host: {format}, {compute}, {policy}, {words}", run)

    run_part("host", arguments, prepare)


def measure(
    setting: Setting, config: FluxConfig, device: torch.device, optimizer: str, steps: int, streamed: bool
) -> dict[str, Any]:
    pins = dict(resident_units=0 if streamed else None, blocks_to_swap=None if streamed else 0)
    made = planned(setting, config, device, optimizer, slots=setting.slots, offload=False, **pins)
    row = row_of(made, setting, config, device, optimizer, steps)
    row.pop("targets", None)  # peaks of such a narrow model mean nothing
    return row


if __name__ == "__main__":
    main()
