"""A frozen linear layer and its LoRA as one differentiable op, for every way of multiplying."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .activations import Activations, Wants
from .chunks import FEW_ROWS
from .dispatch import ops
from .dropout import Dropped
from .parts import by_part, s_gradient
from .products import Product, Use, eight_bit_dtype, gradients_with_dropout, input_gradient
from .replay import unread
from .rounding import rounded
from .weights import Weight

COMPUTES = ("bf16", "int8", "int8_dx", "fp8", "fp8_dx")
"""bf16: in the input's dtype. int8, fp8: the forward product in 8 bits, the gradient as in bf16; _dx: both in 8 bits.
"""


PLAIN = Wants()


def wants(
    compute: str, down: Tensor | None, like: Tensor | None, rotation: int = 0, feeds: Sequence[str] = ()
) -> Wants:
    """The form in which a layer with LoRA `down` (R, K), or without, wants its input, on the device of `like`
    (None only without LoRA).

    feeds: as for `lora_linear`. A replay that skips an 8-bit layer needs no 8-bit rows.
    """
    if compute != "bf16":
        if feeds and all(map(unread, feeds)):
            return PLAIN
        return Wants(dtype=eight_bit_dtype(compute), down=None if rotation else down, rotation=rotation)
    return PLAIN if down is None or like is None else _padded(ops(like).padding(down.shape[0]))


@lru_cache
def _padded(padding: int) -> Wants:
    return Wants(padding=padding)


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
    dropped: Dropped | None = None,
) -> Tensor:
    """x W^T + bias + scale (x down^T) up^T, differentiable in x, down and up.

    x (..., K), or the output that the previous op made for this layer's `wants`; weight encodes (N, K) in any stored
    format; bias (N,); down (R, K) and up (N, R) in any float dtype. LoRA and bias are used in x's dtype, the frozen
    weight is multiplied according to `compute`; gradients have each argument's dtype. The backward pass decodes the
    weight again; autograd never keeps it. `feeds`: the value that is computed from the output alone
    (fluxq/kernels/replay.py). `rotation`: the block in which 8-bit products rotate their factors
    (fluxq/kernels/rotation.py), 0 for none. `dropped`: what the LoRA leaves out (dropout.py). Raises ValueError if
    widths do not match.
    """
    return _apply(x, weight, bias, down, up, Use(scale, compute, rotation, (feeds,), dropped=dropped))


def lora_linear_parts(
    x: Tensor | Activations,
    weight: Weight,
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    scale: float,
    compute: str,
    parts: Sequence[slice],
    feeds: Sequence[str | None],
    rotation: int = 0,
    dropped: Dropped | None = None,
) -> tuple[Tensor, ...]:
    """`lora_linear` in parts: consecutive ranges of the N outputs, which together are all of them, each a tensor of its
    own that feeds something else. What depends on the input alone is done once.
    """
    return _apply(x, weight, bias, down, up, Use(scale, compute, rotation, tuple(feeds), tuple(parts), dropped))


def _apply(
    x: Tensor | Activations, weight: Weight, bias: Tensor | None, down: Tensor | None, up: Tensor | None, use: Use
) -> Any:
    if use.compute not in COMPUTES:
        raise ValueError(f"compute must be one of {', '.join(COMPUTES)}, not {use.compute!r}")
    given = x if isinstance(x, Activations) else Activations(x)
    (rows, columns), shape = weight.shape, given.x.shape
    if (down is None) != (up is None):
        raise ValueError("LoRA needs down and up together; one of them is missing")
    if down is not None and up is not None and (down.shape[1] != columns or up.shape != (rows, down.shape[0])):
        raise ValueError(
            f"LoRA down {tuple(down.shape)} and up {tuple(up.shape)} do not fit a ({rows}, {columns}) weight"
        )
    if shape[-1] != columns:
        padding = 0 if down is None or x is given.x else ops(given.x).padding(down.shape[0])
        if shape[-1] != columns + padding:
            raise ValueError(f"the layer needs vectors of width {columns}, not {shape[-1]}")
    if use.compute != "bf16" and shape[:-1].numel() <= FEW_ROWS:
        use = use._replace(compute="bf16")
    return _LoRALinear.apply(given.x, given, weight, bias, down, up, use)


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
        use: Use,
    ) -> Tensor | tuple[Tensor, ...]:
        cast_down, cast_up = rounded(down, x.dtype), rounded(up, x.dtype)
        bias = bias if bias is None or bias.dtype == x.dtype else bias.to(x.dtype)
        product = Product(x, given, weight, bias, cast_down, up if use.compute != "bf16" else cast_up, use)
        outputs = [product.part(part, feeds) for part, feeds in zip(use.parts, use.feeds, strict=True)]
        # The gradient uses the rounded LoRA too, so that it is rounded only once.
        ctx.save_for_backward(x if down is not None else None, product.s_for_backward(), cast_down, cast_up)
        ctx.dtypes = [t if t is None else t.dtype for t in (down, up)]
        ctx.weight, ctx.use, ctx.row_scales = weight, use, product.row_scales
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        (x, s, down, up), use = ctx.saved_tensors, ctx.use
        weight = ctx.weight if ctx.needs_input_grad[0] else None
        if use.dropped is not None and s is not None:
            dx, *gradients = gradients_with_dropout(grad_outputs, weight, x, s, down, up, use, ctx.row_scales)
        elif weight is not None and use.compute.endswith("_dx"):
            ds = None if up is None else s_gradient(by_part(grad_outputs), up, use.scale)
            dx = input_gradient(grad_outputs, weight, ctx.row_scales, down, ds, use)
            gradients = (None, None) if ds is None else ops(x).lora_gradients(grad_outputs, x, s, ds, use.scale)
        else:
            dys = grad_outputs[0] if len(grad_outputs) == 1 else grad_outputs
            dx, *gradients = ops(grad_outputs[0]).lora_linear_backward(dys, weight, x, s, down, up, use.scale)
        d_down, d_up = (d if d is None else d.to(dtype) for d, dtype in zip(gradients, ctx.dtypes, strict=True))
        return dx, None, None, None, d_down, d_up, None
