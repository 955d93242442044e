"""The ops in plain PyTorch: they define what is correct, and run wherever no kernel does.

Letters: N out, K in, M rows (batch x tokens), R rank, B batch, H heads, L tokens, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import Activations, Wants
from .rotation import rotate
from .weights import NF4_BLOCK, NF4Weight, Weight

# The 16 quantiles of a normal distribution that NF4 uses, with bitsandbytes' values (Dettmers et al. 2023,
# appendix E).
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def nf4_quantize(w: Tensor) -> tuple[Tensor, Tensor]:
    """NF4 codes (N, K/2) uint8 and scales (N, K/64) fp32 of the (N, K) matrix `w`, byte for byte as bitsandbytes.

    The code of a weight is the number of level midpoints below it, after division by its block's largest magnitude.
    Searching 15 midpoints per weight is slow in PyTorch, so the upper half of the float's bits indexes a table; in the
    few table cells that contain a midpoint, one comparison decides.
    """
    rows, columns = w.shape
    codes = torch.empty(rows * columns // 2, dtype=torch.uint8, device=w.device)
    absmax = torch.empty(rows * columns // NF4_BLOCK, dtype=torch.float32, device=w.device)
    below, midpoint = _nf4_tables(w.device)
    flat = w.reshape(-1)
    step = _chunk(w.device)
    for start in range(0, flat.numel(), step):
        chunk = flat[start : start + step].float().view(-1, NF4_BLOCK)
        largest = chunk.abs().amax(dim=1)
        scaled = (chunk * (1.0 / largest.clamp(min=1e-38)).unsqueeze(1)).clamp_(-1, 1).view(-1)
        cell = (scaled.view(torch.int32) >> 16) + 32768
        code = below.index_select(0, cell).add_(scaled > midpoint.index_select(0, cell))
        pair = code.view(torch.int16)  # little endian: the first weight of a pair is the low byte
        codes[start // 2 : (start + code.numel()) // 2] = ((pair << 4) | (pair >> 8)).to(torch.uint8)
        absmax[start // NF4_BLOCK : (start + code.numel()) // NF4_BLOCK] = largest
    return codes.view(rows, columns // 2), absmax.view(rows, columns // NF4_BLOCK)


@cache
def _nf4_tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """For each upper half of a float (as int16 + 32768): the number of midpoints below the cell, and the midpoint
    inside it or inf.
    """
    levels = torch.tensor(NF4_LEVELS)
    midpoints = (levels[1:] + levels[:-1]) / 2
    upper = torch.arange(-32768, 32768, dtype=torch.int32) << 16
    ends = torch.stack([upper, upper | 0xFFFF]).view(torch.float32).nan_to_num()
    below = torch.bucketize(ends.amin(0), midpoints)
    inside = torch.bucketize(ends.amax(0), midpoints) > below
    midpoint = torch.where(inside, midpoints[below.clamp(max=14)], torch.inf)
    return below.to(device, torch.uint8), midpoint.to(device)


def dequantize(weight: Weight, dtype: torch.dtype, out: Tensor | None = None, transposed: bool = False) -> Tensor:
    """The (N, K) matrix that `weight` encodes, in `dtype`, or its transpose (K, N). If `out` is given (rows of any
    stride), the result is written there.
    """
    if transposed:
        matrix = dequantize(weight, dtype).t()
        return matrix.contiguous() if out is None else out.copy_(matrix)
    if isinstance(weight, Tensor):
        return weight.to(dtype) if out is None else out.copy_(weight)
    if isinstance(weight, NF4Weight):
        return nf4_dequantize(weight.codes, weight.absmax, dtype, out)
    return row_dequantize(weight.values, weight.scale, dtype, out)


def to_rows(
    weight: Weight,
    dtype: torch.dtype,
    transposed: bool = False,
    rotation: int = 0,
    part: slice | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`weight` as a matrix of 8-bit values (N, K), or (K, N) if `transposed`, and its row scales (N,) fp32; or only the
    rows `part` of the weight. scale: the scales, if they are known.

    8-bit tensor cores before sm_100 read both factors along K; the gradient of the input contracts over N instead, so
    it needs the transposed matrix. A weight stored in that dtype keeps its values. `rotation`: the block of columns in
    which rows are rotated before they are rounded (fluxq/kernels/rotation.py), 0 for none.
    """
    weight = weight if part is None else weight[part]
    if not rotation and not isinstance(weight, (Tensor, NF4Weight)) and weight.values.dtype == dtype:
        values, scale = weight.values, weight.scale
    else:
        values, scale = row_quantize(dequantize(weight, torch.float32), dtype, rotation=rotation)
    return (values.view(torch.uint8).t().contiguous().view(dtype) if transposed else values), scale


