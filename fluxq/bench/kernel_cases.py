"""The kernels that are worth measuring, each at FLUX's shapes: the one list that measurements take their cases from.

`fluxq bench kernels` times all of it and tunes by it; `make gpu-kernels` holds the steps and the stored weights against
fp64 and against a copy of as many bytes; benchmarks/bench_*.py hand each op's cases to pytest-benchmark.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fluxq.kernels import FORMATS, Activations, dequantize, ops, quantize, reference

from .kernel_steps import EIGHT_BITS, STEPS, STORAGE, Sizes, Step, tensors

RANK, SCALE = 16, 0.7
LARGE, FEW = (2816, 12288, 3072), (1, 18432, 3072)  # M, N, K: the MLP at 768 x 768 pixels, and modulation


@dataclass(frozen=True)
class Case:
    """One op at one shape: how to run it, what it should give, and the plain thing whose time it is compared with.

    shape: (M, N, K) of a product, else of the tensor that matters. moved: bytes of a step. exact: what a product should
    give in fp64.
    """

    op: str
    shape_class: str
    shape: tuple[int, ...]
    run: Callable[[], Any]
    expected: Callable[[], Any]
    plain: Callable[[], Any]
    moved: int = 0
    exact: Callable[[], Any] | None = None

    @property
    def size(self) -> int:
        """What the table of choices tells shapes apart by."""
        return self.shape[-1] if self.op == "row_quantize" else self.shape[0]

    @property
    def operations(self) -> int:
        """Multiplications and additions of a product."""
        m, n, k = self.shape if len(self.shape) == 3 else (0, 0, 0)
        return 2 * m * n * k


def cases(device: torch.device) -> Iterator[Case]:
    """One for each op that has a choice and each of its classes of shape; operands are made when they are asked for."""
    small = device.type != "cuda"
    for shape_class, (m, n, k) in (("large", LARGE), ("few", FEW)):
        shape = (max(1, m // 8), n // 8, k // 4) if small else (m, n, k)
        for format in FORMATS:
            yield from linear_cases(format, shape_class, shape, device)
        for format in EIGHT_BITS:
            if shape_class == "large" and (format == "int8" or small or has_fp8(device)):
                yield product_case(format, shape, device)
    sizes = Sizes(device, 48, 256, 2, 16) if small else Sizes(device)
    seen: set[str] = set()
    for make in (*STEPS.values(), *(partial(storage_step, make=make) for make in STORAGE.values())):
        step = make(sizes)
        if step.op not in seen:
            seen.add(step.op)
            yield case_of(step)


def linear_cases(format: str, shape_class: str, shape: tuple[int, int, int], device: torch.device) -> Iterator[Case]:
    """The layer over a weight in `format`, and the way back."""
    sizes, (m, n, k) = Sizes(device), shape
    x, dy, bias, down, up = (sizes.randn(*s) for s in ((m, k), (m, n), (n,), (RANK, k), (n, RANK)))
    stored = quantize(sizes.randn(n, k, std=k**-0.5), format)
    decoded, s, wide = dequantize(stored, torch.bfloat16), F.linear(x, down), F.pad(x, (0, ops(x).padding(RANK)))

    def forward() -> Tensor:
        return ops(x).lora_linear(wide, stored, bias, down, up, SCALE)[0]

    def backward() -> Tensor:
        return ops(x).lora_linear_backward(dy, stored, wide, s, down, up, SCALE)[0][:, :k]

    def expected(dtype: torch.dtype = torch.bfloat16) -> Tensor:
        rows, w, added, a, b = (t.to(dtype) for t in (x, decoded, bias, down, up))
        return F.linear(rows, w, added) + SCALE * F.linear(F.linear(rows, a), b)

    def expected_back(dtype: torch.dtype = torch.bfloat16) -> Tensor:
        rows, w, a, b = (t.to(dtype) for t in (dy, decoded, down, up))
        return rows @ w + SCALE * (rows @ b) @ a

    op = f"lora_linear_{format}", f"lora_linear_backward_{format}"
    plain = lambda: F.linear(x, decoded), lambda: dy @ decoded  # noqa: E731
    exact = partial(expected, torch.float64), partial(expected_back, torch.float64)
    yield Case(op[0], shape_class, shape, forward, expected, plain[0], exact=exact[0])
    yield Case(op[1], shape_class, shape, backward, expected_back, plain[1], exact=exact[1])


def product_case(format: str, shape: tuple[int, int, int], device: torch.device) -> Case:
    """The product of 8-bit rows."""
    sizes, (m, n, k) = Sizes(device), shape
    x, w = sizes.randn(m, k), sizes.randn(n, k)
    (a, a_scale), (b, b_scale) = (ops(t).row_quantize(t, EIGHT_BITS[format]) for t in (x, w))

    def expected(dtype: torch.dtype = torch.bfloat16) -> Tensor:
        rows = (values.to(dtype) * scale.to(dtype)[:, None] for values, scale in ((a, a_scale), (b, b_scale)))
        return next(rows) @ next(rows).t()

    return Case(
        f"matmul_{format}",
        "large",
        shape,
        lambda: ops(a).matmul_8bit(a, a_scale, b, b_scale, torch.bfloat16),
        expected,
        lambda: F.linear(x, w),
        exact=partial(expected, torch.float64),
    )


def storage_step(s: Sizes, make: Callable[[Sizes, int, int], Step]) -> Step:
    """Of the MLP's first layer."""
    return make(s, 4 * s.width, s.width)


def case_of(step: Step) -> Case:
    """The step as the backend has it, against the reference and a copy of as many bytes."""
    given = next(iter(step.inputs.values()))  # the tensor that matters comes first
    first, width = tensors(given)[0], given.shape[-1]
    moved = step.moved(step.run(reference))
    source = torch.empty(moved // 2, dtype=torch.uint8, device=first.device).random_()
    return Case(
        step.op,
        str(1 << (width - 1).bit_length()) if step.op == "row_quantize" else "large",
        (given.shape[-2], width),
        lambda: step.run(ops(first)),
        lambda: step.run(reference),
        source.clone,
        moved,
    )


def joined(outputs: Any) -> Tensor:
    """All numbers of an op's outputs in one row."""
    return torch.cat([part.float().flatten() for part in comparable(outputs)])


def comparable(outputs: Any, width: int | None = None) -> list[Tensor]:
    """Every output as numbers: the padding behind rows of `width` cut off, 8-bit rows times their scales."""
    if isinstance(outputs, Tensor):
        return [outputs]
    if isinstance(outputs, Activations):
        rows = [] if outputs.values is None else [_matrix(outputs.values, outputs.scale)]
        return [outputs.x[..., :width], *rows, *([] if outputs.s is None else [outputs.s])]
    if len(outputs) == 2 and isinstance(outputs[0], Tensor) and outputs[0].dtype in EIGHT_BITS.values():
        return [_matrix(*outputs)]
    return [t for part in outputs if part is not None for t in comparable(part, width)]


def _matrix(values: Tensor, scale: Tensor | None) -> Tensor:
    """8-bit rows, or those of a matrix turned, times their scales."""
    assert scale is not None
    return values.double() * (scale.double()[:, None] if len(values) == len(scale) else scale.double())


def has_fp8(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 9)
