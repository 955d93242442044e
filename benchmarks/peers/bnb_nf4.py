"""Frozen layers in bitsandbytes' NF4: decoded in every product, forward and backward."""

from __future__ import annotations

from torch import Tensor, nn

from benchmarks.peers import need


def nf4_linear(weight: Tensor, bias: Tensor | None) -> nn.Module:
    """bitsandbytes' NF4 layer of a (N, K) bf16 matrix, with fp32 scales like ours."""
    bnb = need("bitsandbytes")
    layer = bnb.nn.Linear4bit(
        weight.shape[1],
        weight.shape[0],
        bias=bias is not None,
        compute_dtype=weight.dtype,
        compress_statistics=False,
        quant_type="nf4",
    )
    layer.weight = bnb.nn.Params4bit(
        weight.detach().cpu(), requires_grad=False, compress_statistics=False, quant_type="nf4"
    )
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return layer.to(weight.device)  # the move quantizes it


def quantize_linears(module: nn.Module) -> None:
    """Replace every linear layer below `module` with bitsandbytes' of the same weights."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            bias = None if child.bias is None else child.bias.data
            setattr(module, name, nf4_linear(child.weight.data, bias))
        else:
            quantize_linears(child)
