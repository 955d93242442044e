"""A frozen linear layer and its LoRA as one differentiable op, for every way of multiplying."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .activations import Activations, Wants
from .chunks import FEW_ROWS
from .dispatch import ops
from .replay import SMALL_RANK, keep_s, kept_s, placeholder, unread, will_be_unread
from .rounding import rounded
from .weights import Weight

COMPUTES = ("bf16", "int8", "int8_dx", "fp8", "fp8_dx")
"""bf16: in the input's dtype. int8, fp8: the forward product in 8 bits, the gradient as in bf16; _dx: both in 8 bits.
"""


def wants(compute: str, down: Tensor | None, like: Tensor, rotation: int = 0) -> Wants:
    """The form in which a layer with LoRA `down` (R, K), or without, wants its input, on the device of `like`."""
    if compute != "bf16":
        return Wants(dtype=_dtype(compute), down=None if rotation else down, rotation=rotation)
    return Wants(padding=0 if down is None else ops(like).padding(down.shape[0]))


def lora_linear(
    x: Tensor | Activations,
    weight: Weight,
    bias: Tensor | None = None,
    down: Tensor | None = None,
    up: Tensor | None = None,
    scale: float = 1.0,
    compute: str = "bf16",
    feeds: str | None = None,
    rotation: int = 0,
) -> Tensor:
    """x W^T + bias + scale (x down^T) up^T, differentiable in x, down and up.

    x (..., K), or the output that the previous op made for this layer's `wants`; weight encodes (N, K) in any stored
    format; bias (N,); down (R, K) and up (N, R) in any float dtype. LoRA and bias are used in x's dtype, the frozen
    weight is multiplied according to `compute`; gradients have each argument's dtype. The backward pass decodes the
    weight again; autograd never keeps it. `feeds`: the value that is computed from the output alone
    (fluxq/kernels/replay.py). `rotation`: the block in which 8-bit products rotate their factors
    (fluxq/kernels/rotation.py), 0 for none. Raises ValueError if widths do not match.
    """
    if compute not in COMPUTES:
        raise ValueError(f"compute must be one of {', '.join(COMPUTES)}, not {compute!r}")
    given = x if isinstance(x, Activations) else Activations(x)
    rows, columns = weight.shape
    padding = 0 if down is None or x is given.x else ops(given.x).padding(down.shape[0])
    if given.x.shape[-1] not in (columns, columns + padding):
        raise ValueError(f"the layer needs vectors of width {columns}, not {given.x.shape[-1]}")
    if (down is None) != (up is None):
        raise ValueError("LoRA needs down and up together; one of them is missing")
    if down is not None and up is not None and (down.shape[1] != columns or up.shape != (rows, down.shape[0])):
        raise ValueError(
            f"LoRA down {tuple(down.shape)} and up {tuple(up.shape)} do not fit a ({rows}, {columns}) weight"
        )
    if given.x.shape[:-1].numel() <= FEW_ROWS:
        compute = "bf16"
    return _LoRALinear.apply(given.x, given, weight, bias, down, up, scale, compute, rotation, feeds)


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        given: Activations,
        weight: Weight,
        bias: Tensor | None,
        down: Tensor | None,
        up: Tensor | None,
        scale: float,
        compute: str,
        rotation: int,
        feeds: str | None,
    ) -> Tensor:
        cast_down, cast_up = rounded(down, x.dtype), rounded(up, x.dtype)
        cast_bias = bias if bias is None else bias.to(x.dtype)
        keeps_s = cast_down is not None and given.s is None and cast_down.shape[0] <= SMALL_RANK
        if unread(feeds):
            y = placeholder(*x.shape[:-1], weight.shape[0], like=x)
            if cast_down is None or given.s is not None:
                s = given.s
            else:
                s = kept_s() if keeps_s else F.linear(x[..., : weight.shape[1]], cast_down)
        elif compute == "bf16":
            y, s = ops(x).lora_linear(x, weight, cast_bias, cast_down, cast_up, scale)
        else:
            y, s = _forward_8bit(given, weight, cast_bias, cast_down, up, scale, _dtype(compute), rotation)
        if keeps_s and will_be_unread(feeds):
            keep_s(s)
        # The gradient uses the rounded LoRA too, so that it is rounded only once.
        ctx.save_for_backward(x if down is not None else None, s, cast_down, cast_up)
        ctx.dtypes = [t if t is None else t.dtype for t in (down, up)]
        ctx.weight, ctx.scale, ctx.compute, ctx.rotation = weight, scale, compute, rotation
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        (dy,) = grad_outputs
        x, s, down, up = ctx.saved_tensors
        weight = ctx.weight if ctx.needs_input_grad[0] else None
        s = s if s is None else s.to(dy.dtype)
        if weight is not None and ctx.compute.endswith("_dx"):
            dx, ds = _dx_8bit(dy, weight, down, up, ctx.scale, _dtype(ctx.compute), ctx.rotation)
            gradients = (None, None) if ds is None else ops(dy).lora_gradients(dy, x, s, ds, ctx.scale)
        else:
            dx, *gradients = ops(dy).lora_linear_backward(dy, weight, x, s, down, up, ctx.scale)
        d_down, d_up = (d if d is None else d.to(dtype) for d, dtype in zip(gradients, ctx.dtypes, strict=True))
        return dx, None, None, None, d_down, d_up, None, None, None, None


def _dtype(compute: str) -> torch.dtype:
    return torch.int8 if compute.startswith("int8") else torch.float8_e4m3fn


def _forward_8bit(
    given: Activations,
    weight: Weight,
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    scale: float,
    dtype: torch.dtype,
    rotation: int,
) -> tuple[Tensor, Tensor | None]:
    """y and s, from the input and the weight as 8-bit rows, each row with its scale."""
    x, values, row_scale, s = given
    rows = x.flatten(0, -2)
    if values is None or row_scale is None:
        values, row_scale = ops(x).row_quantize(rows, dtype, rotation=rotation)
    if s is None and down is not None:
        s = rows @ down.t()
    w, w_scale = ops(x).to_rows(weight, dtype, rotation=rotation)
    y = ops(x).matmul_8bit(values, row_scale, w, w_scale, x.dtype, s, None if up is None else up * scale, bias)
    return y.view(*x.shape[:-1], -1), None if s is None else s.view(*x.shape[:-1], -1)


def _dx_8bit(
    dy: Tensor, weight: Weight, down: Tensor | None, up: Tensor | None, scale: float, dtype: torch.dtype, rotation: int
) -> tuple[Tensor, Tensor | None]:
    """The gradient of the input, in 8 bits, and that of s.

    It contracts over W's rows, so dy is multiplied by their scales before it is rounded (this saves a second copy of W
    and costs no accuracy). With a rotated W the product is rotated too, so LoRA's part is added rotated, and the sum is
    rotated back.
    """
    rows = dy.flatten(0, -2)
    w, w_scale = ops(dy).to_rows(weight, dtype, transposed=True, rotation=rotation)  # (K, N)
    values, row_scale = ops(dy).row_quantize(rows, dtype, w_scale)
    ds = None if up is None else rows.new_empty(rows.shape[0], up.shape[1]).addmm_(rows, up, beta=0, alpha=scale)
    if down is not None and rotation:
        down = ops(dy).rotate(down, rotation)
    dx = ops(dy).matmul_8bit(values, row_scale, w, None, dy.dtype, ds, None if down is None else down.t())
    dx = ops(dy).rotate(dx, rotation) if rotation else dx
    return dx.view(*dy.shape[:-1], -1), ds
