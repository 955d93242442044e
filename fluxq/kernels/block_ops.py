"""The memory-bound steps of a block as differentiable ops: everything between its matrix products and attention.

Each keeps for its gradient only what its backward pass reads, and calls one backend function each way. A step before a
linear layer returns its output in the form that the layer `wants`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .activations import Activations, Wants
from .dispatch import ops
from .reference import Stream
from .replay import kept, kept_rows, placeholder, unread

PLAIN = Wants()


def modulate(x: Tensor, shift: Tensor, scale: Tensor, wants: Wants = PLAIN) -> Activations:
    """(1 + scale) LayerNorm(x) + shift. x (B, L, D); shift, scale (B, 1, D). Statistics in fp32 or better."""
    return fork_modulate(x, shift, scale, wants)[1]


def fork_modulate(x: Tensor, shift: Tensor, scale: Tensor, wants: Wants = PLAIN) -> tuple[Tensor, Activations]:
    """x, and x modulated as by `modulate`: for a stream that goes on beside what is made from it, so that the gradients
    of both are summed in one pass.
    """
    x, *modulated = _Modulate.apply(x, shift, scale, wants)
    return x, Activations(*modulated)


def gated_add(residual: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """residual + gate y, the last step of a block. residual, y (B, L, D); gate (B, 1, D)."""
    return _GatedAdd.apply(residual, gate, y)


def gated_add_modulate(
    residual: Tensor, gate: Tensor, y: Tensor, shift: Tensor, scale: Tensor, wants: Wants = PLAIN
) -> tuple[Tensor, Activations]:
    """x = residual + gate y, and (1 + scale) LayerNorm(x) + shift: `gated_add` and the `modulate` after it."""
    x, *modulated = _GatedAddModulate.apply(residual, gate, y, shift, scale, wants)
    return x, Activations(*modulated)


def qk_norm_rope(
    streams: Sequence[Stream], cos: Tensor, sin: Tensor, invertible: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (B, H, L, D/H) of all streams concatenated, q and k RMS-normed per head and with RoPE applied.

    streams: for each, qkv (B, L, 3 D) and the frozen scales (D/H,) of the query and key norms; cos, sin (B or 1, 1, L,
    D/H/2) for the joint sequence: RoPE rotates adjacent pairs (black-forest-labs/flux). The gradient is computed from q
    and k alone; if a scale is too near zero to divide by (not `invertible`), from qkv, which is then kept.
    """
    return _QKNormRope.apply(cos, sin, invertible, *(tensor for stream in streams for tensor in stream))[:3]


def is_invertible(scale: Tensor) -> bool:
    """Whether a norm's scale (D/H,) can be divided out again after RoPE.

    RoPE mixes adjacent pairs, so a number that is small next to its neighbor drowns in the neighbor's rounding: at a
    thirtieth, the gradient of that channel is 2 % off in bf16 (measured), and the whole gradient not visibly.
    """
    pairs = scale.float().abs().view(-1, 2)
    return bool((pairs.amin(1) > pairs.amax(1) / 30).all())


def gelu_tanh(h: Tensor, prepend: Tensor | None = None, wants: Wants = PLAIN) -> Activations:
    """gelu(h), tanh's approximation, with `prepend` (B, L, D) to its left if given; both are written where the next
    layer reads them. h (B, L, W).
    """
    return Activations(*_GeluTanh.apply(h, prepend, wants))


class _Modulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, scale: Tensor, wants: Wants) -> tuple[Tensor | None, ...]:
        ctx.save_for_backward(x, scale)
        return x, *_differentiable_in_x(ctx, ops(x).modulate(x, shift, scale, wants))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        (dx, dy, *_), (x, scale) = grad_outputs, ctx.saved_tensors
        if dy is None:  # nobody read x modulated
            return dx, None, None, None
        rows = any(ctx.needs_input_grad[1:3])
        return *ops(x).modulate_backward(dy, x, scale, rows, dx), None


