"""The kernels that are worth measuring, each at FLUX's shapes and with what plain PyTorch gives for the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fluxq.kernels import FORMATS, Activations, Wants, dequantize, ops, quantize, reference

RANK, SCALE = 16, 0.7
LARGE, FEW = (2816, 12288, 3072), (1, 18432, 3072)  # M, N, K: the MLP at 768 x 768 pixels, and modulation
HEAD = 128


@dataclass(frozen=True)
class Case:
    """One op at one shape: how to run it, what it should give, and the plain thing whose time it is compared with.

    shape: (M, N, K) of a product, else of the tensor that matters.
    """

    op: str
    shape_class: str
    shape: tuple[int, ...]
    run: Callable[[], Tensor]
    expected: Callable[[], Tensor]
    plain: Callable[[], Tensor]

    @property
    def size(self) -> int:
        """What the table of choices tells shapes apart by."""
        return self.shape[-1] if self.op == "row_quantize" else self.shape[0]


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
    yield from step_cases(device, small)


def linear_cases(format: str, shape_class: str, shape: tuple[int, int, int], device: torch.device) -> Iterator[Case]:
    """The layer over a weight in `format`, and the way back."""
    m, n, k = shape
    x, dy, bias, down, up = (randn(*s, device=device) for s in ((m, k), (m, n), (n,), (RANK, k), (n, RANK)))
    stored = quantize(randn(n, k, device=device) * k**-0.5, format)
    exact, s, wide = dequantize(stored, torch.bfloat16), F.linear(x, down), F.pad(x, (0, ops(x).room(RANK)))

    def forward() -> Tensor:
        return ops(x).lora_linear(wide, stored, bias, down, up, SCALE)[0]

    def backward() -> Tensor:
        return ops(x).lora_linear_backward(dy, stored, wide, s, down, up, SCALE)[0][:, :k]

    def expected() -> Tensor:
        return F.linear(x, exact, bias) + SCALE * F.linear(s, up)

    yield Case(f"lora_linear_{format}", shape_class, shape, forward, expected, lambda: F.linear(x, exact))
    yield Case(
        f"lora_linear_backward_{format}",
        shape_class,
        shape,
        backward,
        lambda: dy @ exact + SCALE * (dy @ up) @ down,
        lambda: dy @ exact,
    )


def product_case(format: str, dtype: torch.dtype, shape: tuple[int, int, int], device: torch.device) -> Case:
    """The product of 8-bit rows."""
    m, n, k = shape
    (a, a_scale), (b, b_scale) = (ops(x).row_quantize(x, dtype) for x in (randn(r, k, device=device) for r in (m, n)))

    def expected() -> Tensor:
        x, w = (reference.row_dequantize(*pair, torch.float32) for pair in ((a, a_scale), (b, b_scale)))
        return x @ w.t()

    x, w = randn(m, k, device=device), randn(n, k, device=device)
    return Case(
        f"matmul_{format}",
        "large",
        shape,
        lambda: ops(a).matmul_8bit(a, a_scale, b, b_scale, torch.bfloat16),
        expected,
        lambda: F.linear(x, w),
    )


def step_cases(device: torch.device, small: bool) -> Iterator[Case]:
    """What waits for memory, for one picture: each op as the backend has it, and as the reference has it."""
    tokens, width = (48, 2 * HEAD) if small else (LARGE[0], LARGE[2])

    def make(*shape: int) -> Tensor:
        return randn(*shape, device=device)

    x, y, dy, hidden, dh = (make(1, tokens, w) for w in (width, width, width, 4 * width, 4 * width))
    shift, scale, gate = (make(1, 1, width) for _ in range(3))
    qkv, w = make(1, tokens, 3 * width), make(4 * width, width)
    norms = 1 + 0.1 * make(HEAD), 1 + 0.1 * make(HEAD)
    angles = torch.rand(1, 1, tokens, HEAD // 2, device=device)
    cos, sin = angles.cos(), angles.sin()
    q, k, _, rstd = reference.qk_norm_rope([(qkv, *norms)], cos, sin)
    dq, dk, dv = (torch.randn_like(q) for _ in range(3))
    stored = quantize(w, "nf4")
    int8, down, wide_down = torch.int8, make(RANK, width), make(RANK, 4 * width)

    calls: dict[str, tuple[Tensor, Callable[[ModuleType], Any]]] = {
        "modulate": (x, lambda o: o.modulate(x, shift, scale, Wants())),
        "modulate_8bit": (x, lambda o: o.modulate(x, shift, scale, Wants(dtype=int8))),
        "modulate_8bit_down": (x, lambda o: o.modulate(x, shift, scale, Wants(dtype=int8, down=down))),
        "modulate_backward": (x, lambda o: o.modulate_backward(dy, x, scale, False)),
        "modulate_backward_sums": (x, lambda o: o.modulate_backward(dy, x, scale, True)),
        "gated_add": (x, lambda o: o.gated_add(x, gate, y)),
        "gated_add_backward": (x, lambda o: o.gated_add_backward(dy, gate, None)),
        "gated_add_backward_sums": (x, lambda o: o.gated_add_backward(dy, gate, y)),
        "gelu_tanh": (hidden, lambda o: o.gelu_tanh(hidden, None, Wants())),
        "gelu_tanh_8bit": (hidden, lambda o: o.gelu_tanh(hidden, None, Wants(dtype=int8))),
        "gelu_tanh_8bit_down": (hidden, lambda o: o.gelu_tanh(hidden, None, Wants(dtype=int8, down=wide_down))),
        "gelu_tanh_backward": (hidden, lambda o: o.gelu_tanh_backward(dh, hidden)),
        "qk_norm_rope": (qkv, lambda o: o.qk_norm_rope([(qkv, *norms)], cos, sin)[:3]),
        "qk_norm_rope_backward": (
            qkv,
            lambda o: o.qk_norm_rope_backward(dq, dk, dv, q, k, rstd, [norms], [tokens], cos, sin, None),
        ),
        "dequantize": (w, lambda o: o.dequantize(stored, torch.bfloat16)),
        "dequantize_transposed": (w, lambda o: o.dequantize(stored, torch.bfloat16, transposed=True)),
        "dequantize_transposed_rotated": (w, lambda o: o.to_rows(stored, int8, True, 256)),
        "rotate": (x, lambda o: o.rotate(x, 256)),
        "nf4_quantize": (w, lambda o: o.nf4_quantize(w)),
        "row_quantize": (x, lambda o: Activations(x[..., :1], *o.row_quantize(x[0], int8))),
    }
    for op, (largest, call) in calls.items():
        yield Case(
            op,
            str(1 << (width - 1).bit_length()) if op == "row_quantize" else "large",
            (tokens, largest.shape[-1]),
            lambda call=call: joined(call(ops(x))),
            lambda call=call: joined(call(reference)),
            largest.clone,
        )


def joined(answer: Any) -> Tensor:
    """All numbers of an op's answer in one row; 8-bit rows as what they stand for."""
    if isinstance(answer, Tensor):
        return answer.float().flatten()
    if isinstance(answer, Activations) and answer.values is not None and answer.scale is not None:
        rows = reference.row_dequantize(answer.values, answer.scale, torch.float32)
        answer = (answer.x, rows, answer.s)
    return torch.cat([part.float().flatten() for part in answer if part is not None])


def randn(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(*shape, device=device).bfloat16()


def _has_fp8(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 9)
