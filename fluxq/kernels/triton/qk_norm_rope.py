"""RMS norm of queries and keys, RoPE, and concatenation of the streams: one pass over each stream's qkv.

A program handles one token: its heads are adjacent in a row of qkv and in a row of each joint buffer, so everything is
read and written once, 128 bits at a time. The backward pass undoes the rotation of RoPE.
"""

# A kernel is called with constexpr arguments as plain values, and with num_warps:
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import Stream
from .launch import Launch, power_of_2, shaped
from .layout import contiguous_rows
from .table import Choice, choose


def qk_norm_rope(streams: Sequence[Stream], cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v of all streams concatenated, (B, H, L, D/H), q and k normed and with RoPE applied; and rstd (2, B, L, H)
    fp32.

    In memory q, k and v are (B, L, H, D/H). The head width must be a power of two, 16 or more.
    """
    qkv, q_scale, _ = streams[0]
    batch, width, length = qkv.shape[0], len(q_scale), sum(s[0].shape[1] for s in streams)
    heads = qkv.shape[2] // (3 * width)
    q, k, v = (qkv.new_empty(batch, length, heads, width) for _ in range(3))
    rstd = qkv.new_empty(2, batch, length, heads, dtype=torch.float32)
    cos, sin = cos.contiguous(), sin.contiguous()  # a no-op unless a caller expanded them
    tile, start = choose("qk_norm_rope", qkv.device), 0
    for qkv, q_scale, k_scale in streams:
        qkv, tokens = contiguous_rows(qkv), qkv.shape[1]
        launch = _launch(tile, _forward, tokens, batch, heads, width, *qkv.stride()[:2], _per_image(cos), start, length)
        launch(qkv, q_scale.contiguous(), k_scale.contiguous(), cos, sin, q, k, v, rstd)
        start += tokens
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), rstd


def qk_norm_rope_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    q: Tensor,
    k: Tensor,
    rstd: Tensor,
    scales: Sequence[tuple[Tensor, Tensor]],
    lengths: Sequence[int],
    cos: Tensor,
    sin: Tensor,
    inputs: Sequence[Tensor] | None,
) -> list[Tensor]:
    """The gradient (B, L, 3 D) of each stream's qkv; `scales` and `lengths` are the streams'.

    The normed values are computed from q and k by undoing RoPE and dividing by the scale, or from `inputs`, the
    streams' qkv.
    """
    batch, heads, total, width = q.shape
    joint = [contiguous_rows(t) for t in (dq, dk, dv, q, k)]
    strides = [stride for t in joint for stride in t.stride()[:3]]
    cos, sin = cos.contiguous(), sin.contiguous()
    tile, grads, start = choose("qk_norm_rope_backward", q.device), [], 0
    for i, ((q_scale, k_scale), length) in enumerate(zip(scales, lengths, strict=True)):
        grad = q.new_empty(batch, length, 3 * heads * width)
        qkv = None if inputs is None else contiguous_rows(inputs[i])
        launch = _launch(
            tile, _backward, length, batch, heads, width, *strides, *((0, 0) if qkv is None else qkv.stride()[:2]),
            _per_image(cos), start, total, length,
        )  # fmt: skip
        launch(*joint, qkv, q_scale.contiguous(), k_scale.contiguous(), cos, sin, rstd, grad)
        grads.append(grad)
        start += length
    return grads


@shaped
def _launch(tile: Choice, kernel: Any, tokens: int, batch: int, heads: int, width: int, *numbers: int) -> Launch:
    return Launch(
        kernel, (tokens, batch), *numbers,
        H=heads, W=width, HEADS=power_of_2(heads), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _per_image(cos: Tensor) -> int:
    """The distance between the angles of two images; 0 if the images share them."""
    return cos.stride(0) if cos.shape[0] > 1 else 0


@triton.jit(do_not_specialize=["start", "L"])
def _forward(
    qkv_ptr,  # (B, tokens of this stream, 3 D)
    q_scale_ptr,  # (W,)
    k_scale_ptr,  # (W,)
    cos_ptr,  # (B or 1, 1, L, W/2) fp32
    sin_ptr,  # (B or 1, 1, L, W/2) fp32
    q_ptr,  # (B, L, H, W) out
    k_ptr,  # (B, L, H, W) out
    v_ptr,  # (B, L, H, W) out
    rstd_ptr,  # (2, B, L, H) fp32 out
    qkv_b,
    qkv_l,
    angles_b,
    start,  # where this stream starts in the joint sequence
    L,
    H: tl.constexpr,
    W: tl.constexpr,
    HEADS: tl.constexpr,
):
    b, token = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)
    place = head[:, None] * W + tl.arange(0, W)[None, :]
    mask = place < H * W
    qkv = qkv_ptr + b * qkv_b + token * qkv_l + place
    q = tl.load(qkv, mask=mask, other=0.0).to(tl.float32)
    k = tl.load(qkv + H * W, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(qkv + 2 * H * W, mask=mask, other=0.0)
    cos, sin = _angles(cos_ptr, sin_ptr, b * angles_b, start + token, W)
    out = (b * L + start + token) * (H * W) + place
    rstd = rstd_ptr + (b * L + start + token) * H + head
    q, q_rstd = _norm_and_rope(q, q_scale_ptr, cos, sin, W)
    tl.store(q_ptr + out, q.to(q_ptr.dtype.element_ty), mask=mask)
    tl.store(rstd, q_rstd, mask=head < H)
    k, k_rstd = _norm_and_rope(k, k_scale_ptr, cos, sin, W)
    tl.store(k_ptr + out, k.to(k_ptr.dtype.element_ty), mask=mask)
    tl.store(rstd + tl.num_programs(1).to(tl.int64) * L * H, k_rstd, mask=head < H)
    tl.store(v_ptr + out, v, mask=mask)


@triton.jit
def _norm_and_rope(x, scale_ptr, cos, sin, W: tl.constexpr):
    """x (heads, W) fp32 divided by its root mean square, times the scale, with RoPE applied; and 1 / rms (heads,)."""
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / W + 1e-6)
    scale = tl.load(scale_ptr + tl.arange(0, W)).to(tl.float32)
    return _apply_rope(x * rstd[:, None] * scale[None, :], cos, sin), rstd


@triton.jit
def _apply_rope(x, cos, sin):
    """Each adjacent pair of x (heads, W) rotated by its angle, cos and sin (1, W/2)."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), x.shape)


@triton.jit
def _angles(cos_ptr, sin_ptr, image, place, W: tl.constexpr):
    """cos and sin (1, W/2) of the token at `place`."""
    pair = image + place * (W // 2) + tl.arange(0, W // 2)[None, :]
    return tl.load(cos_ptr + pair).to(tl.float32), tl.load(sin_ptr + pair).to(tl.float32)


@triton.jit(do_not_specialize=["start", "L", "length"])
def _backward(
    dq_ptr,  # (B, H, L, W); rows of the tensors up to k have any strides
    dk_ptr,  # (B, H, L, W)
    dv_ptr,  # (B, H, L, W)
    q_ptr,  # (B, H, L, W) with RoPE applied
    k_ptr,  # (B, H, L, W) with RoPE applied
    qkv_ptr,  # (B, length, 3 D), or None
    q_scale_ptr,  # (W,)
    k_scale_ptr,  # (W,)
    cos_ptr,  # (B or 1, 1, L, W/2) fp32
    sin_ptr,  # (B or 1, 1, L, W/2) fp32
    rstd_ptr,  # (2, B, L, H) fp32
    grad_ptr,  # (B, length, 3 D) out
    dq_b,
    dq_h,
    dq_l,
    dk_b,
    dk_h,
    dk_l,
    dv_b,
    dv_h,
    dv_l,
    q_b,
    q_h,
    q_l,
    k_b,
    k_h,
    k_l,
    qkv_b,
    qkv_l,
    angles_b,
    start,  # where this stream starts in the joint sequence
    L,
    length,  # of this stream
    H: tl.constexpr,
    W: tl.constexpr,
    HEADS: tl.constexpr,
):
    b, token = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)
    row, column = head.to(tl.int64)[:, None], tl.arange(0, W)[None, :]
    place = head[:, None] * W + column
    mask = place < H * W
    at = start + token
    dq = tl.load(dq_ptr + b * dq_b + at * dq_l + row * dq_h + column, mask=mask, other=0.0).to(tl.float32)
    dk = tl.load(dk_ptr + b * dk_b + at * dk_l + row * dk_h + column, mask=mask, other=0.0).to(tl.float32)
    dv = tl.load(dv_ptr + b * dv_b + at * dv_l + row * dv_h + column, mask=mask, other=0.0)
    cos, sin = _angles(cos_ptr, sin_ptr, b * angles_b, at, W)
    q_scale = tl.load(q_scale_ptr + column).to(tl.float32)
    k_scale = tl.load(k_scale_ptr + column).to(tl.float32)
    rstd = rstd_ptr + (b * L + at) * H + head
    q_rstd = tl.load(rstd, mask=head < H, other=0.0)[:, None]
    k_rstd = tl.load(rstd + tl.num_programs(1).to(tl.int64) * L * H, mask=head < H, other=0.0)[:, None]
    if qkv_ptr is None:
        q = tl.load(q_ptr + b * q_b + at * q_l + row * q_h + column, mask=mask, other=0.0).to(tl.float32)
        k = tl.load(k_ptr + b * k_b + at * k_l + row * k_h + column, mask=mask, other=0.0).to(tl.float32)
        q, k = _apply_rope(q, cos, -sin) / q_scale, _apply_rope(k, cos, -sin) / k_scale
    else:
        qkv = qkv_ptr + b * qkv_b + token * qkv_l + place
        q = tl.load(qkv, mask=mask, other=0.0).to(tl.float32) * q_rstd
        k = tl.load(qkv + H * W, mask=mask, other=0.0).to(tl.float32) * k_rstd
    grad = grad_ptr + (b * length + token) * (3 * H * W) + place
    dq = _rms_norm_backward(_apply_rope(dq, cos, -sin) * q_scale, q, q_rstd, W)
    tl.store(grad, dq.to(grad_ptr.dtype.element_ty), mask=mask)
    dk = _rms_norm_backward(_apply_rope(dk, cos, -sin) * k_scale, k, k_rstd, W)
    tl.store(grad + H * W, dk.to(grad_ptr.dtype.element_ty), mask=mask)
    tl.store(grad + 2 * H * W, dv.to(grad_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rms_norm_backward(d_normed, normed, rstd, W: tl.constexpr):
    """The gradient before an RMS norm from that after it; all (heads, W), rstd (heads, 1)."""
    along = tl.sum(normed * d_normed, axis=1)[:, None] / W
    return rstd * (d_normed - normed * along)
