"""Every op at FLUX.1's shapes on this machine's GPU: first checked, then timed against its targets.

    python3 -m benchmarks.kernels --out DIR [--only "steps: modulate"]
    python3 -m benchmarks.kernels --device cpu --tiny --out DIR          only to try the script

Memory-bound ops against a clone() of the bytes that they must move; `lora_linear` in bf16 against the plain products
and against bitsandbytes with peft; 8-bit products against plain bf16; 8-bit errors by layer. Runs alternate, L2 is
flushed before each, and medians are compared. A row has the check, milliseconds, the time predicted from the GPU's best
rates, and the targets; `met` is null if a target is for another GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch

from benchmarks.cases import Case, parser, run_part
from benchmarks.kernel_rows import eight_bits, errors, linear, memory_bound
from benchmarks.kernel_rows.setting import setting_of
from benchmarks.roofline import measure_ceilings

TOPICS = (memory_bound, linear, eight_bits, errors)


def main() -> None:
    arguments = parser(__doc__ or "").parse_args()
    device = torch.device(arguments.device)

    def prepare(report: dict[str, Any]) -> Iterator[Case]:
        torch.manual_seed(0)
        report.setdefault("ceilings", measure_ceilings(device, arguments.tiny))
        setting = setting_of(device, arguments.tiny, report["ceilings"])
        report["backend"] = setting.ours.__name__
        return chain.from_iterable(topic.cases(setting) for topic in TOPICS)

    run_part("kernels", arguments, prepare)


if __name__ == "__main__":
    main()
