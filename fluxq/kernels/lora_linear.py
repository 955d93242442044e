"""A frozen linear layer and its LoRA as one differentiable op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fluxq.kernels.dispatch import ops
from fluxq.kernels.formats import Weight, dequantize

COMPUTES = ("bf16",)


def lora_linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    down: Tensor | None = None,
    up: Tensor | None = None,
    scale: float = 1.0,
    compute: str = "bf16",
) -> Tensor:
    """x W^T + bias + scale (x down^T) up^T, differentiable in x, down and up.

    x (..., K); weight stands for (N, K) in any stored format; bias (N,); down (R, K) and up (N, R) in any float dtype.
    They are multiplied in x's dtype; gradients come back in each argument's own. The weight is decoded anew in the
    backward pass and never kept by autograd. Raises ValueError where widths disagree.
    """
    if compute not in COMPUTES:
        raise ValueError(f"compute must be one of {', '.join(COMPUTES)}, not {compute!r}")
    rows, columns = weight.shape
    if x.shape[-1] != columns:
        raise ValueError(f"the layer takes vectors of width {columns}, not {x.shape[-1]}")
    if (down is None) != (up is None):
        raise ValueError("LoRA needs down and up together; one of them is missing")
    if down is not None and up is not None and (down.shape[1] != columns or up.shape != (rows, down.shape[0])):
        raise ValueError(
            f"LoRA down {tuple(down.shape)} and up {tuple(up.shape)} do not fit a ({rows}, {columns}) weight"
        )
    return _LoRALinear.apply(x, weight, bias, down, up, scale)


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Weight, bias: Tensor | None, down: Tensor | None, up: Tensor | None, scale: float
    ) -> Tensor:
        cast_down, cast_up, cast_bias = (t if t is None else t.to(x.dtype) for t in (down, up, bias))
        y, s = ops().lora_linear(x, dequantize(weight, x.dtype), cast_bias, cast_down, cast_up, scale)
        ctx.save_for_backward(x if down is not None else None, s, down, up)
        ctx.weight, ctx.scale = weight, scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        (dy,) = grad_outputs
        x, s, down, up = ctx.saved_tensors
        w = dequantize(ctx.weight, dy.dtype) if ctx.needs_input_grad[0] else None
        cast_down, cast_up = (t if t is None else t.to(dy.dtype) for t in (down, up))
        dx, d_down, d_up = ops().lora_linear_backward(dy, w, x, s, cast_down, cast_up, ctx.scale)
        if d_down is not None:
            d_down, d_up = d_down.to(down.dtype), d_up.to(up.dtype)
        return dx, None, None, d_down, d_up, None
