"""The linear layer of the transformer: frozen weight, optional LoRA."""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor, nn

from fluxq.kernels import Activations, NF4Weight, RowScaled, Wants, Weight, lora_linear, rows_of, wants


class Linear(nn.Module):
    """y = x W^T + bias [+ scale (x down^T) up^T].

    Frozen tensors are buffers, trainable ones are parameters. `weight` is W (N, K), `bias` (N,); a quantized W is held
    as the buffers of its container instead (`codes` and `absmax`, or `values` and `scale`). Once added, `lora_down`
    (R, K) and `lora_up` (N, R) are fp32 parameters.
    """

    weight: Tensor | None
    bias: Tensor | None
    lora_down: nn.Parameter | None
    lora_up: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("weight", torch.empty(out_features, in_features))
        self.register_buffer("bias", torch.empty(out_features) if bias else None)
        self.register_parameter("lora_down", None)
        self.register_parameter("lora_up", None)
        self.lora_scale = 1.0
        self.compute, self.rotation = "bf16", 0
        self._container: type[NF4Weight] | type[RowScaled] | None = None

    @property
    def frozen(self) -> Weight:
        """The weight as stored: a tensor or a quantized container."""
        if self._container is not None:
            return self._container(*(self.get_buffer(f.name) for f in fields(self._container)))
        assert self.weight is not None, "the weight is neither a tensor nor in a container"
        return self.weight

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

    @property
    def wants(self) -> Wants:
        """The form in which this layer reads its input, for the op that makes it."""
        return wants(self.compute, self.lora_down, next(self.buffers()), self.rotation)

    def forward(self, x: Tensor | Activations, rows: slice = slice(None), feeds: str | None = None) -> Tensor:
        """x (..., K), or the form that `wants` describes, -> (..., N), or only `rows` of the N outputs.

        feeds: the value that is made from the output alone (fluxq/kernels/replay.py).
        """
        weight, bias, up = self.frozen, self.bias, rows_of(self.lora_up, rows)
        if rows != slice(None):
            weight, bias = weight[rows], None if bias is None else bias[rows]
        return lora_linear(x, weight, bias, self.lora_down, up, self.lora_scale, self.compute, feeds, self.rotation)
