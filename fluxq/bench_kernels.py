"""`fluxq bench kernels`: the linear layer's kernels at FLUX's shapes, and with --tune the choices that suit this card.

Every case is checked against the reference before it is timed. Times are medians between events on the card, the
second-level cache flushed before each run; on a processor the reference is timed by the wall clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fluxq.errors import WrongRequest
from fluxq.kernels import FORMATS, dequantize, ops, quantize, reference
from fluxq.kernels.dispatch import triton_installed
from fluxq.report import console
from fluxq.timing import milliseconds
from fluxq.tuning import tuned_file, use_tuned

RANK, SCALE = 16, 0.7
LARGE, FEW = (2816, 12288, 3072), (1, 18432, 3072)  # M, N, K: the MLP at 768 x 768 pixels, and modulation
GAIN = 0.98  # what a choice must beat the one in use by: less is noise


@dataclass(frozen=True)
class Case:
    """One op at one shape: how to run it, and what plain PyTorch gives for the same."""

    op: str
    shape_class: str
    shape: tuple[int, int, int]
    run: Callable[[], Tensor]
    expected: Callable[[], Tensor]


def bench_kernels(tune: bool = False, runs: int = 20) -> dict[str, Any]:
    """A row an op and shape: milliseconds, TFLOP/s, and the time of a plain product in 16 bits over it.

    With `tune`, what is worth trying is tried, and what is faster is kept for every later run on this card. Raises
    WrongRequest where there is nothing to tune.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if tune and not (device.type == "cuda" and triton_installed()):
        raise WrongRequest("--tune measures Triton kernels on a CUDA card; here is none, or Triton is not installed")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "processor"
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
        console.print(f"{len(better)} measured choices in {tuned_file(name)}; every run on this card uses them")
    about = {"card": name, "torch": torch.__version__, "rank": RANK}
    return {**about, "rows": rows, "tuned": [[*key, asdict(choice)] for key, choice in better.items()]}


def earlier_choices(device: torch.device) -> dict[Any, Any]:
    """What was measured on this card before and stays in use until something beats it; nothing where it is damaged."""
    from fluxq.kernels.triton import table

    with suppress(OSError, ValueError):
        rows = table.read(tuned_file(torch.cuda.get_device_name(device)))
        table.lay_over(rows)
        return rows
    return {}


def keep(choices: dict[Any, Any], card: str) -> None:
    """Write them for every later run on this card. It is done after each op, so that a stop loses little."""
    from fluxq.kernels.triton import table

    table.write(tuned_file(card), choices, card)


def cases(device: torch.device) -> Iterator[Case]:
    """What is measured, a shape at a time: operands are made when they are asked for."""
    small = device.type != "cuda"
    for shape_class, (m, n, k) in (("large", LARGE), ("few", FEW)):
        shape = (max(1, m // 8), n // 8, k // 4) if small else (m, n, k)
        for format in FORMATS:
            yield from linear_cases(format, shape_class, shape, device)
        for format, dtype in (("int8", torch.int8), ("fp8", torch.float8_e4m3fn)):
            if shape_class == "large" and (format == "int8" or small or _has_fp8(device)):
                yield product_case(format, dtype, shape, device)


def linear_cases(format: str, shape_class: str, shape: tuple[int, int, int], device: torch.device) -> Iterator[Case]:
    """The layer over a weight in `format`, and for large inputs the way back."""
    m, n, k = shape
    x, dy, bias, down, up = (randn(*s, device=device) for s in ((m, k), (m, n), (n,), (RANK, k), (n, RANK)))
    stored = quantize(randn(n, k, device=device) * k**-0.5, format)
    exact, s, wide = dequantize(stored, torch.bfloat16), F.linear(x, down), F.pad(x, (0, ops(x).room(RANK)))

    def forward() -> Tensor:
        return ops(x).lora_linear(wide, stored, bias, down, up, SCALE)[0]

    def backward() -> Tensor:
        return ops(x).lora_linear_backward(dy, stored, wide, s, down, up, SCALE)[0][:, :k]

    yield Case(
        f"lora_linear_{format}", shape_class, shape, forward, lambda: F.linear(x, exact, bias) + SCALE * F.linear(s, up)
    )
    if shape_class == "large" and format != "bf16":
        yield Case(
            f"lora_linear_backward_{format}",
            shape_class,
            shape,
            backward,
            lambda: dy @ exact + SCALE * (dy @ up) @ down,
        )


def product_case(format: str, dtype: torch.dtype, shape: tuple[int, int, int], device: torch.device) -> Case:
    """The product of 8-bit rows."""
    m, n, k = shape
    (a, a_scale), (b, b_scale) = (ops(x).row_quantize(x, dtype) for x in (randn(r, k, device=device) for r in (m, n)))

    def expected() -> Tensor:
        x, w = (reference.row_dequantize(*pair, torch.float32) for pair in ((a, a_scale), (b, b_scale)))
        return x @ w.t()

    return Case(
        f"matmul_{format}", "large", shape, lambda: ops(a).matmul_8bit(a, a_scale, b, b_scale, torch.bfloat16), expected
    )


def randn(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(*shape, device=device).bfloat16()


def _has_fp8(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 9)


def timed(case: Case, device: torch.device, runs: int, found: tuple[Any, Any] | None) -> dict[str, Any]:
    """The row of a case, run by the choice that was found for it, or by the one in use."""
    m, n, k = case.shape
    x, w = (torch.randn(a, k, device=device).bfloat16() for a in (m, n))
    plain = milliseconds(lambda: F.linear(x, w), device, runs)
    with _using(case.op, found):
        check(case)
        ms = milliseconds(case.run, device, runs)
    row = {"op": case.op, "shape_class": case.shape_class, "shape": case.shape, "ms": ms, "plain_ms": plain}
    return row | {"tflops": 2e-9 * m * n * k / ms, "ratio": plain / ms}


def best_choice(case: Case, device: torch.device, runs: int) -> tuple[Any, Any] | None:
    """((op, generation, shape class), choice) of the fastest right choice, or None where the one in use is it."""
    from triton.errors import TritonError

    from fluxq.kernels.triton import table

    card = table.generation(device)
    check(case)
    in_use = table.choose(case.op, device, case.shape[0])
    best, fastest = None, GAIN * milliseconds(case.run, device, runs)
    for choice in table.candidates(case.op, card, case.shape_class):
        if replace(choice, word=in_use.word, why=in_use.why) == in_use:
            continue
        with table.using(case.op, choice):
            try:
                check(case)
                ms = milliseconds(case.run, device, runs)
            except (TritonError, RuntimeError, AssertionError):  # it does not fit this card, or is not right on it
                continue
        if ms < fastest:
            best, fastest = choice, ms
    return None if best is None else ((case.op, card, case.shape_class), best)


def _using(op: str, found: tuple[Any, Any] | None) -> Any:
    if found is None:
        return nullcontext()
    from fluxq.kernels.triton import table

    return table.using(op, found[1])


def check(case: Case) -> None:
    """Raise AssertionError where the op's answer is not the one expected, to a few roundings to bf16."""
    ours, expected = case.run().float(), case.expected().float()
    error = float((ours - expected).norm() / expected.norm())
    assert error <= 4 * torch.finfo(torch.bfloat16).eps, f"{case.op} is off by {error:.2%}"
