"""The products of one use of a frozen layer with LoRA: forward, part by part, and those of 8 bits backward.

The outputs of a layer may be several tensors (`parts`). What depends on the input alone is done once for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import Activations
from .dispatch import ops
from .dropout import Dropped
from .parts import by_part, s_gradient
from .replay import SMALL_RANK, keep, placeholder, take, unread, will_be_unread
from .weights import RowScaled, Weight


class Use(NamedTuple):
    """How a layer is used: arguments of `lora_linear`, and of `lora_linear_parts` if there are `parts`."""

    scale: float
    compute: str
    rotation: int
    feeds: tuple[str | None, ...]
    parts: tuple[slice | None, ...] = (None,)
    dropped: Dropped | None = None


class Product:
    """The forward pass of one use of a layer, part by part. What serves all parts is made when first needed."""

    def __init__(
        self,
        x: Tensor,
        given: Activations,
        weight: Weight,
        bias: Tensor | None,
        down: Tensor | None,
        up: Tensor | None,
        use: Use,
    ) -> None:
        self.x, self.given, self.weight, self.bias, self.down, self.up, self.use = x, given, weight, bias, down, up, use
        self.s: Tensor | None = None
        self.is_filled = False  # the padding behind x has s
        self.row_scales: list[Tensor | None] = []

    def part(self, part: slice | None, feeds: str | None) -> Tensor:
        """The outputs `part`, all of them if None; a placeholder if nobody reads what they feed."""
        eight_bits, needs_scales = self.use.compute != "bf16", self.use.compute.endswith("_dx")
        if unread(feeds):
            n = self.weight.shape[0] if part is None else part.stop - part.start
            if needs_scales:
                self.row_scales.append(take("row_scales"))
            return placeholder(*self.x.shape[:-1], n, like=self.x)
        if not eight_bits:
            if self.use.dropped is not None and self.s is None and self.down is not None:
                self.s = self._inner(self.down)
            y, self.s = ops(self.x).lora_linear(
                self.x, self.weight, self.bias, self.down, self.up, self.use.scale, part, self.s, self.is_filled
            )
            self.is_filled = True
            return y
        y, row_scale = self._in_8_bits(part)
        if needs_scales and will_be_unread(feeds):
            keep("row_scales", row_scale)
        self.row_scales.append(row_scale)
        return y

    def _in_8_bits(self, part: slice | None) -> tuple[Tensor, Tensor | None]:
        """The outputs, from the input and the weight as 8-bit rows, each row with its scale; and the scales of the
        weight's rows, if they were computed.
        """
        x, use, dtype = self.x, self.use, eight_bit_dtype(self.use.compute)
        rows = x if x.ndim == 2 else x.flatten(0, -2)
        if self.given.values is None or self.given.scale is None:
            values, row_scale = ops(x).row_quantize(rows, dtype, rotation=use.rotation)
            self.given = self.given._replace(values=values, scale=row_scale)
        if self.s is None and self.down is not None:
            self.s = self._inner(self.down).view(len(rows), -1)
        w, w_scale = ops(x).to_rows(self.weight, dtype, rotation=use.rotation, part=part)
        whole = part is None
        up = self.up if whole or self.up is None else self.up[part]
        bias = self.bias if whole or self.bias is None else self.bias[part]
        values, row_scale = self.given.values, self.given.scale
        y = ops(x).matmul_8bit(values, row_scale, w, w_scale, x.dtype, self.s, up, bias, use.scale)
        stored = not use.rotation and isinstance(self.weight, RowScaled) and self.weight.values.dtype == dtype
        return y.view(*x.shape[:-1], -1), None if stored else w_scale

    def s_for_backward(self) -> Tensor | None:
        """x down^T in x's dtype. Of a layer whose outputs a replay does not read, it is kept from the forward pass."""
        if self.down is None:
            return None
        small, feeds = len(self.down) <= SMALL_RANK, self.use.feeds
        if all(map(unread, feeds)):
            self.s = take("s") if small else self._inner(self.down)
        assert self.s is not None
        s = self.s if self.s.dtype == self.x.dtype else self.s.to(self.x.dtype)
        if small and all(map(will_be_unread, feeds)):
            keep("s", s)
        return s

    def _inner(self, down: Tensor) -> Tensor:
        """x down^T, (..., R), as its producer made it if it did, without what is dropped."""
        x, dropped, s = self.x[..., : down.shape[1]], self.use.dropped, self.given.s
        if dropped is None:
            return F.linear(x, down) if s is None else s
        if s is None or dropped.rate:
            s = F.linear(without_dropped(x, dropped), down)
        return dropped.scale(s)


