"""`fluxq bench kernels`: times the kernels at FLUX's shapes, and with --tune finds the best choices for this GPU.

Every case is checked before it is timed. Times are medians between GPU events, with the L2 cache flushed before each
run; on a CPU the reference is timed by the wall clock.
"""

from __future__ import annotations

from contextlib import nullcontext, suppress
from dataclasses import asdict, replace
from typing import Any

import torch

from fluxq.console import console
from fluxq.errors import WrongRequest
from fluxq.kernels.dispatch import triton_installed
from fluxq.models.tuning import tuned_file, use_tuned

from .kernel_cases import KernelCase, cases
from .memory_bound import Sizes
from .timing import milliseconds

SLACK = 2**-10  # Triton's interpreter cuts bf16 off, which doubles the error of one rounding
GAIN = 0.98  # a choice must be this much faster than the one in use; anything less is noise


def bench_kernels(tune: bool = False, runs: int = 20) -> dict[str, Any]:
    """A row per op and shape: milliseconds, TFLOP/s, and the ratio of what it is compared with: a plain product in 16
    bits, or for a memory-bound op a copy of as many bytes.

    With `tune`, other choices are tried, and the fastest are kept for every later run on this GPU. Raises WrongRequest
    if there is no GPU to tune.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if tune and not (device.type == "cuda" and triton_installed()):
        raise WrongRequest(
            "--tune measures Triton kernels on a CUDA GPU; this machine has none, or Triton is not installed"
        )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    better = earlier_choices(device) if tune else {}
    if not tune:
        use_tuned(device, console.print)
    rows = []
    for case in cases(device):
        best = best_choice(case, device, runs) if tune else None
        if best is not None:
            better[best[0]] = best[1]
            keep(better, name)
        rows.append(timed(case, device, runs, best))
        console.print(
            "{op:24} {shape_class:6} {ms:9.3f} ms {tflops:8.1f} TFLOP/s  {ratio:5.2f}x plain".format(**rows[-1])
        )
    if tune:
        keep(better, name)
        console.print(f"{len(better)} measured choices in {tuned_file(name)}; every later run on this GPU uses them")
    about = {"gpu": name, "torch": torch.__version__, "rank": Sizes.rank}
    return {**about, "rows": rows, "tuned": [[*key, asdict(choice)] for key, choice in better.items()]}


def earlier_choices(device: torch.device) -> dict[Any, Any]:
    """Choices measured on this GPU before, in use until a faster one is found; none if the file is damaged."""
    from fluxq.kernels.triton import table

    with suppress(OSError, ValueError):
        rows = table.read(tuned_file(torch.cuda.get_device_name(device)))
        table.use_measured(rows)
        return rows
    return {}


def keep(choices: dict[Any, Any], gpu: str) -> None:
    """Write the choices for later runs on this GPU; called after each op, so that an interruption loses little."""
    from fluxq.kernels.triton import table

    table.write(tuned_file(gpu), choices, gpu)


def timed(case: KernelCase, device: torch.device, runs: int, best: tuple[Any, Any] | None) -> dict[str, Any]:
    """The row of a case, run with the best choice, or with the one in use if there is none better."""
    plain = milliseconds(case.against, device, runs)
    with _using(case.op, best):
        check(case)
        ms = milliseconds(case.run, device, runs)
    row = {"op": case.op, "shape_class": case.shape_class, "shape": case.shape, "ms": ms, "plain_ms": plain}
    return row | {"tflops": 1e-9 * case.operations / ms, "ratio": plain / ms}


def best_choice(case: KernelCase, device: torch.device, runs: int) -> tuple[Any, Any] | None:
    """((op, generation, shape class), choice) of the fastest correct choice, or None if that is the one in use."""
    from triton.errors import TritonError

    from fluxq.kernels.triton import table

    gpu = table.generation(device)
    check(case)
    in_use = table.choose(case.op, device, case.size)
    best, fastest = None, GAIN * milliseconds(case.run, device, runs)
    for choice in table.candidates(case.op, gpu, case.shape_class):
        if replace(choice, word=in_use.word, why=in_use.why) == in_use:
            continue
        with table.using(case.op, choice):
            try:
                check(case)
                ms = milliseconds(case.run, device, runs)
            except (
                TritonError,
                RuntimeError,
                AssertionError,
            ):  # it does not fit this GPU, or gives wrong answers on it
                continue
        if ms < fastest:
            best, fastest = choice, ms
    return None if best is None else ((case.op, gpu, case.shape_class), best)


def _using(op: str, best: tuple[Any, Any] | None) -> Any:
    if best is None:
        return nullcontext()
    from fluxq.kernels.triton import table

    return table.using(op, best[1])


def check(case: KernelCase) -> None:
    """Raise AssertionError unless the op's answer is within the twice rule (closeness.py)."""
    checked = case.check(SLACK)
    if not checked["ok"]:
        errors = ", ".join(f"{e['ours']:.2%} (plain PyTorch {e['plain']:.2%})" for e in checked["errors"])
        raise AssertionError(f"{case.op} is off by {errors}, more than twice as much as plain PyTorch")
