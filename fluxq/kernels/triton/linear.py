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

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..chunks import parts
from ..parts import Parts, by_part, s_gradient
from ..weights import FORMATS, NF4Weight, Weight
from . import matmul
from .convert import decode_extended, dequantize
from .extension import fill_padding
from .few_rows import input_gradient
from .table import choose


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

    x (..., K), or with padding behind each row, which this op overwrites; weight (N, K) as stored; down (R, K), up (N,
    R), bias (N,) in x's dtype; up may have a wider dtype and is then rounded after scaling. s: that of another part of
    the same layer, which has just been computed from the same x, and is_filled: has written its padding; or any other
    (M, R) in its place.
    """
    part, k = slice(0, weight.shape[0]) if part is None else part, weight.shape[1]
    # Layers may share an input; each fills the padding again. Autograd keeps nothing that is in the padding, so `data`
    # hides the write from it; s is a separate tensor.
    rows = x.data.view(-1, x.shape[-1]) if x.is_contiguous() else x.data.reshape(-1, x.shape[-1])
    choice = choose(FORWARD[_format(weight)], x.device, rows.shape[0])
    if down is not None and up is not None:
        s = torch.mm(_first(rows, k), down.t()) if s is None else s.view(-1, len(down))
    if choice.path == "fused" and x.dtype != torch.float64:
        w, b, u = _part(weight, bias, up, part)
        y = matmul.linear(_first(rows, k), w, b, s, u, scale, choice)
    elif choice.path == "extended" and s is not None and up is not None and rows.shape[1] > k:
        if not is_filled:
            fill_padding(rows, k, s)  # all of it: leftover NaN would survive the zeros in the scratch
        y = _extended(rows, weight, bias, up, scale, part, choice.chunk)
    else:
        # Adding a bias is free if the result is in one piece, as it is without chunks. If it is added to some columns,
        # it is first written to them and then read back. So with a bias, only a table row "plain" uses chunks.
        whole = bias is not None and choice.path == "extended"
        y = _plain(_first(rows, k), weight, bias, s, up, scale, part, 0 if whole else choice.chunk)
    return y.view(*x.shape[:-1], y.shape[1]), s if s is None else s.view(*x.shape[:-1], s.shape[1])


def lora_linear_backward(
    dy: Tensor | Sequence[Tensor],
    weight: Weight | None,
    x: Tensor | None,
    s: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    scale: float,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, down and up for `lora_linear`. That of x has x's width; its padding is finite.

    dy (..., N), or the gradients of consecutive parts of the outputs. weight None: do not compute the gradient of x. s
    None: there is no LoRA, and x is not needed. The gradients of down and up are summed and returned in fp32.
    """
    given = (dy,) if isinstance(dy, Tensor) else dy
    parts, padding = by_part(given), 0 if x is None or down is None else x.shape[-1] - down.shape[1]
    dx, ds = (None, None) if weight is None else _dx(parts, weight, down, up, scale, padding)
    dx = None if dx is None else dx.view(*given[0].shape[:-1], dx.shape[1])
    if x is None or s is None or down is None or up is None:
        return dx, None, None
    ds = s_gradient(parts, up, scale) if ds is None else ds
    return dx, *_gradients(parts, _first(x, down.shape[1]), s, ds, scale)