def nf4_dequantize(codes: Tensor, absmax: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """The (N, K) matrix of NF4 `codes` (N, K/2), `absmax` (N, K/64): level times scale in fp32, rounded once."""
    pairs = _nf4_pairs(codes.device)
    if out is not None and not out.is_contiguous():
        return out.copy_(nf4_dequantize(codes, absmax, dtype))
    matrix = codes.new_empty(codes.shape[0], codes.shape[1] * 2, dtype=dtype) if out is None else out
    blocks, scales, flat = matrix.view(-1, NF4_BLOCK), absmax.reshape(-1, 1), codes.reshape(-1)
    step = _chunk(codes.device) // NF4_BLOCK
    for start in range(0, len(blocks), step):
        part = flat[start * NF4_BLOCK // 2 : (start + step) * NF4_BLOCK // 2]
        values = pairs.index_select(0, part.int()).view(torch.float32).view(-1, NF4_BLOCK)
        blocks[start : start + step] = values * scales[start : start + step]
    return matrix


@cache
def _nf4_pairs(device: torch.device) -> Tensor:
    """(256,) int64: both levels of a byte, two fp32 that are gathered as one number."""
    levels = torch.tensor(NF4_LEVELS, device=device)
    return torch.stack([levels.repeat_interleave(16), levels.repeat(16)], dim=1).view(torch.int64).view(-1)


def row_quantize(
    w: Tensor, dtype: torch.dtype, columns: Tensor | None = None, rotation: int = 0
) -> tuple[Tensor, Tensor]:
    """`w` (N, K) in 8 bits of `dtype` (int8 or float8_e4m3fn), and the fp32 scales (N,) that restore each row.

    A row's largest magnitude maps to the largest number of the type; int8 rounds half to even and never uses -128. If
    columns (K,) fp32 is given, every row is first multiplied by it. Then, if `rotation` is not 0, each row is rotated
    in blocks of that many columns (fluxq/kernels/rotation.py).
    """
    largest = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    values, scale = torch.empty_like(w, dtype=dtype), torch.empty(w.shape[0], device=w.device)
    step = max(1, _chunk(w.device) // w.shape[1])
    for start in range(0, w.shape[0], step):
        rows = w[start : start + step].float()
        rows = rows if columns is None else rows * columns
        rows = rotate(rows, rotation) if rotation else rows
        scale[start : start + step] = rows.abs().amax(dim=1).clamp(min=1e-30) / largest
        scaled = (rows / scale[start : start + step, None]).clamp_(-largest, largest)
        values[start : start + step] = scaled.round_().to(dtype) if dtype == torch.int8 else scaled.to(dtype)
    return values, scale


def row_dequantize(values: Tensor, scale: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """The (N, K) matrix of 8-bit `values` (N, K) and row scales (N,): multiplied in fp32, rounded once."""
    matrix = torch.empty_like(values, dtype=dtype) if out is None else out
    step = max(1, _chunk(values.device) // values.shape[1])
    for start in range(0, values.shape[0], step):
        matrix[start : start + step] = _numbers(values[start : start + step]) * scale[start : start + step, None]
    return matrix


def _numbers(values: Tensor) -> Tensor:
    """8-bit values in fp32. CPUs convert fp8 bit by bit; looking up the 256 numbers is several times faster."""
    if values.dtype != torch.float8_e4m3fn or values.device.type != "cpu":
        return values.float()
    return _e4m3_numbers().index_select(0, values.view(torch.uint8).int().view(-1)).view(values.shape)


@cache
def _e4m3_numbers() -> Tensor:
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


def _chunk(device: torch.device) -> int:
    """How many weights are processed at a time: what fits a CPU's cache, or what keeps a GPU busy."""
    return 1 << 18 if device.type == "cpu" else 1 << 24


def unnest_absmax(absmax: Tensor, quant_map: Tensor, nested_absmax: Tensor, offset: float, block: int = 256) -> Tensor:
    """fp32 scales from bitsandbytes' nested ("double quantized") form, which stores the scales themselves in 8 bits.

    absmax (n,) uint8; quant_map (256,) fp32; nested_absmax (ceil(n/block),) fp32; offset is the mean that was
    subtracted.
    """
    scales = nested_absmax.repeat_interleave(block)[: absmax.numel()]
    return quant_map[absmax.long()] * scales + offset


def padding(rank: int) -> int:
    """How many columns this backend needs behind each row of the input of a bf16 layer with LoRA of that rank."""
    return 0


def lora_linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    scale: float,
    part: slice | None = None,
    s: Tensor | None = None,
    is_filled: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """y = x W^T + bias + scale (x down^T) up^T, or only the outputs `part`, and s = x down^T for the backward pass.

    x (..., K), or with padding behind each row; weight (N, K) as stored; down (R, K), up (N, R), bias (N,) in x's
    dtype. s: that of another part of the same layer, which has just been computed from the same x, and is_filled: has
    written its padding; or any other (M, R) in its place.
    """
    if part is not None:
        weight, bias, up = weight[part], None if bias is None else bias[part], None if up is None else up[part]
    x = x[..., : weight.shape[1]]
    y = F.linear(x, dequantize(weight, x.dtype), bias)
    if down is None or up is None:
        return y, None
    s = F.linear(x, down) if s is None else s  # (..., R)
    return torch.add(y, F.linear(s, up), alpha=scale), s


def lora_linear_backward(
    dy: Tensor | Sequence[Tensor],
    weight: Weight | None,
    x: Tensor | None,
    s: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    scale: float,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, down and up for `lora_linear`. That of x has x's width; its padding is undefined.

    dy (..., N), or the gradients of consecutive parts of the outputs. weight None: do not compute the gradient of x. s
    None: there is no LoRA, and x is not needed.
    """
    if not isinstance(dy, Tensor):
        return _sum_of_parts(dy, weight, x, s, down, up, scale)
    dx = None if weight is None else dy @ dequantize(weight, dy.dtype)
    if x is None or s is None or down is None or up is None:
        return dx, None, None
    ds = scale * (dy @ up)  # (..., R)
    if dx is not None:
        dx = F.pad(dx + ds @ down, (0, x.shape[-1] - dx.shape[-1]))
    return dx, *lora_gradients(dy, x[..., : down.shape[1]], s, ds.flatten(0, -2), scale)


def _sum_of_parts(
    dys: Sequence[Tensor], weight: Weight | None, x: Tensor | None, s: Tensor | None, down: Tensor | None,
    up: Tensor | None, scale: float,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """The gradients of x and down are sums over the parts of the outputs; that of up has the parts below each other."""
    found, start = [], 0
    for dy in dys:
        part = slice(start, start + dy.shape[-1])
        own = None if weight is None else weight[part], None if up is None else up[part]
        found.append(lora_linear_backward(dy, own[0], x, s, down, own[1], scale))
        start = part.stop
    (dx, d_down, _), d_ups = found[0], [d_up for _, _, d_up in found]
    d_down = d_down if d_down is None else _at_least_fp32(d_down)
    for more_dx, more_d_down, _ in found[1:]:
        dx = dx if more_dx is None or dx is None else dx + more_dx
        d_down = d_down if more_d_down is None or d_down is None else d_down + more_d_down
    return dx, d_down, None if d_down is None else torch.cat(d_ups)


def lora_gradients(
    dy: Tensor | Sequence[Tensor], x: Tensor, s: Tensor, ds: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients of down and up. dy as above, x (..., K), s (..., R), and the gradient of s: ds (M, R) = scale dy up."""
    dy = dy if isinstance(dy, Tensor) else torch.cat([*dy], -1)
    return ds.mT @ x.flatten(0, -2), scale * (dy.flatten(0, -2).mT @ s.flatten(0, -2))


def drop(x: Tensor, rate: float, key: Tensor, onto: Tensor | None = None) -> Tensor:
    """`x` (..., K) with zeros where numbers are left out, each with chance `rate`; added to `onto` in place if given.

    Which ones depends on `key` (1,) int64 and on their place among the M K numbers, by a hash in 32 bits: twice the
    finalizer of murmur3, with both halves of the key.
    """
    place, mask = torch.arange(x.numel(), device=x.device).view(x.shape), 0xFFFFFFFF
    hashed = _mixed(_mixed(place + (key & mask)) ^ (key >> 32 & mask))
    kept = torch.where(hashed < round(rate * 2**32), 0, x)
    return kept if onto is None else onto.add_(kept)


def _mixed(n: Tensor) -> Tensor:
    """murmur3's 32-bit finalizer, of integers modulo 2^32 (products modulo 2^64 have the same low bits)."""
    n = n & 0xFFFFFFFF
    n = ((n ^ n >> 16) * 0x85EBCA6B) & 0xFFFFFFFF
    n = ((n ^ n >> 13) * 0xC2B2AE35) & 0xFFFFFFFF
    return n ^ n >> 16


def matmul_8bit(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor | None,
    dtype: torch.dtype,
    s: Tensor | None = None,
    up: Tensor | None = None,
    bias: Tensor | None = None,
    up_scale: float = 1.0,
    onto: Tensor | None = None,
) -> Tensor:
    """(M, N) in `dtype`: a b^T, row m times a_scale[m], column n times b_scale[n], plus s (up_scale up)^T and bias,
    rounded once. If `onto` (M, N) is given, all of it is added to that, in place.

    a (M, K), b (N, K) both int8 or both float8_e4m3fn; a_scale (M,), b_scale (N,) fp32; s (M, R), up (N, R), bias (N,).
    """
    y = torch._int_mm(a, b.t()).float() if a.dtype == torch.int8 else _numbers(a) @ _numbers(b).t()
    y *= a_scale[:, None]
    if b_scale is not None:
        y *= b_scale
    if s is not None and up is not None:
        y += s.float() @ (up.float() * up_scale).t()
    if bias is not None:
        y += bias.float()
    return y.to(dtype) if onto is None else onto.copy_(y + onto)


def activations(x: Tensor, wants: Wants) -> Activations:
    """`x` (..., K) in the form that the next layer wants."""
    if wants.dtype is None:
        return Activations(F.pad(x, (0, wants.padding)) if wants.padding else x)
    rows = x.flatten(0, -2)
    s = None if wants.down is None else (rows.float() @ wants.down.float().t()).to(x.dtype)
    return Activations(x, *row_quantize(rows, wants.dtype, rotation=wants.rotation), s)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, wants: Wants) -> Activations:
    """(1 + scale) LayerNorm(x) + shift, as the next layer `wants` it. x (B, L, D); shift, scale (B, 1, D)."""
    return activations(torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale), wants)


def modulate_backward(
    dy: Tensor, x: Tensor, scale: Tensor, rows: bool, dx: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, and if `rows` of shift and scale (B, 1, D). dy (B, L, D or wider); dx (B, L, D) is the gradient
    of x from its other uses, None for zero.
    """
    width = x.shape[-1:]
    dy = dy[..., : x.shape[-1]]
    normed, mean, rstd = torch.native_layer_norm(x, width, None, None, 1e-6)
    d_normed, _, _ = torch.ops.aten.native_layer_norm_backward(
        dy * (1 + scale), x, width, mean, rstd, None, None, [True, False, False]
    )
    total = d_normed if dx is None else dx + d_normed
    if not rows:
        return total, None, None
    return total, dy.sum(1, keepdim=True), (dy * normed).sum(1, keepdim=True)


def gated_add(residual: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """residual + gate y. residual, y (B, L, D); gate (B, 1, D)."""
    return torch.addcmul(residual, gate, y)


def gated_add_backward(dout: Tensor, gate: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Gradients of y, and of gate (B, 1, D) if `y` is given. The gradient of the residual is `dout` itself."""
    return gate * dout, None if y is None else (dout * y).sum(1, keepdim=True)


def gated_add_modulate(
    residual: Tensor, gate: Tensor, y: Tensor, shift: Tensor, scale: Tensor, wants: Wants
) -> tuple[Tensor, Activations]:
    """x = residual + gate y, and x modulated: `gated_add` and the `modulate` after it in one pass."""
    x = gated_add(residual, gate, y)
    return x, modulate(x, shift, scale, wants)


def gated_add_modulate_backward(
    dx: Tensor | None, dy: Tensor, x: Tensor, gate: Tensor, y: Tensor | None, scale: Tensor, rows: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of residual and y, of gate if `y` is given, and if `rows` of shift and scale.

    dx (B, L, D) is the gradient of the sum x, None for zero; dy (B, L, D or wider) that of x modulated.
    """
    d_residual, d_shift, d_scale = modulate_backward(dy, x, scale, rows, dx)
    d_y, d_gate = gated_add_backward(d_residual, gate, y)
    return d_residual, d_y, d_gate, d_shift, d_scale


Stream = tuple[Tensor, Tensor, Tensor]
"""One stream's qkv (B, L, 3 D), and the scales (D/H,) of its query and key norms."""


def qk_norm_rope(streams: Sequence[Stream], cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v of all streams concatenated, (B, H, L, D/H), q and k normed and with RoPE applied; and rstd (2, B, L, H)
    fp32.

    q and k are divided by their root mean square over the head width and multiplied by the stream's scale. Then RoPE
    rotates each adjacent pair of numbers by its angle: cos and sin (B or 1, 1, L, D/H/2), L counting all streams. In
    fp32 or better, rounded once. rstd is 1/rms of queries and keys.
    """
    parts = [_split_heads(qkv, q_scale.shape[0]) for qkv, q_scale, _ in streams]  # each (B, L, H, D/H)
    inverse = [torch.stack([_rstd(q), _rstd(k)]) for q, k, _ in parts]
    cos, sin = cos.transpose(1, 2), sin.transpose(1, 2)  # (B or 1, L, 1, D/H/2)
    qk, start = ([], []), 0
    for part, rstd, (_, *scales) in zip(parts, inverse, streams, strict=True):
        stop = start + part[0].shape[1]
        for x, r, scale, out in zip(part, rstd, scales, qk, strict=False):
            normed = _at_least_fp32(x) * r[..., None] * _at_least_fp32(scale)
            out.append(_apply_rope(normed, cos[:, start:stop], sin[:, start:stop]).to(x.dtype))
        start = stop
    joined = (*(torch.cat(x, 1) for x in qk), torch.cat([v for _, _, v in parts], 1))
    q, k, v = (x.transpose(1, 2) for x in joined)
    return q, k, v, torch.cat(inverse, 2)


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

    The normed values are recovered from q and k by undoing RoPE and dividing by the scale, so that qkv need not be
    kept. If a scale is too near zero for that, they are computed from `inputs`, the streams' qkv.
    """
    cos, sin = cos.transpose(1, 2), sin.transpose(1, 2)
    grads, start = [], 0
    for i, (pair, length) in enumerate(zip(scales, lengths, strict=True)):
        stop = start + length
        angles, parts = (cos[:, start:stop], sin[:, start:stop]), []
        for j, (dy, y, scale) in enumerate(zip((dq, dk), (q, k), pair, strict=True)):
            r, g = rstd[j, :, start:stop, :, None], _at_least_fp32(scale)
            d_normed = _undo_rope(dy.transpose(1, 2)[:, start:stop], *angles) * g
            if inputs is None:
                normed = _undo_rope(y.transpose(1, 2)[:, start:stop], *angles) / g
            else:
                normed = _at_least_fp32(_split_heads(inputs[i], len(scale))[j]) * r
            parts.append(r * (d_normed - normed * (normed * d_normed).mean(-1, keepdim=True)))
        parts.append(dv.transpose(1, 2)[:, start:stop])
        grads.append(torch.cat([p.flatten(2).to(q.dtype) for p in parts], -1))
        start = stop
    return grads


def _split_heads(qkv: Tensor, head_width: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv.unflatten(-1, (3, -1, head_width)).unbind(2)
    return q, k, v


def _rstd(x: Tensor) -> Tensor:
    return torch.rsqrt(_at_least_fp32(x).square().mean(-1) + 1e-6)


def _apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x with each adjacent pair rotated by its angle: a product of complex numbers."""
    pairs = torch.view_as_complex(_at_least_fp32(x).unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)


def _undo_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _apply_rope(x, cos, -sin)


def gelu_tanh(h: Tensor, prepend: Tensor | None, wants: Wants) -> Activations:
    """gelu(h), tanh's approximation, in the form that the next layer `wants`; with `prepend` (B, L, D) to its left."""
    y = F.gelu(h, approximate="tanh")
    return activations(y if prepend is None else torch.cat([prepend, y], -1), wants)


def gelu_tanh_backward(dy: Tensor, h: Tensor) -> Tensor:
    """The gradient of h (B, L, W), from the columns of dy (B, L, W) that correspond to gelu(h)."""
    return torch.ops.aten.gelu_backward(dy, h, approximate="tanh")


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
