"""Training that goes on from a LoRA file: `--from-lora`, from any program.

The new run has one rank and one strength for all layers. Layers of the file with lower ranks get components that do
nothing yet, as in a fresh LoRA; another strength goes into `up`: the model starts exactly as the file makes it, unless
a lower rank was asked for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace

import torch

from fluxq.config import LoraConfig
from fluxq.console import Notify
from fluxq.errors import WrongRequest
from fluxq.formats.lora.algebra import resized
from fluxq.formats.lora.keys import matrices
from fluxq.formats.lora.read import Lora, load_lora
from fluxq.model.config import FluxConfig
from fluxq.model.linear import Linear
from fluxq.model.lora import TARGETS, targeted
from fluxq.models import Models


def read_start(asked: LoraConfig, models: Models, notify: Notify) -> Lora | None:
    """The LoRA that `asked.from_lora` names, if it names one. Its CLIP-L part is left out unless CLIP-L trains.

    Raises WrongRequest if it does not fit the transformer, or CLIP-L.
    """
    if asked.from_lora is None:
        return None
    path = asked.from_lora
    lora = load_lora(path, models.flux_config)
    if not lora.adapters:
        raise WrongRequest(f"{path} adapts no layer of the transformer; begin without --from-lora")
    notes = list(lora.notes)
    if asked.text_encoder:
        lora.check_clip(models.open("clip_l").shapes)
    elif lora.clip:
        notes.append(f"its CLIP-L part ({len(lora.clip)} modules) is left out; --text-encoder clip_l trains it on")
        lora.clip = {}
    for note in notes:
        notify(f"{path.name}: {note}")
    return lora


def settings_of(lora: Lora, asked: LoraConfig, flux: FluxConfig, notify: Notify) -> LoraConfig:
    """`asked` with what it leaves open as in the file: its highest rank, its strength where it has one, its modules.

    Raises WrongRequest where the file adapts what the targets that were asked for leave out.
    """
    scales = {adapter.scale for adapter in lora.everything.values()}
    scale = scales.pop() if len(scales) == 1 else 1.0
    rank = asked.rank or max(adapter.rank for adapter in lora.everything.values())
    alpha = asked.alpha or (scale * rank if scale > 0 else float(rank))
    targets = asked.targets or presets_of(lora, flux)
    beyond = sorted(set(lora.adapters) - set(targeted(matrices(flux), targets)))
    if beyond:
        raise WrongRequest(
            f"{lora.path} adapts {len(beyond)} layers that the targets leave out, such as {beyond[0]}; "
            "leave lora.targets open to train what it adapts, or add them"
        )
    notify(f"from {lora.path.name}: {len(lora.everything)} layers; rank {rank}, alpha {alpha:g}")
    if asked.rank is None and lora.ranks[-1] > max(lora.file_ranks):
        notify(
            f"rank {rank}: its fused layers are in parts, whose ranks add up; --rank {max(lora.file_ranks)} needs less"
        )
    return replace(asked, rank=rank, alpha=alpha, targets=targets, from_lora=lora.path.absolute())


def presets_of(lora: Lora, flux: FluxConfig) -> tuple[str, ...]:
    """Targets that are just the file's modules: a preset where one is, else path by path."""
    for preset in TARGETS:
        if set(targeted(matrices(flux), preset)) == set(lora.adapters):
            return (preset,)
    return tuple(map(re.escape, lora.adapters))


@torch.no_grad()
def start_from(lora: Lora, layers: Mapping[str, Linear], notify: Notify) -> None:
    """Put the file's weights into `layers`, CLIP-L's among them where it is trained, which have a fresh LoRA of the
    run's rank and strength.
    """
    lost = whole = 0.0
    for path, adapter in lora.everything.items():
        layer = layers[path]
        assert layer.lora_down is not None and layer.lora_up is not None, "add_lora was called"
        fitting = resized(adapter, len(layer.lora_down))
        lost, whole, own = lost + fitting.lost, whole + fitting.whole, fitting.adapter
        layer.lora_down[: own.rank] = own.down.to(layer.lora_down)
        layer.lora_up[:, : own.rank] = own.up.to(layer.lora_up) * (own.scale / layer.lora_scale)
    if lost:
        notify(f"{lora.path.name} was brought to the rank asked for; relative error {math.sqrt(lost / whole):.2g}")
    if fresh := len(layers) - len(lora.everything):
        notify(f"{fresh} layers are not in {lora.path.name} and begin anew")