def lora_gradients(
    dy: Tensor | Sequence[Tensor], x: Tensor, s: Tensor, ds: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients of down and up, in fp32. dy as above, x (..., K), s (..., R), and the gradient of s: ds (M, R)."""
    return _gradients(by_part((dy,) if isinstance(dy, Tensor) else dy), x, s, ds, scale)


def _gradients(parts: Parts, x: Tensor, s: Tensor, ds: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Gradients of down and up, in fp32."""
    s, (_, first) = s.reshape(-1, s.shape[-1]), parts[0]
    d_down = _mm_fp32(ds.t(), x.reshape(-1, x.shape[-1]))
    if len(parts) == 1:
        return d_down, _mm_fp32(first.t(), s, scale)
    d_up = torch.empty(parts[-1][0].stop, s.shape[1], dtype=d_down.dtype, device=s.device)
    for part, dy in parts:
        _mm_fp32(dy.t(), s, scale, d_up[part])
    return d_down, d_up


def _first(x: Tensor, width: int) -> Tensor:
    """The first `width` columns."""
    return x if x.shape[-1] == width else x[..., :width]


FORWARD = {format: f"lora_linear_{format}" for format in FORMATS}
BACKWARD = {format: f"lora_linear_backward_{format}" for format in FORMATS}


def _format(weight: Weight) -> str:
    if isinstance(weight, Tensor):
        return "bf16"
    if isinstance(weight, NF4Weight):
        return "nf4"
    return "int8" if weight.values.dtype == torch.int8 else "fp8"


def _extended(
    rows: Tensor, weight: Weight, bias: Tensor | None, up: Tensor, scale: float, part: slice, chunk: int
) -> Tensor:
    """[x | s | 1 0] [W | scale up | bias 0]^T for some outputs, (M, part), some rows of W at a time."""
    width = rows.shape[1]
    y = rows.new_empty(rows.shape[0], part.stop - part.start)
    for piece, here in _pieces(part, weight.shape[1], chunk):
        w = _scratch(piece.stop - piece.start, width, rows)
        decode_extended(weight, piece, up, scale, bias, w)
        torch.mm(rows, w.t(), out=_columns_of(y, here))
    return y


def _plain(
    rows: Tensor,
    weight: Weight,
    bias: Tensor | None,
    s: Tensor | None,
    up: Tensor | None,
    scale: float,
    part: slice,
    chunk: int,
) -> Tensor:
    k = weight.shape[1]
    if isinstance(weight, Tensor):
        w, bias, up = _part(weight, bias, up, part)
        y = F.linear(rows, w.to(rows.dtype), bias)
    else:
        y = rows.new_empty(rows.shape[0], part.stop - part.start)
        for piece, here in _pieces(part, k, chunk):
            w = _scratch(piece.stop - piece.start, k, rows)
            dequantize(weight, w.dtype, w, part=piece)
            _product(rows, w.t(), None if bias is None else bias[piece], _columns_of(y, here))
        up = None if up is None else up[part]
    return y if s is None or up is None else y.addmm_(s, up.t().to(s.dtype), alpha=scale)


def _part(
    weight: Weight, bias: Tensor | None, up: Tensor | None, part: slice
) -> tuple[Any, Tensor | None, Tensor | None]:
    """The layer that computes the outputs `part`."""
    if part.stop - part.start == weight.shape[0]:
        return weight, bias, up
    return weight[part], None if bias is None else bias[part], None if up is None else up[part]


def _pieces(part: slice, width: int, chunk: int) -> Iterator[tuple[slice, slice]]:
    """`part` of one side of a weight in pieces of about `chunk` weights; each also as counted from the part's start."""
    for here in parts(part.stop - part.start, width, chunk):
        yield slice(part.start + here.start, part.start + here.stop), here


def _columns_of(y: Tensor, part: slice) -> Tensor:
    return y if part.stop - part.start == y.shape[1] else y[:, part]


def _dx(
    given: Parts,
    weight: Weight,
    down: Tensor | None,
    up: Tensor | None,
    scale: float,
    padding: int,
) -> tuple[Tensor, Tensor | None]:
    """dy W + ds down, (M, K + padding), and with LoRA ds = scale dy up, (M, R)."""
    k, rows = weight.shape[1], given[0][1]
    choice = choose(BACKWARD[_format(weight)], rows.device, rows.shape[0])
    dx = rows.new_empty(rows.shape[0], k + padding)
    if choice.path == "fused" and rows.dtype != torch.float64:
        ds = None if up is None else s_gradient(given, up, scale)
        whole = rows if len(given) == 1 else torch.cat([dy for _, dy in given], 1)
        input_gradient(whole, weight, ds, down, _first(dx, k), choice)
        dx[:, k:] = 0
        return dx, ds
    for part, dy in given:
        _decoded_dx(dx, dy, weight, part, up, scale, choice.chunk)
    if up is None or down is None:
        return dx, None
    ds = dx[:, k : k + len(down)] if padding else s_gradient(given, up, scale)
    _first(dx, k).addmm_(ds, down)
    return dx, ds


def _decoded_dx(
    dx: Tensor, dy: Tensor, weight: Weight, part: slice, up: Tensor | None, scale: float, chunk: int
) -> None:
    """Write dy [W | scale up | 0] of the rows `part` of W into `dx` (M, K + padding), or add it if they are not the
    first; for some columns of W at a time: their parts of the result are final, and none is rounded twice.
    """
    k, more = weight.shape[1], int(part.start > 0)
    padding = dx.shape[1] - k
    if isinstance(weight, Tensor):
        _first(dx, k).addmm_(dy, weight[part].to(dy.dtype), beta=more)
        if up is not None and padding:
            if not more:
                dx[:, k + up.shape[1] :] = 0
            dx[:, k : k + up.shape[1]].addmm_(dy, up[part].to(dy.dtype), beta=more, alpha=scale)
        return
    for columns in parts(k, part.stop - part.start, chunk):
        last = padding if columns.stop == k else 0
        w = _scratch(part.stop - part.start, columns.stop - columns.start + last, dy)
        some = weight if columns.stop - columns.start == k else weight.columns(columns.start, columns.stop)
        if up is None or not last:
            dequantize(some, w.dtype, w, part=part)
        else:
            decode_extended(some, part, up, scale, None, w)
        to = _columns_of(dx, slice(columns.start, columns.stop + last))
        if more:
            to.addmm_(dy, w)
        else:
            torch.mm(dy, w, out=to)


def _product(a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(a, b, out=out)
    else:
        torch.addmm(bias, a, b, out=out)


def _mm_fp32(a: Tensor, b: Tensor, scale: float = 1.0, out: Tensor | None = None) -> Tensor:
    """scale a b, summed and returned in fp32, or in the factors' dtype if that is wider; in `out` if given."""
    if not a.is_cuda or a.dtype not in (torch.bfloat16, torch.float16):
        dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
        product = torch.mm(a.to(dtype), b.to(dtype), out=out)
        return product if scale == 1.0 else product.mul_(scale)
    if scale == 1.0:
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    return torch.addmm(_unread(a.device), a, b, out_dtype=torch.float32, beta=0, alpha=scale, out=out)


@cache
def _unread(device: torch.device) -> Tensor:
    """What `addmm` adds 0 times, and does not read."""
    return torch.empty(1, 1, device=device)


_scratches: dict[tuple[torch.device, torch.dtype, int], tuple[Tensor, dict[tuple[int, int], Tensor]]] = {}
"""Device, dtype and stream -> memory for decoded weights, and its uses so far by their shape."""


def _scratch(rows: int, columns: int, like: Tensor) -> Tensor:
    """(rows, columns) for a decoded weight, in the dtype and on the device of `like`: the same memory each time.

    Uses are ordered by the stream, and each stream has its own scratch. It grows to the largest size requested.
    """
    stream = torch._C._cuda_getCurrentRawStream(like.get_device()) if like.is_cuda else 0
    key, shape = (like.device, like.dtype, stream), (rows, columns)
    if key not in _scratches or _scratches[key][0].numel() < rows * columns:
        _scratches.pop(key, None)  # first, so that old and new never exist together
        _scratches[key] = torch.empty(rows * columns, dtype=like.dtype, device=like.device), {}
    memory, uses = _scratches[key]
    if shape not in uses:
        uses[shape] = memory[: rows * columns].view(shape)
    return uses[shape]
