"""Training steps of FLUX.1 dev with random weights on this machine's GPU: seconds per step and peak memory.

    python3 -m benchmarks.gpu --out DIR [--sizes 512 1024] [--policy keep_all ...] [--compute int8 ...] [--vram 12GiB]
    python3 -m benchmarks.gpu --device cpu --tiny --out DIR          only to try the script

LoRA of rank 16 on attention and MLP, batch 1, 512 T5 tokens. The steps are those of `fluxq bench steps`
(fluxq/bench/timed_step.py). `--policy planned` is the plan that training would make; every other policy is timed with
all weights resident. The first policy comes first, then the published QLoRA recipe, then the other policies.
`--vram` limits the memory of the GPU that may be used; a combination that does not fit says so and does not count as
failed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import torch

from benchmarks.cases import Case, last_only, parser, run_part, target
from benchmarks.kernel_rows.setting import skip_missing_fp8
from benchmarks.peers import qlora_step
from benchmarks.placed import ENDLESS, RANK, T5_LENGTH, gpu_of, optimizer_of, planned, row_of
from benchmarks.roofline import KINDS, Ceilings, block_ms, measure_ceilings
from fluxq.bench.random_model import random_flux
from fluxq.bench.steps import hold_to
from fluxq.bench.timed_step import Setting, clock_steps, costs_of, measure_steps
from fluxq.kernels import COMPUTES, FORMATS, POLICIES
from fluxq.model import FluxConfig
from fluxq.offload.gpus import GIB, GPU, GPUS
from fluxq.offload.planner import plan
from fluxq.offload.plans import Pins

RECIPE, PLANNED = "published QLoRA recipe", "planned"


def main() -> None:
    arguments = arguments_of()
    device = torch.device(arguments.device)

    def prepare(report: dict[str, Any]) -> Iterator[Case]:
        torch.manual_seed(0)
        if arguments.vram and device.type == "cuda":
            hold_to(arguments.vram, device)
        config, depth = FluxConfig.dev(), tuple(arguments.depth)
        if arguments.tiny:
            config, depth = FluxConfig.nano(), (1, 1)
        config = replace(config, depth=depth[0], depth_single_blocks=depth[1])
        optimizer = optimizer_of()
        report |= {"depth": list(depth), "rank": RANK, "t5_length": T5_LENGTH, "vram_bytes": arguments.vram}
        report["optimizer"] = optimizer
        report.setdefault("ceilings", measure_ceilings(device, arguments.tiny))
        hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9

        @last_only
        def model(kind: str) -> Any:
            if kind == RECIPE:
                return qlora_step.transformer(config, RANK, device)
            return random_flux(config, kind, device, RANK)

        measured = partial(timed_steps, device, arguments, optimizer)

        def ours(policy: str) -> Iterator[Case]:
            for size, format, compute in product(arguments.sizes, arguments.format, arguments.compute):
                setting = Setting(format, compute, policy if policy != PLANNED else None, size, 1, RANK, T5_LENGTH)
                if policy == PLANNED:
                    row = partial(planned_of, model.forget, config, setting, device, arguments, optimizer)
                else:
                    bound = bound_ms(report["ceilings"], config, depth, size, policy, compute)
                    row = partial(ours_of, partial(model, format), config, setting, measured, bound, gpu_of(device))
                yield Case(f"steps: {size} px, {format}, {compute}, {policy}", row)

        first, *others = arguments.policy
        yield from ours(first)
        for size in arguments.sizes:
            setting = Setting(resolution=size, rank=RANK, t5_length=T5_LENGTH)
            theirs = partial(recipe_of, partial(model, RECIPE), config, setting, measured, report["rows"], hopper)
            yield Case(f"steps: {size} px, {RECIPE}", theirs)
        for policy in others:
            yield from ours(policy)

    run_part("steps", arguments, prepare)


def arguments_of() -> Any:
    made = parser(__doc__ or "")
    made.add_argument("--depth", type=int, nargs=2, default=(19, 38), help="double and single blocks; default: dev's")
    made.add_argument("--sizes", type=int, nargs="+", default=(512, 1024, 768), help="pixels of a side")
    made.add_argument("--format", nargs="+", choices=FORMATS, default=("nf4",), help="how frozen weights are stored")
    made.add_argument(
        "--compute", nargs="+", choices=COMPUTES, default=("bf16", "int8_dx"), help="how they are multiplied"
    )
    made.add_argument(
        "--policy",
        nargs="+",
        choices=(PLANNED, *POLICIES),
        default=(PLANNED, "recompute", "keep_all"),
        help="what blocks keep for backward",
    )
    made.add_argument("--steps", type=int, default=12, help="timed steps each, after three untimed ones")
    made.add_argument(
        "--seconds", type=float, default=15, help="at most as many steps as fit into this, but at least three"
    )
    made.add_argument("--vram", type=gibibytes, help='limit for the GPU memory used, such as "12GiB"')
    return made.parse_args()


def gibibytes(text: str) -> int:
    match = re.fullmatch(r"([0-9.]+)\s*(?:GiB)?", text)
    if match is None:
        raise ValueError(text)  # argparse says what was wanted
    return int(float(match[1]) * 2**30)


def bound_ms(
    ceilings: Ceilings, config: FluxConfig, depth: Sequence[int], size: int, policy: str, compute: str
) -> float | None:
    """The time of all blocks' products at the GPU's best rates, without the rest of the step."""
    rows = T5_LENGTH + (size // 16) ** 2
    times = [block_ms(ceilings, kind, config.hidden_size, rows, policy, compute) for kind in KINDS]
    return None if None in times else sum(n * (t or 0.0) for n, t in zip(depth, times, strict=True))


def ours_of(
    model: Callable[[], Any],
    config: FluxConfig,
    setting: Setting,
    measured: Callable[..., dict[str, Any]],
    bound: float | None,
    gpu: GPU,
) -> dict[str, Any]:
    """The row of fluxq's own steps, with a plan's prediction for everything resident."""
    skip_missing_fp8(torch.device("cuda" if torch.cuda.is_available() else "cpu"), setting.compute)

    def figures(steps: int, seconds: float, optimizer: str) -> dict[str, Any]:
        flux = model()
        flux.set_policy(setting.policy)
        flux.set_compute(setting.compute)
        return measure_steps(flux, setting, steps, seconds, optimizer)

    def predicted(optimizer: str) -> dict[str, Any]:
        pins = Pins(blocks_to_swap=0, policy=setting.policy, offload=False)
        costs = costs_of(setting, config, gpu, optimizer)
        made = plan([costs], GPUS["h200"], ENDLESS, pins=pins)
        modulation = sum(costs.ahead.values()) - made.peak["slots"]  # here its weights stay, and pass through no slots
        return {"predicted_peak_bytes": made.peak_bytes + modulation, "bound_ms": bound}

    return measured(figures, predicted)


def planned_of(
    free_model: Callable[[], None],
    config: FluxConfig,
    setting: Setting,
    device: torch.device,
    arguments: Any,
    optimizer: str,
) -> dict[str, Any]:
    """The row of the plan that training would make for the memory that may be used. free_model: frees another model."""
    free_model()
    made = planned(setting, config, device, optimizer, arguments.vram)
    return row_of(made, setting, config, device, optimizer, arguments.steps)


def recipe_of(
    model: Callable[[], Any],
    config: FluxConfig,
    setting: Setting,
    measured: Callable[..., dict[str, Any]],
    rows: Sequence[dict[str, Any]],
    hopper: bool,
) -> dict[str, Any]:
    """The recipe's row, and its time over that of our best in bf16 and in 8 bits at that resolution."""

    def figures(steps: int, seconds: float, optimizer: str) -> dict[str, Any]:
        transformer = model()
        try:
            step = qlora_step.trainer(transformer, config, setting, optimizer)
            return clock_steps(step, next(transformer.parameters()).device, setting.batch, steps, seconds)
        finally:
            transformer.zero_grad(set_to_none=True)

    row = measured(figures)
    for words, bf16, wanted in (("bf16", True, ">= 1.5"), ("8 bits", False, ">= 2")):
        ours = [
            own["ms"]["step"]["median"]
            for own in rows
            if own["case"].startswith(f"steps: {setting.resolution} px, ") and (", bf16, " in own["case"]) == bf16
            if RECIPE not in own["case"] and "ms" in own
        ]
        if ours and "ms" in row:
            ratio = row["ms"]["step"]["median"] / min(ours)
            row.setdefault("targets", []).append(target(f"speed in {words} over the recipe", wanted, ratio, hopper))
    return row


def timed_steps(
    device: torch.device,
    arguments: Any,
    optimizer: str,
    figures: Callable[[int, float, str], dict[str, Any]],
    predicted: Callable[[str], dict[str, Any]] = lambda optimizer: {},
) -> dict[str, Any]:
    """A row: the figures under the names that all parts use, or that it ran out of memory."""
    try:
        found = figures(arguments.steps, arguments.seconds, optimizer)
    except torch.OutOfMemoryError as error:
        return {"out_of_memory": str(error).split(". ")[0], **predicted(optimizer)}
    row = {"ok": found["ok"], "ms": {"step": found["ms"]}, "loss": found["loss"], "joules": found["joules"]}
    if device.type == "cuda":
        row |= {f"{name}_bytes": int(found[f"{name}_gib"] * GIB) for name in ("peak", "reserved")}
    return row | predicted(optimizer)


if __name__ == "__main__":
    main()
