"""A limit on how much the LoRA changes a layer, as sd-scripts' `scale_weight_norms`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from fluxq.model.linear import Linear


class _Alike(NamedTuple):
    """Layers of one shape."""

    downs: list[Tensor]
    ups: list[Tensor]
    scales: Tensor  # (n,)


class MaxNorm:
    """Scales `layers` down to a Frobenius norm of scale up down of at most `limit`: up and down by the same factor.

    Layers of one shape are scaled together, and the CPU does not wait. scaled: how many layers the last call scaled, ()
    on their device, None before the first. temporary: bytes that a call needs.
    """

    def __init__(self, layers: Iterable[Linear], limit: float) -> None:
        by_shape: dict[tuple[torch.Size, torch.Size], list[Linear]] = defaultdict(list)
        for layer in layers:
            by_shape[layer.get_parameter("lora_down").shape, layer.get_parameter("lora_up").shape].append(layer)
        self.limit, self._alike = limit, list[_Alike]()
        self.scaled: Tensor | None = None
        for alike in by_shape.values():
            downs, ups = ([layer.get_parameter(name).data for layer in alike] for name in ("lora_down", "lora_up"))
            scales = torch.tensor([layer.lora_scale for layer in alike], device=downs[0].device)
            self._alike.append(_Alike(downs, ups, scales))
        sizes = [len(a.downs) * (a.downs[0].numel() + a.ups[0].numel()) for a in self._alike]
        self.temporary = 4 * max(sizes, default=0)

    @torch.no_grad()
    def __call__(self) -> None:
        counts = []
        for downs, ups, scales in self._alike:
            down, up = torch.stack(downs), torch.stack(ups)  # (n, R, K), (n, N, R)
            # the sum of squares of up down, from two R x R products
            squares = ((down @ down.mT) * (up.mT @ up)).sum((1, 2)).clamp_(min=0)
            factors = (self.limit / (squares.sqrt() * scales)).clamp_(max=1)
            roots = factors.sqrt()[:, None, None]
            torch._foreach_copy_(downs, [*down.mul_(roots)])
            torch._foreach_copy_(ups, [*up.mul_(roots)])
            counts.append((factors < 1).sum())
        self.scaled = torch.stack(counts).sum()
