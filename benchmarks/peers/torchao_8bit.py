"""torchao's 8-bit layers, forward only: like fluxq, with a scale per token and per row of the weight."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from benchmarks.peers import need


def linear(weight: Tensor, bias: Tensor | None, bits: str) -> Callable[[Tensor], Tensor]:
    """x -> x W^T + bias in "int8" or "fp8", for a (N, K) matrix."""
    api = need("torchao.quantization")
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device=weight.device, dtype=weight.dtype)
    layer.requires_grad_(False).weight.copy_(weight)
    if bias is not None:
        layer.bias.copy_(bias)
    host = nn.Sequential(layer)  # quantize_ replaces children only
    if bits == "int8":
        config = api.Int8DynamicActivationInt8WeightConfig()
    else:
        config = api.Float8DynamicActivationFloat8WeightConfig(granularity=api.PerRow())
    api.quantize_(host, config)
    return host