class _GatedAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, residual: Tensor, gate: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(gate, y if ctx.needs_input_grad[1] else None)
        return placeholder(*y.shape, like=y) if unread("end") else ops(residual).gated_add(residual, gate, y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        (dout,), (gate, y) = grad_outputs, ctx.saved_tensors
        dy, d_gate = ops(dout).gated_add_backward(dout, gate, y)
        return dout, d_gate, dy


class _GatedAddModulate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, residual: Tensor, gate: Tensor, y: Tensor, shift: Tensor, scale: Tensor, wants: Wants
    ) -> tuple[Tensor | None, ...]:
        modulated = None  # a replay that has x must still modulate it

        def compute() -> Tensor:
            nonlocal modulated
            x, modulated = ops(residual).gated_add_modulate(residual, gate, y, shift, scale, wants)
            return x

        x = kept("residual", compute)
        if modulated is None:
            modulated = ops(x).modulate(x, shift, scale, wants)
        ctx.save_for_backward(x, gate, y if ctx.needs_input_grad[1] else None, scale)
        return x, *_differentiable_in_x(ctx, modulated)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        dx, dy, *_ = grad_outputs
        x, gate, y, scale = ctx.saved_tensors
        if dy is None:  # nobody read x modulated
            d_y, d_gate = (None, None) if dx is None else ops(x).gated_add_backward(dx, gate, y)
            return dx, d_gate, d_y, None, None, None
        rows = any(ctx.needs_input_grad[3:5])
        d_residual, d_y, d_gate, d_shift, d_scale = ops(x).gated_add_modulate_backward(dx, dy, x, gate, y, scale, rows)
        return d_residual, d_gate, d_y, d_shift, d_scale, None


class _QKNormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cos: Tensor, sin: Tensor, invertible: bool, *flat: Tensor) -> tuple[Tensor, ...]:
        inputs, scales = flat[::3], [*zip(flat[1::3], flat[2::3], strict=True)]

        def compute() -> tuple[Tensor, ...]:
            streams = [(qkv, *pair) for qkv, pair in zip(inputs, scales, strict=True)]
            return *ops(cos).qk_norm_rope(streams, cos, sin), *(() if invertible else inputs)

        q, k, v, rstd, *inputs_again = kept("qkv", compute)
        ctx.save_for_backward(q, k, rstd, cos, sin, *inputs_again)
        ctx.scales, ctx.lengths = scales, [qkv.shape[1] for qkv in inputs]
        ctx.mark_non_differentiable(rstd)
        ctx.set_materialize_grads(False)
        return q, k, v, rstd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        q, k, rstd, cos, sin, *inputs = ctx.saved_tensors
        grads = [torch.zeros_like(q) if g is None else g for g in grad_outputs[:3]]
        grads = ops(q).qk_norm_rope_backward(*grads, q, k, rstd, ctx.scales, ctx.lengths, cos, sin, inputs or None)
        return None, None, None, *(g for grad in grads for g in (grad, None, None))


class _GeluTanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, prepend: Tensor | None, wants: Wants) -> tuple[Tensor | None, ...]:
        h = kept_rows("hidden", h)
        ctx.save_for_backward(h)
        ctx.start = 0 if prepend is None else prepend.shape[-1]
        return _differentiable_in_x(ctx, ops(h).gelu_tanh(h, prepend, wants))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        (dy, *_), (h,) = grad_outputs, ctx.saved_tensors
        if dy is None:
            return None, None, None
        stop = ctx.start + h.shape[-1]
        dh = ops(h).gelu_tanh_backward(dy[..., ctx.start : stop], h) if ctx.needs_input_grad[0] else None
        return dh, dy[..., : ctx.start] if ctx.start else None, None


def _differentiable_in_x(ctx: Any, activations: Activations) -> Activations:
    ctx.mark_non_differentiable(*(t for t in activations[1:] if t is not None))
    ctx.set_materialize_grads(False)
    return activations
