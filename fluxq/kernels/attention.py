"""Attention that also returns its log-sum-exp, so that the backward pass needs no second forward pass.

PyTorch's scaled_dot_product_attention keeps the log-sum-exp inside its graph, where a block's replay cannot reach it.
So this file calls its kernels by name, one pair per device.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .replay import kept

_aten = torch.ops.aten


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v with the heads joined: q, k, v (B, H, L, D) -> (B, L, H D).

    mask (B, L), if given, is True for the keys that may be attended to.
    """
    bias = None
    if mask is not None:
        padded = q.new_zeros(mask.shape[0], 1, 1, -(-mask.shape[1] // 16) * 16)  # CUDA needs rows aligned to 16
        bias = padded[..., : mask.shape[1]].masked_fill_(~mask[:, None, None], -torch.inf)
        bias = bias.expand(-1, q.shape[1], q.shape[2], -1)
    out = _Attention.apply(q, k, v, bias)  # (B, H, L, D)
    return out.transpose(1, 2).flatten(2)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        out, *rest = kept("attention", lambda: _forward(q, k, v, bias))
        ctx.save_for_backward(q, k, v, bias, out, *rest)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        return *_backward(grad_outputs[0], *ctx.saved_tensors), None


def _forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    """The output (B, H, L, D), the log-sum-exp, and whatever else the device's backward kernel needs."""
    if not q.is_cuda:
        return _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias)
    if _flash(q, bias):
        out, lse, _, _, _, _, seed, offset, _ = _aten._scaled_dot_product_flash_attention(q, k, v)
        return out, lse, seed, offset
    out, *rest = _aten._scaled_dot_product_efficient_attention(*_widened(q, k, v, bias), True)
    return out.to(q.dtype), *rest


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor, *random: Tensor
) -> tuple[Tensor, ...]:
    if not q.is_cuda:
        # Measured at (B, H, L, D) = (8, 4, 68, 32): the CPU's bf16 kernel takes 9.0 ms, in fp32 it takes 0.8.
        wide = torch.float32 if q.dtype == torch.bfloat16 and q.shape[2] < 128 else q.dtype
        given = (t.to(wide) for t in (dout, q, k, v, out))
        bias = bias if bias is None else bias.to(wide)
        grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(*given, lse, 0.0, False, attn_mask=bias)
    elif _flash(q, bias):
        length = q.shape[2]
        grads = _aten._scaled_dot_product_flash_attention_backward(
            dout, q, k, v, out, lse, None, None, length, length, 0.0, False, *random
        )
    else:
        wide_dout, *inputs, wide_out = _widened(dout, q, k, v, bias, out)
        grads = _aten._scaled_dot_product_efficient_attention_backward(
            wide_dout, *inputs, wide_out, lse, *random, 0.0, [True, True, True, False]
        )[:3]
    return tuple(g.to(q.dtype) for g in grads)


def _flash(q: Tensor, bias: Tensor | None) -> bool:
    """Whether flash attention runs. It needs 16 bits, no mask, and a GPU and a PyTorch build that support it."""
    return bias is None and q.dtype in (torch.bfloat16, torch.float16) and _has_flash(q.device)


@cache
def _has_flash(device: torch.device) -> bool:
    """PyTorch for Windows is built without flash attention, and GPUs before the RTX 30 series cannot run it."""
    return torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability(device) >= (8, 0)


def _widened(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors, bf16 ones in fp32 if the GPU has no bf16 arithmetic: the efficient kernel rejects bf16 there."""
    return [t.float() if t is not None and t.dtype == torch.bfloat16 and _no_bf16(t.device) else t for t in tensors]


@cache
def _no_bf16(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) < (8, 0)
