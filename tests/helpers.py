"""Random models, and what tests measure closeness by."""

from __future__ import annotations

from torch import Tensor, nn, no_grad

from fluxq.model import FluxConfig


def tiny_config(**changes) -> FluxConfig:
    """A FLUX.1 of 2 + 2 blocks whose widths are all different, and multiples of 64 inside the blocks."""
    values = dict(
        in_channels=16, out_channels=16, vec_in_dim=24, context_in_dim=40, hidden_size=64, mlp_ratio=4.0, num_heads=2
    )
    values |= dict(
        depth=2, depth_single_blocks=2, axes_dim=(4, 14, 14), theta=10_000, qkv_bias=True, guidance_embed=True
    )
    return FluxConfig(**(values | changes))


def randomise(module: nn.Module) -> nn.Module:
    """Fill every floating-point tensor of `module` with noise: matrices by 1/sqrt(fan-in), scales around 1, biases
    around 0.
    """
    with no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if not tensor.is_floating_point():
                continue
            if tensor.ndim > 1:
                tensor.normal_(std=tensor[0].numel() ** -0.5)
            else:
                tensor.normal_(mean=1.0 if "norm" in name and "bias" not in name else 0.0, std=0.2)
    return module


def relative_error(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b| in the Frobenius norm, in fp64."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()
