"""LayerNorm with shift and scale, and the gated sum before it, each a single pass over the rows.

A program holds whole rows in registers, so mean, variance and the largest magnitude need no second read. If the product
with LoRA's `down` is wanted too, a program handles 16 rows, which a tensor core multiplies at a time, and reads back
from the cache what it has just written. Each program sums the gradients of shift, scale and gate over its rows and
stores the sums; PyTorch adds up the programs, always in the same order.
"""

# A kernel is called with constexpr arguments as plain values, and with num_warps:
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activations import Activations, Wants
from .eight_bits import (
    Down,
    multiply,
    multiply_by_down,
    outputs,
    registers,
    scales_of,
    tile_and_down,
    to_8_bits,
    with_dtype,
)
from .launch import Launch, ceildiv, power_of_2, shaped
from .layout import contiguous_rows
from .rotation import rotated
from .table import Choice, choose


def modulate(x: Tensor, shift: Tensor, scale: Tensor, wants: Wants) -> Activations:
    """(1 + scale) LayerNorm(x) + shift, as the next layer `wants` it. x (B, L, D); shift, scale (B, 1, D)."""
    return _forward(x, None, None, None, shift, scale, wants)


def gated_add_modulate(
    residual: Tensor, gate: Tensor, y: Tensor, shift: Tensor, scale: Tensor, wants: Wants
) -> tuple[Tensor, Activations]:
    """x = residual + gate y, and x modulated: `gated_add` and the `modulate` after it in one pass."""
    x = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
    return x, _forward(residual, gate, y, x, shift, scale, wants)


def _forward(
    x: Tensor, gate: Tensor | None, y: Tensor | None, total: Tensor | None, shift: Tensor, scale: Tensor, wants: Wants
) -> Activations:
    x, shift, scale = contiguous_rows(x), contiguous_rows(shift), contiguous_rows(scale)
    gate, y = (t if t is None else contiguous_rows(t) for t in (gate, y))
    out = outputs(x, x.shape[2], wants)
    if wants.dtype is None:
        down = Down(None, None, 16, choose("modulate", x.device))
    else:
        down = tile_and_down("modulate_8bit", wants, x)
    launch = _launch(
        down.tile, wants.dtype, wants.rotation, down.block, 0 if down.fused is None else len(down.fused), x.shape,
        *x.stride()[:2], 0 if gate is None else gate.stride(0), *((0, 0) if y is None else y.stride()[:2]),
        shift.stride(0), scale.stride(0), out.x.stride(1),
    )  # fmt: skip
    s = None if down.fused is None else out.s
    launch(x, gate, y, total, shift, scale, out.x, out.values, out.scale, down.fused, s)
    multiply(down, out)
    return with_dtype(out, wants)


@shaped
def _launch(
    tile: Choice, dtype: torch.dtype | None, rotation: int, block_r: int, rank: int, shape: tuple[int, int, int],
    *strides: int,
) -> Launch:  # fmt: skip
    batch, length, width = shape
    return Launch(
        _modulate, (ceildiv(length, tile.block_m), batch), *strides, length, rank,
        D=width, BLOCK=power_of_2(width), ROWS=tile.block_m, STEP=tile.step,
        INT8=dtype == torch.int8, ROTATION=rotation, BLOCK_R=block_r, BLOCK_K=tile.block_k,
        PRECISION="ieee", num_warps=tile.warps, num_stages=tile.stages, maxnreg=registers(tile.warps),
    )  # fmt: skip


