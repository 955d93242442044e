"""torchao's 8-bit layers, forward only: activations rounded per token, weights per row, as fluxq rounds them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from benchmarks.peers import need


def linear(weight: Tensor, bias: Tensor | None, bits: str) -> Callable[[Tensor], Tensor]:
    """x -> x W^T + bias in "int8" or "fp8", for a (N, K) matrix."""
    api = need("torchao.quantization")
    host = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None))
    host = host.to(weight.device, weight.dtype).requires_grad_(False)
    host[0].weight.data.copy_(weight)
    if bias is not None:
        host[0].bias.data.copy_(bias)
    if bits == "int8":
        config = api.Int8DynamicActivationInt8WeightConfig()
    else:
        config = api.Float8DynamicActivationFloat8WeightConfig(granularity=api.PerRow())
    api.quantize_(host, config)
    return host
