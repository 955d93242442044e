"""The kernels' cases, stated once: each op at FLUX.1's shapes, how it is checked, and what it is timed against.

`fluxq bench kernels` times them and tunes by them. `make gpu`'s kernel part and benchmarks/bench_kernels.py time them
next to other libraries. `make aot` compiles what they launch for every GPU generation. Tests check their results and
count their compilations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fluxq.kernels import FORMATS, Activations, Weight, backend, lora_linear, ops, quantize, reference, wants
from fluxq.kernels.chunks import FEW_ROWS

from .closeness import twice_rule
from .memory_bound import EIGHT_BITS, ROWS, STEPS, STORAGE, Sizes, Step, has_fp8, numbers, numbers_exactly, tensors

SCALE = 0.7
LAYERS = {"qkv": (3, 1), "proj": (1, 1), "mlp.0": (4, 1), "mlp.2": (1, 4), "linear2": (1, 5), "modulation": (6, 1)}
"""A block's layers, (N, K) in multiples of the width D. A single block's linear1 is called as qkv and as mlp.0."""


@dataclass(frozen=True)
class KernelCase:
    """One op at one shape. shape: (M, N, K) of a product, else of the first input. moved: bytes, of memory-bound ops.

    run: the backend of the device; plain: PyTorch in the same dtypes; exact: fp64 (each a list of tensors, output by
    output). against: what it is timed against, a product in bf16 or a copy of as many bytes.
    """

    op: str
    shape_class: str
    shape: tuple[int, ...]
    run: Callable[[], Any]
    plain: Callable[[], Any]
    exact: Callable[[], Sequence[Tensor]]
    against: Callable[[], Any]
    numbers: Callable[[Any], list[Tensor]] = lambda outputs: [outputs]
    moved: int = 0

    @property
    def size(self) -> int:
        """What the table of choices distinguishes shapes by."""
        return self.shape[-1] if self.op == "row_quantize" else self.shape[0]

    @property
    def operations(self) -> int:
        """Multiplications and additions of a product."""
        m, n, k = self.shape if len(self.shape) == 3 else (0, 0, 0)
        return 2 * m * n * k

    def check(self, slack: float = 1e-6) -> dict[str, Any]:
        """Errors output by output, and whether all are within the twice rule; NF4 codes must be equal to the bit."""
        ours, plain = self.run(), self.plain()
        checked = twice_rule(self.numbers(ours), self.numbers(plain), self.exact(), slack)
        if self.op == "nf4_quantize":
            checked["ok"] = checked["ok"] and all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
        return checked


@dataclass(frozen=True)
class Layer:
    """A frozen linear layer with LoRA, its input and the gradient of its output, all random."""

    x: Tensor  # (M, K)
    dense: Tensor  # (N, K) bf16, which was quantized
    weight: Weight
    bias: Tensor  # (N,)
    down: Tensor  # (R, K) fp32
    up: Tensor  # (N, R) fp32
    dy: Tensor  # (M, N)
    scale: float = SCALE

    @classmethod
    def random(cls, s: Sizes, shape: tuple[int, int, int], format: str) -> Layer:
        m, n, k = shape
        dense, down = s.randn(n, k, std=k**-0.5), s.randn(s.rank, k, std=k**-0.5).float()
        with backend("reference"):  # what is measured has no part in making its operands
            weight = quantize(dense, format)
        return cls(s.randn(m, k), dense, weight, s.randn(n), down, s.randn(n, s.rank).float(), s.randn(m, n))

    def given(self, compute: str = "bf16", rotation: int = 0) -> Activations:
        """The input as the op before writes it: with padding behind each row, or with 8-bit rows and s."""
        if compute != "bf16":
            dtype = EIGHT_BITS[compute.removesuffix("_dx")]
            values, scale = ops(self.x).row_quantize(self.x, dtype, rotation=rotation)
            return Activations(self.x, values, scale, (self.x.float() @ self.down.t()).to(self.x.dtype))
        wide = F.pad(self.x, (0, wants("bf16", self.down, self.x).padding))
        return Activations(wide)

    def gradients(self, run: Callable[[Tensor, Tensor, Tensor], Tensor], x: Tensor | None = None) -> list[Tensor]:
        """y, and the gradients of x, down and up; y = run(x, down, up)."""
        leaves = [t.detach().requires_grad_() for t in (self.x if x is None else x, self.down, self.up)]
        y = run(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, self.dy)]

    def ours(
        self, given: Activations, compute: str = "bf16", weight: Weight | None = None, rotation: int = 0
    ) -> list[Tensor]:
        """`gradients` by `lora_linear`, as training calls it."""
        stored = self.weight if weight is None else weight
        return self.gradients(
            lambda x, d, u: lora_linear(
                given._replace(x=x), stored, self.bias, d, u, self.scale, compute, rotation=rotation
            ),
            given.x,
        )

    def plain(self, weight: Tensor) -> list[Tensor]:
        """`gradients` by autograd over the dense `weight`."""

        def run(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
            return F.linear(x, weight, self.bias) + self.scale * F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype))

        return self.gradients(run)

    def exact(self, weight: Tensor, some: slice) -> list[Tensor]:
        """`gradients` in fp64 over the dense `weight`; of y and dx some rows."""
        x, dy, w, down, up = (t.double() for t in (self.x, self.dy, weight, self.down, self.up))
        y = x[some] @ w.t() + self.bias.double() + self.scale * (x[some] @ down.t()) @ up.t()
        ds = self.scale * dy @ up  # (M, R)
        return [y, dy[some] @ w + ds[some] @ down, ds.t() @ x, self.scale * dy.t() @ (x @ down.t())]


def cases(
    device: torch.device, sizes: Sizes | None = None, stored: tuple[int, int] | None = None
) -> Iterator[KernelCase]:
    """One per op in the table of choices and per shape class; operands are made one case at a time. stored: the shape
    of weights that change form, by default that of the MLP's first layer.
    """
    s = sizes or (Sizes(device) if device.type == "cuda" else SMALL)
    large = (max(s.tokens, FEW_ROWS + 1), *layer_shape(s, "mlp.0"))
    few = (1, *layer_shape(s, "modulation"))
    for shape_class, shape in (("large", large), ("few", few)):
        for format in FORMATS:
            yield from linear_cases(Layer.random(s, shape, format), format, shape_class)
    for bits in EIGHT_BITS:
        if bits == "int8" or has_fp8(device):
            yield product_case(s, bits, large)
    n, k = stored or layer_shape(s, "mlp.0")
    steps: list[Callable[[], Step]] = [partial(make, s) for make in (*STEPS.values(), *ROWS.values())]
    steps += [partial(make, s, n, k) for make in STORAGE.values()]
    seen: set[tuple[str, str]] = set()
    for make in steps:
        case = step_case(make())
        if (case.op, case.shape_class) not in seen:
            seen.add((case.op, case.shape_class))
            yield case


SMALL = Sizes(torch.device("cpu"), tokens=48, width=256, heads=2, text=16)
"""For a CPU: only to show that all of it runs."""


def layer_shape(s: Sizes, layer: str) -> tuple[int, int]:
    """(N, K)"""
    n, k = LAYERS[layer]
    return n * s.width, k * s.width


def linear_cases(layer: Layer, format: str, shape_class: str) -> Iterator[KernelCase]:
    """The layer forward and backward, without autograd; of the gradients only that of x is compared."""
    decoded = reference.dequantize(layer.weight, torch.bfloat16)
    down, up = layer.down.bfloat16(), layer.up.bfloat16()
    x, dy, bias, wide = layer.x, layer.dy, layer.bias, layer.given().x
    (m, k), n = x.shape, len(decoded)
    s = F.linear(x, down)

    def forward() -> Tensor:
        return ops(x).lora_linear(wide, layer.weight, bias, down, up, SCALE)[0]

    def backward() -> Tensor:
        return ops(x).lora_linear_backward(dy, layer.weight, wide, s, down, up, SCALE)[0][:, :k]

    def plain(dtype: torch.dtype = torch.bfloat16) -> Tensor:
        rows, w, added, a, b = (t.to(dtype) for t in (x, decoded, bias, down, up))
        return F.linear(rows, w, added) + SCALE * F.linear(F.linear(rows, a), b)

    def plain_back(dtype: torch.dtype = torch.bfloat16) -> Tensor:
        rows, w, a, b = (t.to(dtype) for t in (dy, decoded, down, up))
        return rows @ w + SCALE * (rows @ b) @ a

    for op, run, compared, against in (
        (f"lora_linear_{format}", forward, plain, lambda: F.linear(x, decoded, bias)),
        (f"lora_linear_backward_{format}", backward, plain_back, lambda: dy @ decoded),
    ):
        exact = lambda compared=compared: [compared(torch.float64)]  # noqa: E731
        yield KernelCase(op, shape_class, (m, n, k), run, compared, exact, against)


def product_case(s: Sizes, bits: str, shape: tuple[int, int, int]) -> KernelCase:
    """The product of 8-bit rows with their scales."""
    m, n, k = shape
    x, w = s.randn(m, k), s.randn(n, k)
    (a, a_scale), (b, b_scale) = (reference.row_quantize(t, EIGHT_BITS[bits]) for t in (x, w))

    def plain(dtype: torch.dtype = torch.bfloat16) -> Tensor:
        rows = (values.to(dtype) * scale.to(dtype)[:, None] for values, scale in ((a, a_scale), (b, b_scale)))
        return next(rows) @ next(rows).t()

    def run() -> Tensor:
        return ops(a).matmul_8bit(a, a_scale, b, b_scale, torch.bfloat16)

    return KernelCase(
        f"matmul_{bits}", "large", shape, run, plain, lambda: [plain(torch.float64)], lambda: F.linear(x, w)
    )


def step_case(step: Step) -> KernelCase:
    """A memory-bound op, timed against a copy of as many bytes."""
    given = next(iter(step.inputs.values()))  # the tensor that matters comes first
    first, width = tensors(given)[0], given.shape[-1]
    moved = step.moved(step.run(reference))
    source = torch.empty(moved // 2, dtype=torch.uint8, device=first.device).random_()
    return KernelCase(
        step.op,
        str(1 << (width - 1).bit_length()) if step.op == "row_quantize" else "large",
        (given.shape[-2], width),
        lambda: step.run(ops(first)),
        lambda: step.run(reference),
        lambda: numbers_exactly(step),
        source.clone,
        partial(numbers, step),
        moved,
    )
