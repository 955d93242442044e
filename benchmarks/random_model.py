"""FLUX.1's blocks with random weights: speed and memory do not depend on what they say."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from fluxq.kernels import quantize
from fluxq.model import Flux, FluxConfig, add_lora
from fluxq.model.linear import Linear
from fluxq.model.lora import lora_layers


def random_flux(config: FluxConfig, depth: tuple[int, int], device: torch.device, format: str, rank: int) -> Flux:
    """A transformer of `depth` double and single blocks, `format` in its blocks, LoRA with both halves random."""
    with torch.device("meta"):
        flux = Flux(replace(config, depth=depth[0], depth_single_blocks=depth[1]))
    generator = torch.Generator(device).manual_seed(0)
    for path, module in flux.named_modules():
        fill(module, format if "_blocks." in path else "bf16", device, generator)
    add_lora(flux, rank, rank)
    for layer in lora_layers(flux).values():
        nn.init.normal_(layer.get_parameter("lora_up"), std=0.01)
    return flux


def fill(module: nn.Module, format: str, device: torch.device, generator: torch.Generator) -> None:
    """Give the module's own buffers numbers: matrices by 1/sqrt(fan-in), stored as `format`, scales around 1."""
    for name, buffer in list(module.named_buffers(recurse=False)):
        value = torch.randn(buffer.shape, generator=generator, device=device, dtype=torch.bfloat16)
        if isinstance(module, Linear) and name == "weight":
            module.store(quantize(value.mul_(buffer.shape[1] ** -0.5), format))
        else:
            setattr(module, name, 0.02 * value + (1.0 if name == "scale" else 0.0))
