"""A frozen linear layer with LoRA, multiplied in 16 bits: one product for both, with a weight that is decoded once.

The table chooses one of these paths:

extended  The weight is decoded, some rows at a time, into a scratch [W | scale up | bias]; the input is
          [x | x down^T | 1] if its producer left padding behind each row. Base, LoRA and bias are then one product by
          the vendor's library; in the backward pass dy [W | scale up] is the input's gradient and LoRA's inner one.
plain     There is no padding, or the weight needs no decoding: the products one after the other.
fused     The weight is decoded in the product's loop (matmul.py, few_rows.py): for few rows, or without memory for a
          scratch.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..chunks import parts
from ..weights import NF4_BLOCK, NF4Weight, RowScaled, Weight
from . import matmul
from .convert import decode_extended, dequantize
from .extension import fill_padding
from .few_rows import input_gradient
from .table import choose


def lora_linear(
    x: Tensor, weight: Weight, bias: Tensor | None, down: Tensor | None, up: Tensor | None, scale: float
) -> tuple[Tensor, Tensor | None]:
    """y = x W^T + bias + scale (x down^T) up^T, and s = x down^T for the backward pass.

    x (..., K), or with padding behind each row, which this op overwrites; weight (N, K) as stored; down (R, K), up (N,
    R), bias (N,) in x's dtype; up may have a wider dtype and is then rounded after scaling.
    """
    n, k = weight.shape
    # Layers may share an input; each fills the padding again. Autograd keeps nothing that is in the padding, so `data`
    # hides the write from it; s is a separate tensor.
    rows = x.data.reshape(-1, x.shape[-1])
    choice = choose(f"lora_linear_{_format(weight)}", x.device, rows.shape[0])
    s = None if down is None or up is None else torch.mm(rows[:, :k], down.t())
    if choice.path == "fused" and x.dtype != torch.float64:
        y = matmul.linear(rows[:, :k], weight, bias, s, None if up is None else up * scale, choice)
    elif choice.path == "extended" and s is not None and up is not None and rows.shape[1] > k:
        y = _extended(rows, weight, bias, s, up, scale, choice.chunk)
    else:
        # Adding a bias is free if the result is in one piece, as it is without chunks. If it is added to some columns,
        # it is first written to them and then read back. So with a bias, only a table row "plain" uses chunks.
        whole = bias is not None and choice.path == "extended"
        y = _plain(rows[:, :k], weight, bias, s, up, scale, 0 if whole else choice.chunk)
    return y.view(*x.shape[:-1], n), s if s is None else s.view(*x.shape[:-1], -1)


def lora_linear_backward(
    dy: Tensor,
    weight: Weight | None,
    x: Tensor | None,
    s: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    scale: float,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, down and up for `lora_linear`. That of x has x's width; its padding is finite.

    weight None: do not compute the gradient of x. s None: there is no LoRA, and x is not needed. The gradients of down
    and up are summed and returned in fp32.
    """
    rows, padding = dy.reshape(-1, dy.shape[-1]), 0 if x is None or down is None else x.shape[-1] - down.shape[1]
    dx, ds = (None, None) if weight is None else _dx(rows, weight, down, up, scale, padding)
    dx = None if dx is None else dx.view(*dy.shape[:-1], -1)
    if x is None or s is None or down is None or up is None:
        return dx, None, None
    ds = _ds(rows, up, scale) if ds is None else ds
    return dx, *lora_gradients(dy, x[..., : down.shape[1]], s, ds, scale)


