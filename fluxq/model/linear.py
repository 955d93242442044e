"""The linear layer of the transformer: frozen weight, optional LoRA."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from fluxq.kernels import Activations, NF4Weight, RowScaled, Wants, Weight, lora_linear, lora_linear_parts, wants
from fluxq.kernels.dropout import dropped_by

from .start import counted_from


class Linear(nn.Module):
    """y = x W^T + bias [+ scale (x down^T) up^T].

    Frozen tensors are buffers, trainable ones are parameters. `weight` is W (N, K), `bias` (N,); a quantized W is held
    as the buffers of its container instead (`codes` and `absmax`, or `values` and `scale`). Once added, `lora_down`
    (R, K) and `lora_up` (N, R) are fp32 parameters. A LoRA with a start (fluxq/model/start.py) is what they are more
    than `start_down` (R, K) and `start_up` (N, R).
    """

    weight: Tensor | None
    bias: Tensor | None
    lora_down: nn.Parameter | None
    lora_up: nn.Parameter | None
    start_down: Tensor | None
    start_up: Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("weight", torch.empty(out_features, in_features))
        self.register_buffer("bias", torch.empty(out_features) if bias else None)
        self.register_parameter("lora_down", None)
        self.register_parameter("lora_up", None)
        self.register_buffer("start_down", None, persistent=False)
        self.register_buffer("start_up", None, persistent=False)
        self.lora_scale, self.corrects = 1.0, False
        self.compute, self.rotation = "bf16", 0
        self._container: type[NF4Weight] | type[RowScaled] | None = None
        self._frozen: Weight | None = None  # the container of the buffers that are set now, once it was needed

    @property
    def frozen(self) -> Weight:
        """The weight as stored: a tensor, or a quantized container, which is the same until a tensor is replaced."""
        if self._frozen is None:
            if self._container is None:
                assert self.weight is not None, "the weight is neither a tensor nor in a container"
                return self.weight
            self._frozen = self._container(*(self.get_buffer(name) for name in NAMES[self._container]))
        return self._frozen

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in HELD:
            self._frozen = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Linear:
        self._frozen = None  # torch replaces buffers behind __setattr__
        return super()._apply(fn, recurse)

    def store(self, weight: Weight) -> None:
        """Replace the frozen weight by `weight` (N, K), in its own format and on its own device.

        Raises ValueError for another shape.
        """
        if tuple(weight.shape) != (self.out_features, self.in_features):
            raise ValueError(
                f"the layer holds a ({self.out_features}, {self.in_features}) weight, not {tuple(weight.shape)}"
            )
        for field in fields(self._container) if self._container else ():
            delattr(self, field.name)
        if isinstance(weight, Tensor):
            self._container, self.weight = None, weight
            return
        self._container, self.weight = type(weight), None
        for field in fields(weight):
            self.register_buffer(field.name, getattr(weight, field.name))

    def add_lora(self, rank: int, alpha: float, generator: torch.Generator | None = None) -> None:
        """Add LoRA of `rank`, scaled by alpha / rank. `lora_up` starts at zero, so the output does not change yet."""
        bound = self.in_features**-0.5
        down = torch.empty(rank, self.in_features).uniform_(-bound, bound, generator=generator)
        self.set_lora(down, torch.zeros(self.out_features, rank), alpha / rank)

    def set_lora(self, down: Tensor | None, up: Tensor | None, scale: float) -> None:
        """Set the LoRA: down (R, K), up (N, R), as fp32 parameters on the frozen weight's device. None removes it."""
        device = next(self.buffers()).device
        self.lora_down = None if down is None else nn.Parameter(down.to(device, torch.float32))
        self.lora_up = None if up is None else nn.Parameter(up.to(device, torch.float32))
        self.lora_scale = scale
        self.set_start(None, None)

    def set_start(self, down: Tensor | None, up: Tensor | None, corrects: bool = False) -> None:
        """Let the LoRA's parameters count from down (R, K) and up (N, R), held in bf16; None: from zero.

        corrects: the start itself changes the weight too, else only what was trained.
        """
        device = next(self.buffers()).device
        self.start_down = None if down is None else down.to(device, torch.bfloat16)
        self.start_up = None if up is None else up.to(device, torch.bfloat16)
        self.corrects = corrects

    def factors(self, corrects: bool) -> tuple[Tensor | None, Tensor | None]:
        """down and up of the LoRA; if it has a start, with that if it `corrects`, else what was trained (rank 2 R)."""
        own, fixed = self._parameters, self._buffers
        down, up, start_down, start_up = own["lora_down"], own["lora_up"], fixed["start_down"], fixed["start_up"]
        if down is None or up is None or start_down is None or start_up is None:
            return down, up
        return counted_from(down, up, start_down, start_up, corrects)

    def wants(self, *feeds: str) -> Wants:
        """The form in which this layer reads its input, for the op that makes it. feeds: as in `forward`."""
        down, _ = self.factors(self.corrects)
        return wants(self.compute, down, down, self.rotation, feeds)

    def forward(
        self,
        x: Tensor | Activations,
        feeds: str | Sequence[str] | None = None,
        parts: Sequence[slice] | None = None,
    ) -> Any:
        """x (..., K), or the form that `wants` describes, -> (..., N); or a tensor for each of `parts`, consecutive
        ranges of the N outputs, of which each feeds something else.

        feeds: the value that is made from the output alone (fluxq/kernels/replay.py), or one for each part.
        """
        (down, up), dropped = self.factors(self.corrects), dropped_by(self)
        layer = x, self.frozen, self._buffers["bias"], down, up, self.lora_scale, self.compute
        if parts is None:
            return lora_linear(*layer, feeds, self.rotation, dropped)  # type: ignore[arg-type]
        return lora_linear_parts(*layer, parts, feeds, self.rotation, dropped)  # type: ignore[arg-type]


NAMES = {kind: tuple(field.name for field in fields(kind)) for kind in (NF4Weight, RowScaled)}
"""The tensors of each container, which are buffers of the layer."""
HELD = {name for names in NAMES.values() for name in names} | {"weight"}
