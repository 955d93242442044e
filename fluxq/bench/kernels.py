"""`fluxq bench kernels`: the linear layer's kernels at FLUX's shapes, and with --tune the choices that suit this GPU.

Every case is checked against the reference before it is timed. Times are medians between events on the GPU, the
second-level cache flushed before each run; on a CPU the reference is timed by the wall clock.
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

from .kernel_cases import Case, cases
from .memory_bound import Sizes
from .timing import milliseconds

SLACK = 2**-10  # Triton's interpreter cuts bf16 off, which doubles the error of one rounding
GAIN = 0.98  # what a choice must beat the one in use by: less is noise


def bench_kernels(tune: bool = False, runs: int = 20) -> dict[str, Any]:
    """A row an op and shape: milliseconds, TFLOP/s, and over them the time of a plain product in 16 bits, or for what
    waits for memory of a copy of as many bytes.

    With `tune`, what is worth trying is tried, and what is faster is kept for every later run on this GPU. Raises
    WrongRequest where there is nothing to tune.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if tune and not (device.type == "cuda" and triton_installed()):
        raise WrongRequest("--tune measures Triton kernels on a CUDA GPU; here is none, or Triton is not installed")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    better = earlier_choices(device) if tune else {}
    if not tune:
        use_tuned(device, console.print)
    rows = []
    for case in cases(device):
        found = best_choice(case, device, runs) if tune else None
        if found is not None:
            better[found[0]] = found[1]
            keep(better, name)
        rows.append(timed(case, device, runs, found))
        console.print(
            "{op:24} {shape_class:6} {ms:9.3f} ms {tflops:8.1f} TFLOP/s  {ratio:5.2f}x plain".format(**rows[-1])
        )
    if tune:
        keep(better, name)
        console.print(f"{len(better)} measured choices in {tuned_file(name)}; every run on this GPU uses them")
    about = {"gpu": name, "torch": torch.__version__, "rank": Sizes.rank}
    return {**about, "rows": rows, "tuned": [[*key, asdict(choice)] for key, choice in better.items()]}


def earlier_choices(device: torch.device) -> dict[Any, Any]:
    """What was measured on this GPU before and stays in use until something beats it; nothing where it is damaged."""
    from fluxq.kernels.triton import table

    with suppress(OSError, ValueError):
        rows = table.read(tuned_file(torch.cuda.get_device_name(device)))
        table.lay_over(rows)
        return rows
    return {}


def keep(choices: dict[Any, Any], gpu: str) -> None:
    """Write them for every later run on this GPU. It is done after each op, so that a stop loses little."""
    from fluxq.kernels.triton import table

    table.write(tuned_file(gpu), choices, gpu)


def timed(case: Case, device: torch.device, runs: int, found: tuple[Any, Any] | None) -> dict[str, Any]:
    """The row of a case, run by the choice that was found for it, or by the one in use."""
    plain = milliseconds(case.against, device, runs)
    with _using(case.op, found):
        check(case)
        ms = milliseconds(case.run, device, runs)
    row = {"op": case.op, "shape_class": case.shape_class, "shape": case.shape, "ms": ms, "plain_ms": plain}
    return row | {"tflops": 1e-9 * case.operations / ms, "ratio": plain / ms}


def best_choice(case: Case, device: torch.device, runs: int) -> tuple[Any, Any] | None:
    """((op, generation, shape class), choice) of the fastest right choice, or None where the one in use is it."""
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
            except (TritonError, RuntimeError, AssertionError):  # it does not fit this GPU, or is not right on it
                continue
        if ms < fastest:
            best, fastest = choice, ms
    return None if best is None else ((case.op, gpu, case.shape_class), best)


def _using(op: str, found: tuple[Any, Any] | None) -> Any:
    if found is None:
        return nullcontext()
    from fluxq.kernels.triton import table

    return table.using(op, found[1])


def check(case: Case) -> None:
    """Raise AssertionError unless the op's answer is within the twice rule (closeness.py)."""
    checked = case.check(SLACK)
    if not checked["ok"]:
        errors = ", ".join(f"{e['ours']:.2%} (plain PyTorch {e['plain']:.2%})" for e in checked["errors"])
        raise AssertionError(f"{case.op} is off by {errors}, more than twice as much as plain PyTorch")