def modulate_backward(
    dy: Tensor, x: Tensor, scale: Tensor, rows: bool, dx: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, and if `rows` of shift and scale (B, 1, D). dy (B, L, D or wider); dx (B, L, D) is the gradient
    of x from its other uses, None for zero.
    """
    dx, _, _, d_shift, d_scale = _backward(dx, dy, x, None, None, scale, rows)
    return dx, d_shift, d_scale


def gated_add_modulate_backward(
    dx: Tensor | None, dy: Tensor, x: Tensor, gate: Tensor, y: Tensor | None, scale: Tensor, rows: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of residual and y, of gate if `y` is given, and if `rows` of shift and scale.

    dx (B, L, D) is the gradient of the sum x, None for zero; dy (B, L, D or wider) that of x modulated.
    """
    d_residual, d_y, d_gate, d_shift, d_scale = _backward(dx, dy, x, gate, y, scale, rows)
    assert d_y is not None
    return d_residual, d_y, d_gate, d_shift, d_scale


def _backward(
    dx: Tensor | None, dy: Tensor, x: Tensor, gate: Tensor | None, y: Tensor | None, scale: Tensor, rows: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    dy, x, scale = contiguous_rows(dy), contiguous_rows(x), contiguous_rows(scale)
    dx, gate, y = (t if t is None else contiguous_rows(t) for t in (dx, gate, y))
    d_residual = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    d_y = None if gate is None else torch.empty_like(d_residual)
    tile = choose("modulate_backward_sums" if rows or y is not None else "modulate_backward", x.device)
    sums = _partial_sums(2 * rows + (y is not None), tile, x)
    launch = _launch_backward(
        tile, rows, x.shape, *((0, 0) if dx is None else dx.stride()[:2]), *dy.stride()[:2], *x.stride()[:2],
        *((0, 0) if y is None else y.stride()[:2]), 0 if gate is None else gate.stride(0), scale.stride(0),
    )  # fmt: skip
    launch(dx, dy, x, gate, y, scale, d_residual, d_y, sums)
    if sums is None:
        return d_residual, d_y, None, None, None
    totals = _summed(sums, x.dtype)
    d_shift, d_scale = (totals[0], totals[1]) if rows else (None, None)
    return d_residual, d_y, None if y is None else totals[-1], d_shift, d_scale


@shaped
def _launch_backward(tile: Choice, rows: bool, shape: tuple[int, int, int], *strides: int) -> Launch:
    batch, length, width = shape
    return Launch(
        _modulate_backward, (ceildiv(length, tile.block_m), batch), *strides, length,
        D=width, BLOCK=power_of_2(width), ROWS=tile.block_m, STEP=tile.step, SHIFT=rows,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def gated_add(residual: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """residual + gate y. residual, y (B, L, D); gate (B, 1, D)."""
    residual, gate, y = contiguous_rows(residual), contiguous_rows(gate), contiguous_rows(y)
    out = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
    launch = _launch_add(
        choose("gated_add", residual.device), residual.shape, *residual.stride()[:2], gate.stride(0), *y.stride()[:2]
    )
    launch(residual, gate, y, out)
    return out


@shaped
def _launch_add(tile: Choice, shape: tuple[int, int, int], *strides: int) -> Launch:
    batch, length, width = shape
    rows, block = tile.block_m, min(tile.block_n, power_of_2(width))
    return Launch(
        _gated_add, (ceildiv(width, block), ceildiv(length, rows), batch), *strides, length,
        D=width, BLOCK=block, ROWS=rows, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def gated_add_backward(dout: Tensor, gate: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Gradients of y, and of gate (B, 1, D) if `y` is given. The gradient of the residual is `dout` itself."""
    dout, gate, y = contiguous_rows(dout), contiguous_rows(gate), y if y is None else contiguous_rows(y)
    dy = torch.empty(dout.shape, dtype=dout.dtype, device=dout.device)
    tile = choose("gated_add_backward" if y is None else "gated_add_backward_sums", dout.device)
    sums = _partial_sums(int(y is not None), tile, dout)
    launch = _launch_add_backward(
        tile, dout.shape, *dout.stride()[:2], *((0, 0) if y is None else y.stride()[:2]), gate.stride(0)
    )
    launch(dout, gate, y, dy, sums)
    return dy, None if sums is None else _summed(sums, dout.dtype)[0]


@shaped
def _launch_add_backward(tile: Choice, shape: tuple[int, int, int], *strides: int) -> Launch:
    batch, length, width = shape
    block = min(tile.block_n, power_of_2(width))
    return Launch(
        _gated_add_backward, (ceildiv(width, block), ceildiv(length, tile.block_m), batch), *strides, length,
        D=width, BLOCK=block, ROWS=tile.block_m, STEP=tile.step, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _partial_sums(count: int, tile: Choice, x: Tensor) -> Tensor | None:
    """Memory for the programs' sums, (count, B, programs, D) fp32, or None if count is 0."""
    if not count:
        return None
    batch, length, width = x.shape
    return x.new_empty(count, batch, ceildiv(length, tile.block_m), width, dtype=torch.float32)


def _summed(sums: Tensor, dtype: torch.dtype) -> Tensor:
    """(count, B, 1, D): the sum over all programs."""
    return sums.sum(2, keepdim=True).to(dtype)


@triton.jit(do_not_specialize=["L", "R"])
def _modulate(
    x_ptr,  # (B, L, D); the residual if there is a gate
    gate_ptr,  # (B, 1, D) or None
    add_ptr,  # (B, L, D) the gated input, or None
    sum_ptr,  # (B, L, D) out: residual + gate * add, or None
    shift_ptr,  # (B, 1, D)
    scale_ptr,  # (B, 1, D)
    y_ptr,  # (B, L, D) out, rows y_l apart
    values_ptr,  # (B L, D) out: bytes of int8 or e4m3; or None
    row_scale_ptr,  # (B L,) fp32 out, or None
    down_ptr,  # (R, D) or None
    s_ptr,  # (B L, R) as x out, or None
    x_b,
    x_l,
    gate_b,
    add_b,
    add_l,
    shift_b,
    scale_b,
    y_l,
    L,
    R,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    INT8: tl.constexpr,
    ROTATION: tl.constexpr,  # the block of 8-bit rows, or 0
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    first, b = tl.program_id(0) * ROWS, tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    shift = tl.load(shift_ptr + b * shift_b + column, mask=column < D, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + b * scale_b + column, mask=column < D, other=0.0).to(tl.float32)
    for start in range(0, ROWS, STEP):
        token = first + start + tl.arange(0, STEP)
        row, m = token.to(tl.int64)[:, None], (b * L + token)[:, None]
        mask = (token < L)[:, None] & (column < D)
        x = tl.load(x_ptr + b * x_b + row * x_l + column, mask=mask, other=0.0).to(tl.float32)
        if gate_ptr is not None:
            gate = tl.load(gate_ptr + b * gate_b + column, mask=column < D, other=0.0).to(tl.float32)
            x += gate * tl.load(add_ptr + b * add_b + row * add_l + column, mask=mask, other=0.0).to(tl.float32)
            rounded = x.to(sum_ptr.dtype.element_ty)
            tl.store(sum_ptr + m * D + column, rounded, mask=mask)
            x = rounded.to(tl.float32)  # the next layers read the stream as it is stored
        centered, rstd = _centered(x, column, D)
        y = (centered * rstd[:, None] * (1.0 + scale) + shift).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + m * y_l + column, y, mask=mask)
        if values_ptr is not None:
            y = tl.where(mask, y.to(tl.float32), 0.0)
            y = rotated(y, ROTATION) if ROTATION else y
            row_scale = scales_of(y, INT8)
            tl.store(row_scale_ptr + b * L + token, row_scale, mask=token < L)
            tl.store(values_ptr + m * D + column, to_8_bits(y, row_scale, INT8), mask=mask)
    if down_ptr is not None:
        m = b * L + first
        multiply_by_down(y_ptr + m * y_l, down_ptr, s_ptr + m * R, L - first, R, D, ROWS, BLOCK_R, BLOCK_K, PRECISION)


@triton.jit
def _centered(x, column, D: tl.constexpr):
    """x (rows, columns) minus each row's mean, zero from column D on; and 1 / its standard deviation (rows,)."""
    mean = tl.sum(x, axis=1) / D
    centered = tl.where(column < D, x - mean[:, None], 0.0)
    return centered, tl.rsqrt(tl.sum(centered * centered, axis=1) / D + 1e-6)


@triton.jit(do_not_specialize=["L"])
def _modulate_backward(
    dx_ptr,  # (B, L, D) gradient of the gated sum from its other uses, or None
    dy_ptr,  # (B, L, D) gradient of the modulated output
    x_ptr,  # (B, L, D)
    gate_ptr,  # (B, 1, D) or None
    add_ptr,  # (B, L, D) the gated input, or None if the gate's gradient is not wanted
    scale_ptr,  # (B, 1, D)
    d_residual_ptr,  # (B, L, D) out
    d_add_ptr,  # (B, L, D) out, or None
    sums_ptr,  # (those wanted of shift, scale, gate; B, programs, D) fp32 out, or None
    dx_b,
    dx_l,
    dy_b,
    dy_l,
    x_b,
    x_l,
    add_b,
    add_l,
    gate_b,
    scale_b,
    L,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    SHIFT: tl.constexpr,
):
    first, b = tl.program_id(0) * ROWS, tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    scale = tl.load(scale_ptr + b * scale_b + column, mask=column < D, other=0.0).to(tl.float32)
    d_shift = tl.zeros([BLOCK], tl.float32)
    d_scale = tl.zeros([BLOCK], tl.float32)
    d_gate = tl.zeros([BLOCK], tl.float32)
    for start in range(0, ROWS, STEP):
        token = first + start + tl.arange(0, STEP)
        row, m = token.to(tl.int64)[:, None], (b * L + token)[:, None]
        mask = (token < L)[:, None] & (column < D)
        x = tl.load(x_ptr + b * x_b + row * x_l + column, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + b * dy_b + row * dy_l + column, mask=mask, other=0.0).to(tl.float32)
        centered, rstd = _centered(x, column, D)
        normed = centered * rstd[:, None]
        d_normed = dy * (1.0 + scale)
        along_one = tl.sum(d_normed, axis=1) / D
        along_normed = tl.sum(d_normed * normed, axis=1) / D
        d_residual = (d_normed - along_one[:, None] - normed * along_normed[:, None]) * rstd[:, None]
        if dx_ptr is not None:
            d_residual += tl.load(dx_ptr + b * dx_b + row * dx_l + column, mask=mask, other=0.0).to(tl.float32)
        tl.store(d_residual_ptr + m * D + column, d_residual.to(d_residual_ptr.dtype.element_ty), mask=mask)
        if gate_ptr is not None:
            gate = tl.load(gate_ptr + b * gate_b + column, mask=column < D, other=0.0).to(tl.float32)
            tl.store(d_add_ptr + m * D + column, (gate * d_residual).to(d_add_ptr.dtype.element_ty), mask=mask)
        if add_ptr is not None:
            add = tl.load(add_ptr + b * add_b + row * add_l + column, mask=mask, other=0.0).to(tl.float32)
            d_gate += tl.sum(d_residual * add, axis=0)
        if SHIFT:
            d_shift += tl.sum(dy, axis=0)
            d_scale += tl.sum(dy * normed, axis=0)
    column = tl.arange(0, BLOCK)
    programs, batch = tl.num_programs(0).to(tl.int64), tl.num_programs(1)
    sums = sums_ptr if sums_ptr is None else sums_ptr + (b * programs + tl.program_id(0)) * D + column
    if SHIFT:
        tl.store(sums, d_shift, mask=column < D)
        tl.store(sums + batch * programs * D, d_scale, mask=column < D)
        sums += 2 * batch * programs * D
    if add_ptr is not None:
        tl.store(sums, d_gate, mask=column < D)


@triton.jit(do_not_specialize=["L"])
def _gated_add(
    residual_ptr,  # (B, L, D)
    gate_ptr,  # (B, 1, D)
    y_ptr,  # (B, L, D)
    out_ptr,  # (B, L, D) out
    residual_b,
    residual_l,
    gate_b,
    y_b,
    y_l,
    L,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    token = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    b, column = tl.program_id(2).to(tl.int64), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    row, m, mask = token.to(tl.int64)[:, None], (b * L + token)[:, None], (token < L)[:, None] & (column < D)
    residual = tl.load(residual_ptr + b * residual_b + row * residual_l + column, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + b * y_b + row * y_l + column, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + b * gate_b + column, mask=column < D, other=0.0).to(tl.float32)
    tl.store(out_ptr + m * D + column, (residual + gate * y).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["L"])
def _gated_add_backward(
    dout_ptr,  # (B, L, D)
    gate_ptr,  # (B, 1, D)
    y_ptr,  # (B, L, D), or None if the gate's gradient is not wanted
    dy_ptr,  # (B, L, D) out
    sums_ptr,  # (1, B, programs, D) fp32 out, or None
    dout_b,
    dout_l,
    y_b,
    y_l,
    gate_b,
    L,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
):
    first, b = tl.program_id(1) * ROWS, tl.program_id(2).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_ptr + b * gate_b + column, mask=column < D, other=0.0).to(tl.float32)[None, :]
    d_gate = tl.zeros([BLOCK], tl.float32)
    for start in range(0, ROWS, STEP):
        token = first + start + tl.arange(0, STEP)
        row, m = token.to(tl.int64)[:, None], (b * L + token)[:, None]
        mask = (token < L)[:, None] & (column < D)[None, :]
        dout = tl.load(dout_ptr + b * dout_b + row * dout_l + column[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(dy_ptr + m * D + column[None, :], (gate * dout).to(dy_ptr.dtype.element_ty), mask=mask)
        if y_ptr is not None:
            y = tl.load(y_ptr + b * y_b + row * y_l + column[None, :], mask=mask, other=0.0).to(tl.float32)
            d_gate += tl.sum(dout * y, axis=0)
    if sums_ptr is not None:
        tl.store(sums_ptr + (b * tl.num_programs(1) + tl.program_id(1)) * D + column, d_gate, mask=column < D)
