"""Every op on the GPU at hand at FLUX.1's shapes: right first, then how fast, beside what is wanted of it.

    python3 -m benchmarks.kernels --out DIR [--only "steps: modulate"]
    python3 -m benchmarks.kernels --device cpu --tiny --out DIR          only tries the script out

Memory-bound ops against a clone() of the bytes that they must move; `lora_linear` in bf16 against the plain products
and against bitsandbytes with peft; 8-bit products against plain bf16; 8-bit errors by layer. Runs alternate, L2 is
flushed before each, medians count. A row holds the check, milliseconds, the time predicted from what the GPU can do at
best, and the targets: `met` is null where a target is meant for another GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch

from benchmarks.cases import Case, parser, run_part
from benchmarks.kernel_cases import eight_bits, errors, linear, memory_bound
from benchmarks.kernel_cases.setting import Setting
from benchmarks.roofline import measure_ceilings

TINY_ROWS = (136,)
TOPICS = (memory_bound, linear, eight_bits, errors)


def main() -> None:
    arguments = parser(__doc__ or "").parse_args()
    device = torch.device(arguments.device)

    def prepare(report: dict[str, Any]) -> Iterator[Case]:
        torch.manual_seed(0)
        report.setdefault("ceilings", measure_ceilings(device, arguments.tiny))
        setting = Setting(device, ceilings=report["ceilings"])
        if arguments.tiny:
            setting = Setting(device, True, TINY_ROWS, 4, 0.0, report["ceilings"])
        report["backend"] = setting.ours.__name__
        return chain.from_iterable(topic.cases(setting) for topic in TOPICS)

    run_part("kernels", arguments, prepare)


if __name__ == "__main__":
    main()
