"""A backend that makes what the kernels make and computes nothing: on `meta` it shows what a card would hold.

Its functions allocate as fluxq/kernels/triton does: outputs, and decoded weights in a scratch that stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch import Tensor

from fluxq.kernels import dispatch
from fluxq.kernels.activations import Activations, Wants
from fluxq.kernels.lora_linear import FEW_ROWS
from fluxq.kernels.weights import RowScaled


@contextmanager
def hollow(chunk: int = 3072, attention: bool = True) -> Iterator[None]:
    """Inside, every op is hollow; attention's gradient has what CUDA's has beside its outputs."""
    import sys

    module = sys.modules["fluxq.kernels.attention"]
    before, real = dispatch._forced, module._backward

    def backward(dout: Tensor, q: Tensor, *rest: Tensor | None) -> tuple[Tensor, ...]:
        again = torch.empty_like(dout, memory_format=torch.contiguous_format)
        sums = torch.empty(q.shape, dtype=torch.float32, device=q.device)
        found = real(again, q, *rest)
        del sums
        return found

    dispatch._forced = backend(chunk)
    if attention:
        module._backward = backward
    try:
        yield
    finally:
        dispatch._forced, module._backward = before, real


def backend(chunk: int) -> SimpleNamespace:
    scratches: dict[str, Tensor] = {}

    def scratch(rows: int, columns: int, like: Tensor) -> None:
        if "it" not in scratches or scratches["it"].numel() < rows * columns:
            scratches.pop("it", None)
            scratches["it"] = like.new_empty(rows * columns)

    def room(rank: int) -> int:
        return -(-rank // 32) * 32

    def outputs(like: Tensor, width: int, wants: Wants) -> Activations:
        b, length = like.shape[:2]
        y = like.new_empty(b, length, width + (wants.room if wants.dtype is None else 0))
        if wants.dtype is None:
            return Activations(y)
        s = None if wants.down is None else like.new_empty(b * length, len(wants.down), dtype=torch.float32)
        values = like.new_empty(b * length, width, dtype=torch.uint8)
        return Activations(y, values.view(wants.dtype), like.new_empty(b * length, dtype=torch.float32), s)

    def gated_add_modulate(residual, gate, y, shift, scale, wants):
        x = torch.empty_like(residual)
        return x, outputs(x, x.shape[-1], wants)

    def gelu_tanh(h, beside, wants):
        return outputs(h, h.shape[-1] + (0 if beside is None else beside.shape[-1]), wants)

    def qk_norm_rope(streams, cos, sin):
        qkv, width = streams[0][0], streams[0][1].shape[0]
        b, length = qkv.shape[0], sum(s[0].shape[1] for s in streams)
        heads = qkv.shape[-1] // 3 // width
        q, k, v = (qkv.new_empty(b, length, heads, width).transpose(1, 2) for _ in range(3))
        return q, k, v, qkv.new_empty(2, b, length, heads, dtype=torch.float32)

    def qk_norm_rope_backward(dq, dk, dv, q, k, rstd, scales, lengths, cos, sin, inputs):
        return [q.new_empty(q.shape[0], n, 3 * q.shape[1] * q.shape[3]) for n in lengths]

    def lora_linear(x, weight, bias, down, up, scale):
        n, k = weight.shape
        rows = x.data.reshape(-1, x.shape[-1])
        s = None if down is None else torch.mm(rows[:, :k], down.t())
        tail = None if up is None or rows.shape[1] == k else up.new_zeros(n, rows.shape[1] - k)
        y = rows.new_empty(len(rows), n)
        if not isinstance(weight, Tensor) and len(rows) > FEW_ROWS:
            scratch(min(n, chunk), k if tail is None else rows.shape[1], rows)
        return y.view(*x.shape[:-1], n), s if s is None else s.view(*x.shape[:-1], -1)

    def lora_linear_backward(dy, weight, x, s, down, up, scale):
        rows = dy.reshape(-1, dy.shape[-1])
        dx = None
        wide = 0 if x is None or down is None else x.shape[-1] - down.shape[1]
        if weight is not None:
            n, k = weight.shape
            tail = up.new_zeros(n, wide) if wide else None
            dx = rows.new_empty(len(rows), k + wide)
            if not isinstance(weight, Tensor) and len(rows) > FEW_ROWS:
                scratch(n, min(k, chunk) + wide, rows)
            del tail
        if x is None or s is None:
            return None if dx is None else dx.view(*dy.shape[:-1], -1), None, None
        ds = None if dx is not None and wide else torch.mm(rows, up * scale)
        d_down = down.new_empty(down.shape, dtype=torch.float32)
        d_up = up.new_empty(up.shape, dtype=torch.float32)
        del ds
        return None if dx is None else dx.view(*dy.shape[:-1], -1), d_down, d_up

    def to_rows(weight, dtype, transposed=False):
        if isinstance(weight, RowScaled) and weight.values.dtype == dtype and not transposed:
            return weight.values, weight.scale
        first = weight.codes if hasattr(weight, "codes") else weight.values if isinstance(weight, RowScaled) else weight
        shape = tuple(weight.shape)[::-1] if transposed else tuple(weight.shape)
        values = torch.empty(shape, dtype=torch.uint8, device=first.device).view(dtype)
        return values, torch.empty(weight.shape[0], device=first.device)

    def row_quantize(w, dtype, columns=None):
        return torch.empty(w.shape, dtype=torch.uint8, device=w.device).view(dtype), torch.empty(
            len(w), device=w.device
        )

    def gated_add_backward(dout, gate, y):
        return torch.empty(dout.shape, dtype=dout.dtype, device=dout.device), None if y is None else gate.clone()

    def gated_add_modulate_backward(dx, dy, x, gate, y, scale, rows):
        sums = (gate.clone() if y is not None else None, *((scale.clone(), scale.clone()) if rows else (None, None)))
        return torch.empty_like(x), torch.empty_like(x), *sums

    def modulate_backward(dy, x, scale, rows):
        return torch.empty_like(x), *((scale.clone(), scale.clone()) if rows else (None, None))

    return SimpleNamespace(
        room=room,
        modulate=lambda x, shift, scale, wants: outputs(x, x.shape[-1], wants),
        modulate_backward=modulate_backward,
        gated_add=lambda residual, gate, y: torch.empty_like(residual),
        gated_add_backward=gated_add_backward,
        gated_add_modulate=gated_add_modulate,
        gated_add_modulate_backward=gated_add_modulate_backward,
        gelu_tanh=gelu_tanh,
        gelu_tanh_backward=lambda dy, h: torch.empty(h.shape, dtype=h.dtype, device=h.device),
        qk_norm_rope=qk_norm_rope,
        qk_norm_rope_backward=qk_norm_rope_backward,
        lora_linear=lora_linear,
        lora_linear_backward=lora_linear_backward,
        matmul_8bit=lambda a, a_scale, b, b_scale, dtype, s=None, up=None, bias=None: torch.empty(
            len(a), len(b), dtype=dtype, device=a.device
        ),
        to_rows=to_rows,
        row_quantize=row_quantize,
        row_dequantize=lambda values, scale, dtype, out=None: torch.empty(
            values.shape, dtype=dtype, device=values.device
        ),
    )