def without_dropped(x: Tensor, dropped: Dropped) -> Tensor:
    """`x` (..., K) with zeros for what is dropped of it."""
    return ops(x).drop(x, dropped.rate, dropped.key) if dropped.rate else x


def eight_bit_dtype(compute: str) -> torch.dtype:
    return torch.int8 if compute.startswith("int8") else torch.float8_e4m3fn


def input_gradient(
    dys: Sequence[Tensor],
    weight: Weight,
    row_scales: Sequence[Tensor | None],
    down: Tensor | None,
    ds: Tensor | None,
    use: Use,
) -> Tensor:
    """The gradient of the input, in 8 bits.

    It contracts over W's rows, so dy is multiplied by their scales before it is rounded (this saves a second copy of W
    and costs no accuracy). With a rotated W the product is rotated too, so LoRA's part is added rotated, and the sum is
    rotated back.
    """
    dx, o = None, ops(dys[0])
    if down is not None and use.rotation:
        down = o.rotate(down, use.rotation)
    lora: tuple[Tensor | None, Tensor | None] = (ds, None if down is None else down.t())
    for dy, part, row_scale in zip(dys, use.parts, row_scales, strict=True):
        dx = _part_of_dx(dy.flatten(0, -2), weight, part, row_scale, lora, dx, use)
        lora = (None, None)
    assert dx is not None
    dx = o.rotate(dx, use.rotation) if use.rotation else dx
    return dx.view(*dys[0].shape[:-1], -1)


def _part_of_dx(
    dy: Tensor,
    weight: Weight,
    part: slice | None,
    row_scale: Tensor | None,
    lora: tuple[Tensor | None, Tensor | None],
    dx: Tensor | None,
    use: Use,
) -> Tensor:
    """What some outputs contribute, added to `dx` if there is some already. dy (M, part)."""
    dtype, o = eight_bit_dtype(use.compute), ops(dy)
    w, w_scale = o.to_rows(weight, dtype, True, use.rotation, part, row_scale)  # (K, part)
    values, scale = o.row_quantize(dy, dtype, w_scale)
    return o.matmul_8bit(values, scale, w, None, dy.dtype, *lora, onto=dx)


def gradients_with_dropout(
    dys: Sequence[Tensor],
    weight: Weight | None,
    x: Tensor,
    s: Tensor,
    down: Tensor,
    up: Tensor,
    use: Use,
    row_scales: Sequence[Tensor | None],
) -> tuple[Tensor | None, Tensor, Tensor]:
    """The gradients of x (None without `weight`), down and up. s (..., R) is that of the forward pass."""
    dropped, o, k = use.dropped, ops(dys[0]), down.shape[1]
    assert dropped is not None
    ds, dx = dropped.scale(s_gradient(by_part(dys), up, use.scale)), None
    if weight is not None:
        if use.compute.endswith("_dx"):
            dx = input_gradient(dys, weight, row_scales, None, None, use)
        else:
            given = dys[0] if len(dys) == 1 else dys
            dx, _, _ = o.lora_linear_backward(given, weight, None, None, None, None, use.scale)
        if dropped.rate:
            o.drop((ds @ down).view(dx.shape), dropped.rate, dropped.key, dx)
        else:
            dx.view(-1, k).addmm_(ds, down)
        dx = F.pad(dx, (0, x.shape[-1] - k)) if x.shape[-1] > k else dx
    return dx, *o.lora_gradients(dys, without_dropped(x[..., :k], dropped), s, ds, use.scale)