def lora_gradients(dy: Tensor, x: Tensor, s: Tensor, ds: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Gradients of down and up, in fp32. dy (..., N), x (..., K), s (..., R), and the gradient of s: ds (M, R)."""
    d_down = _mm_fp32(ds.t(), x.reshape(-1, x.shape[-1]))
    return d_down, _mm_fp32(dy.reshape(-1, dy.shape[-1]).t(), s.reshape(-1, s.shape[-1]), scale)


def _format(weight: Weight) -> str:
    if isinstance(weight, Tensor):
        return "bf16"
    if isinstance(weight, NF4Weight):
        return "nf4"
    return "int8" if weight.values.dtype == torch.int8 else "fp8"


def _extended(
    rows: Tensor, weight: Weight, bias: Tensor | None, s: Tensor, up: Tensor, scale: float, chunk: int
) -> Tensor:
    """[x | s | 1 0] [W | scale up | bias 0]^T, (M, N), for some rows of W at a time."""
    (n, k), width = weight.shape, rows.shape[1]
    fill_padding(rows, k, s)  # all of it: leftover NaN would survive the zeros in the scratch
    y = rows.new_empty(rows.shape[0], n)
    for part in parts(n, k, chunk):
        w = _scratch(part.stop - part.start, width, rows)
        decode_extended(weight[part], up[part], scale, None if bias is None else bias[part], w)
        torch.mm(rows, w.t(), out=y[:, part])
    return y


def _plain(
    rows: Tensor, weight: Weight, bias: Tensor | None, s: Tensor | None, up: Tensor | None, scale: float, chunk: int
) -> Tensor:
    n, k = weight.shape
    if isinstance(weight, Tensor):
        y = F.linear(rows, weight.to(rows.dtype), bias)
    else:
        y = rows.new_empty(rows.shape[0], n)
        for part in parts(n, k, chunk):
            w = _scratch(part.stop - part.start, k, rows)
            dequantize(weight[part], w.dtype, w)
            _product(rows, w.t(), None if bias is None else bias[part], y[:, part])
    return y if s is None or up is None else y.addmm_(s, up.t().to(s.dtype), alpha=scale)


def _dx(
    rows: Tensor, weight: Weight, down: Tensor | None, up: Tensor | None, scale: float, padding: int
) -> tuple[Tensor, Tensor | None]:
    """dy W + ds down, (M, K + padding), and with LoRA ds = scale dy up, (M, R)."""
    k = weight.shape[1]
    choice = choose(f"lora_linear_backward_{_format(weight)}", rows.device, rows.shape[0])
    dx = rows.new_empty(rows.shape[0], k + padding)
    if choice.path == "fused" and rows.dtype != torch.float64:
        ds = None if up is None else _ds(rows, up, scale)
        input_gradient(rows, weight, ds, down, dx[:, :k], choice)
        dx[:, k:] = 0
        return dx, ds
    _decoded_dx(dx, rows, weight, up, scale, choice.chunk)
    if up is None or down is None:
        return dx, None
    ds = dx[:, k : k + len(down)] if padding else _ds(rows, up, scale)
    dx[:, :k].addmm_(ds, down)
    return dx, ds


def _ds(rows: Tensor, up: Tensor, scale: float) -> Tensor:
    return rows.new_empty(rows.shape[0], up.shape[1]).addmm_(rows, up.to(rows.dtype), beta=0, alpha=scale)


def _decoded_dx(dx: Tensor, rows: Tensor, weight: Weight, up: Tensor | None, scale: float, chunk: int) -> None:
    """Write dy [W | scale up | 0] into `dx` (M, K + padding), for some columns of W at a time: their parts of the
    result are final, and none is rounded twice.
    """
    n, k = weight.shape
    padding = dx.shape[1] - k
    if isinstance(weight, Tensor):
        torch.mm(rows, weight.to(rows.dtype), out=dx[:, :k])
        if up is not None and padding:
            dx[:, k + up.shape[1] :] = 0
            dx[:, k : k + up.shape[1]].addmm_(rows, up.to(rows.dtype), beta=0, alpha=scale)
        return
    for part in parts(k, n, chunk):
        columns, last = part.stop - part.start, padding if part.stop == k else 0
        w = _scratch(n, columns + last, rows)
        if up is None or not last:
            dequantize(_columns(weight, part), w.dtype, w)
        else:
            decode_extended(_columns(weight, part), up, scale, None, w)
        torch.mm(rows, w, out=dx[:, part.start : part.stop + last])


def _columns(weight: NF4Weight | RowScaled, part: slice) -> Weight:
    """Some columns of a weight (for NF4, multiples of 64): a view."""
    if isinstance(weight, NF4Weight):
        blocks = slice(part.start // NF4_BLOCK, part.stop // NF4_BLOCK)
        return NF4Weight(weight.codes[:, part.start // 2 : part.stop // 2], weight.absmax[:, blocks])
    return RowScaled(weight.values[:, part], weight.scale)


def _product(a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(a, b, out=out)
    else:
        torch.addmm(bias, a, b, out=out)


def _mm_fp32(a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """scale a b, summed and returned in fp32, or in the factors' dtype if that is wider."""
    if not a.is_cuda or a.dtype not in (torch.bfloat16, torch.float16):
        dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
        product = a.to(dtype) @ b.to(dtype)
        return product if scale == 1.0 else product.mul_(scale)
    if scale == 1.0:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.addmm(_unread(a.device), a, b, out_dtype=torch.float32, beta=0, alpha=scale)


@cache
def _unread(device: torch.device) -> Tensor:
    """What `addmm` adds 0 times, and does not read."""
    return torch.empty(1, 1, device=device)


_scratches: dict[tuple[torch.device, torch.dtype, int], Tensor] = {}


def _scratch(rows: int, columns: int, like: Tensor) -> Tensor:
    """(rows, columns) for a decoded weight, in the dtype and on the device of `like`: the same memory each time.

    Uses are ordered by the stream, and each stream has its own scratch. It grows to the largest size requested.
    """
    stream = torch._C._cuda_getCurrentRawStream(like.get_device()) if like.is_cuda else 0
    key = (like.device, like.dtype, stream)
    if key not in _scratches or _scratches[key].numel() < rows * columns:
        _scratches.pop(key, None)  # first, so that old and new never exist together
        _scratches[key] = torch.empty(rows * columns, dtype=like.dtype, device=like.device)
    return _scratches[key][: rows * columns].view(rows, columns)
