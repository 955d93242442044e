"""FLUX.1 with random weights, generated on the device in their stored form: no file is read or written.

Speed and memory do not depend on the weights' values. Their layout is that of a quantized file
(fluxq/formats/quantized.py), and the same ring streams them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor, nn

from fluxq.formats.checkpoint.shapes import flux_shapes
from fluxq.formats.quantized import TensorEntry, assign, layout, view
from fluxq.formats.stream import expect_training, load_streamed
from fluxq.model import Flux, FluxConfig, add_lora
from fluxq.model.lora import lora_layers
from fluxq.model.units import REST
from fluxq.offload import Streams
from fluxq.offload.inputs import inputs_for
from fluxq.offload.plans import Plan

SPREAD = {"nf4": 0.518, "int8": 73.6, "fp8": 1.0}
"""Standard deviation of codes and values as `fill` draws them, decoded but not yet scaled."""


def random_flux(
    config: FluxConfig,
    format: str,
    device: torch.device,
    rank: int,
    resident: Collection[str] | None = None,
    slots: int = 8,
    notify: Callable[[str], None] = lambda line: None,
    through: Callable[[Streams], Streams] = lambda streams: streams,
) -> Flux:
    """The transformer in `format`, with LoRA on attention and MLP, both halves random.

    resident: the units that stay on the device, None for all; the others are streamed through `slots`. notify, through:
    see load_streamed.
    """
    units = RandomUnits(config, format, device)
    if resident is None:
        with torch.device("meta"):
            flux = Flux(config)
        for unit in units.units:
            assign(flux, dict(units.tensors(unit, units.read(unit))))
        flux.eval()
    else:
        flux = load_streamed(units, device, resident, slots, notify=notify, through=through)
    add_lora(flux, rank, rank)
    for layer in lora_layers(flux).values():
        nn.init.normal_(layer.get_parameter("lora_up"), std=0.01)
    expect_training(flux)
    return flux


def planned_flux(
    config: FluxConfig,
    made: Plan,
    rank: int,
    device: torch.device,
    through: Callable[[Streams], Streams] = lambda streams: streams,
) -> Flux:
    """The transformer with random weights, stored, placed and multiplied as the plan `made` says."""
    flux = random_flux(config, made.format, device, rank, made.placed, made.slots, through=through)
    flux.set_policy(made.policies)
    flux.set_compute(made.compute)
    if made.offload:
        flux.inputs = inputs_for(device, lambda line: None, through)
    return flux


class RandomUnits:
    """The content of a quantized file, generated on reading; a unit does not depend on the order of reading."""

    def __init__(self, config: FluxConfig, format: str, device: torch.device) -> None:
        self.config, self.format = config, format
        self._shapes, self._device = dict(flux_shapes(config)), device
        laid_out = layout(self._shapes, format)
        self.units = {unit: entries for unit, (entries, _) in laid_out.items()}
        self._lengths = {unit: length for unit, (_, length) in laid_out.items()}
        self._generator = torch.Generator(device)
        self._seeds = {unit: seed for seed, unit in enumerate(self.units)}

    def length(self, unit: str) -> int:
        return self._lengths[unit]

    def read(self, unit: str) -> Tensor:
        self._generator.manual_seed(self._seeds[unit])
        flat = torch.zeros(self.length(unit), dtype=torch.uint8, device=self._device)
        for entry in self.units[unit]:
            self.fill(entry, view(flat, entry), self.format if unit != REST else "bf16")
        return flat

    def read_into(self, unit: str, out: Tensor) -> None:
        out.copy_(self.read(unit))

    def tensors(self, unit: str, flat: Tensor) -> Iterator[tuple[str, Tensor]]:
        return ((entry.name, view(flat, entry)) for entry in self.units[unit])

    def fill(self, entry: TensorEntry, out: Tensor, format: str) -> None:
        """Matrices get a standard deviation of 1/sqrt(fan-in), biases one of 0.02; scales are around 1."""
        layer, _, leaf = entry.name.rpartition(".")
        if leaf == "codes":
            out.random_(0, 256, generator=self._generator)
        elif leaf == "values" and entry.dtype == torch.int8:
            out.random_(-127, 128, generator=self._generator)
        elif leaf == "values":
            out.copy_(self._normal(out))
        elif leaf in ("absmax", "scale") and f"{layer}.weight" in self._shapes:
            out.fill_(1 / (SPREAD[format] * math.sqrt(self._shapes[f"{layer}.weight"][1])))
        elif out.ndim == 2:
            out.copy_(self._normal(out).mul_(out.shape[1] ** -0.5))
        else:
            out.copy_(self._normal(out).mul_(0.02).add_(1.0 if leaf == "scale" else 0.0))

    def _normal(self, out: Tensor) -> Tensor:
        return torch.randn(out.shape, generator=self._generator, device=self._device, dtype=torch.bfloat16)
