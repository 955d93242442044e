"""Training steps of FLUX.1 dev on the card at hand, with random weights: seconds a step and peak memory.

    python3 -m benchmarks.gpu --out DIR [--sizes 512 1024] [--policy keep_all ...] [--compute int8 ...] [--vram 12GiB]
    python3 -m benchmarks.gpu --device cpu --tiny --out DIR          only tries the script out

Everything resident, LoRA of rank 16 on attention and MLP, batch 1, 512 T5 tokens, AdamW. `--vram` lets the program have
no more of the card than that; a combination that does not fit says so and does not count as failed.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch

from benchmarks.cases import Case, Skip, last_only, parser, run_part
from benchmarks.random_model import random_flux
from benchmarks.roofline import KINDS, Ceilings, block_ms, measure_ceilings
from fluxq.flow import flow_loss
from fluxq.kernels import COMPUTES, FORMATS, POLICIES
from fluxq.model import Flux, FluxConfig
from fluxq.timing import spread

RANK, T5_LENGTH, WARM_UP, LEAST = 16, 512, 2, 3


def main() -> None:
    arguments = arguments_of()
    device = torch.device(arguments.device)

    def prepare(report: dict[str, Any]) -> Iterator[Case]:
        torch.manual_seed(0)
        if arguments.vram and device.type == "cuda":
            share = arguments.vram / torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(share, 1.0), device)
        config, depth = FluxConfig.dev(), tuple(arguments.depth)
        if arguments.tiny:
            config, depth = FluxConfig.nano(), (1, 1)
        report |= {"depth": list(depth), "rank": RANK, "t5_length": T5_LENGTH, "vram_bytes": arguments.vram}

        report.setdefault("ceilings", measure_ceilings(device, arguments.tiny))

        @last_only
        def model(format: str) -> Flux:
            return random_flux(config, depth, device, format, RANK)

        for format, compute, size, policy in product(
            arguments.format, arguments.compute, arguments.sizes, arguments.policy
        ):
            name = f"steps: {size} px, {format}, {compute}, {policy}"
            bound = bound_ms(report["ceilings"], config, depth, size, policy, compute)
            yield Case(name, partial(measured, partial(model, format), compute, policy, size, arguments, bound))

    run_part("steps", arguments, prepare)


def arguments_of() -> Any:
    made = parser(__doc__ or "")
    made.add_argument("--depth", type=int, nargs=2, default=(19, 38), help="double and single blocks; default: dev's")
    made.add_argument("--sizes", type=int, nargs="+", default=(512, 768, 1024), help="pixels of a side")
    made.add_argument("--format", nargs="+", choices=FORMATS, default=("nf4",), help="how frozen weights are stored")
    made.add_argument("--compute", nargs="+", choices=COMPUTES, default=("bf16", "int8_dx"), help="how multiplied")
    made.add_argument(
        "--policy", nargs="+", choices=POLICIES, default=("recompute", "keep_all"), help="what blocks keep for backward"
    )
    made.add_argument("--steps", type=int, default=12, help=f"timed steps each, after {WARM_UP} that are not")
    made.add_argument("--seconds", type=float, default=15, help=f"but no more than fit into this, and {LEAST} at least")
    made.add_argument("--vram", type=gibibytes, help='most of the card that may be used, such as "12GiB"')
    return made.parse_args()


def gibibytes(text: str) -> int:
    match = re.fullmatch(r"([0-9.]+)\s*(?:GiB)?", text)
    if match is None:
        raise ValueError(text)  # argparse says what was wanted
    return int(float(match[1]) * 2**30)


def bound_ms(
    ceilings: Ceilings, config: FluxConfig, depth: Sequence[int], size: int, policy: str, compute: str
) -> float | None:
    """The products of all blocks at the card's best rates; the rest of the step is left out."""
    rows = T5_LENGTH + (size // 16) ** 2
    times = [block_ms(ceilings, kind, config.hidden_size, rows, policy, compute) for kind in KINDS]
    return None if None in times else sum(n * (t or 0.0) for n, t in zip(depth, times, strict=True))


def measured(
    model: Callable[[], Flux], compute: str, policy: str, size: int, arguments: Any, bound: float | None
) -> dict[str, Any]:
    """Milliseconds of training steps at `size` x `size` pixels, and the peak memory of all."""
    try:
        flux = model()
    except torch.OutOfMemoryError as error:
        return {"out_of_memory": f"the model itself: {error}".split(". ")[0]}
    device, cuda = flux.device, flux.device.type == "cuda"
    if cuda and compute.startswith("fp8") and torch.cuda.get_device_capability(device) < (8, 9):
        raise Skip("this card multiplies no fp8; there fluxq computes in int8")
    flux.set_policy(policy)
    flux.set_compute(compute)
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    try:
        times, loss = train(flux, size, arguments.steps, arguments.seconds)
        row: dict[str, Any] = {
            "ok": math.isfinite(loss),
            "ms": {"step": spread(times)},
            "bound_ms": bound,
            "loss": loss,
        }
    except torch.OutOfMemoryError as error:
        row = {"out_of_memory": str(error).split(". ")[0]}
    finally:
        flux.zero_grad(set_to_none=True)
    if cuda:
        row |= {"peak_bytes": torch.cuda.max_memory_allocated(), "reserved_bytes": torch.cuda.max_memory_reserved()}
    return row


def train(flux: Flux, size: int, steps: int, seconds: float) -> tuple[list[float], float]:
    """Milliseconds of each timed step, and the last loss."""
    device, config = flux.device, flux.config
    parameters = list(flux.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    latents, noise = torch.randn(2, 1, 16, size // 8, size // 8, device=device).unbind()
    txt = torch.randn(1, T5_LENGTH, config.context_in_dim, device=device, dtype=torch.bfloat16)
    pooled = torch.randn(1, config.vec_in_dim, device=device)
    times, loss, began = [], torch.zeros(()), time.perf_counter()
    while len(times) < WARM_UP + steps:
        start = time.perf_counter()
        if len(times) >= WARM_UP + LEAST and start - began > seconds:
            break
        loss = flow_loss(flux, latents, noise, torch.full((1,), 0.6), txt, pooled, 1.0).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append((time.perf_counter() - start) * 1e3)
    return times[WARM_UP:], float(loss.detach())


if __name__ == "__main__":
    main()
