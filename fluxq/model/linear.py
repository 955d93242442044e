"""The linear layer of the transformer: frozen weight, optional LoRA."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fluxq.kernels import NF4Weight, Weight, dequantize, lora_linear, quantize


class Linear(nn.Module):
    """y = x W^T + bias [+ scale (x down^T) up^T].

    W (N, K) and bias (N,) are buffers: frozen is a buffer, trainable is a parameter. Stored as NF4, W is held as the
    buffers `codes` and `absmax` in place of `weight`. `lora_down` (R, K) and `lora_up` (N, R) are fp32 parameters once
    added.
    """

    weight: Tensor | None
    bias: Tensor | None
    codes: Tensor
    absmax: Tensor
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

    @property
    def frozen(self) -> Weight:
        """The weight as it is stored."""
        return self.weight if self.weight is not None else NF4Weight(self.codes, self.absmax)

    def store(self, w: Tensor, format: str) -> None:
        """Hold the matrix `w` (N, K) in `format` from now on, on `w`'s device."""
        if tuple(w.shape) != (self.out_features, self.in_features):
            raise ValueError(
                f"the layer holds a ({self.out_features}, {self.in_features}) weight, not {tuple(w.shape)}"
            )
        stored = quantize(w, format)
        if isinstance(stored, NF4Weight):
            self.weight = None
            self.register_buffer("codes", stored.codes)
            self.register_buffer("absmax", stored.absmax)
        else:
            self.weight = stored

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The frozen matrix (N, K) in `dtype`."""
        return dequantize(self.frozen, dtype)

    def add_lora(self, rank: int, alpha: float, generator: torch.Generator | None = None) -> None:
        """Add LoRA of `rank`, scaled by alpha / rank; up starts at zero, so that the layer's output does not change
        yet.
        """
        bound = self.in_features**-0.5
        down = torch.empty(rank, self.in_features).uniform_(-bound, bound, generator=generator)
        self.set_lora(down, torch.zeros(self.out_features, rank), alpha / rank)

    def set_lora(self, down: Tensor | None, up: Tensor | None, scale: float) -> None:
        """Have this LoRA, down (R, K) and up (N, R), as fp32 parameters where the frozen weight lies; or none."""
        device = self.absmax.device if self.weight is None else self.weight.device
        self.lora_down = None if down is None else nn.Parameter(down.to(device, torch.float32))
        self.lora_up = None if up is None else nn.Parameter(up.to(device, torch.float32))
        self.lora_scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return lora_linear(x, self.frozen, self.bias, self.lora_down, self.lora_up, self.lora_scale)
