"""`--from-lora`: training that starts from a LoRA file, made by any program.

The new run has one rank and one scale for all layers. A layer with a lower rank in the file gets extra components that
have no effect yet, as in a fresh LoRA; a different scale goes into `up`. So the model starts exactly as with the file,
unless the run asks for a lower rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace

import torch

from fluxq.config import LoraConfig
from fluxq.console import Notify, plural
from fluxq.errors import WrongRequest
from fluxq.formats.lora.algebra import resized
from fluxq.formats.lora.keys import matrices
from fluxq.formats.lora.read import Lora, load_lora
from fluxq.model.config import FluxConfig
from fluxq.model.linear import Linear
from fluxq.model.lora import TARGETS, targeted
from fluxq.models import Models


def read_start(config: LoraConfig, models: Models, notify: Notify) -> Lora | None:
    """The LoRA that `config.from_lora` names, if it names one. Its CLIP-L part is left out unless CLIP-L trains.

    Raises WrongRequest if it does not fit the transformer, or CLIP-L.
    """
    if config.from_lora is None:
        return None
    path = config.from_lora
    lora = load_lora(path, models.flux_config)
    lora.require_transformer()
    notes = list(lora.notes)
    if config.text_encoder:
        lora.check_clip(models.open("clip_l").shapes)
    elif lora.clip:
        notes.append(
            f"its CLIP-L part ({plural(len(lora.clip), 'module')}) is left out; to keep it, pass --text-encoder clip_l"
        )
        lora.clip = {}
    for note in notes:
        notify(f"{path.name}: {note}")
    return lora


def settings_of(lora: Lora, config: LoraConfig, flux: FluxConfig, notify: Notify) -> LoraConfig:
    """`config` with its unset fields taken from the file: the highest rank, the scale if all layers share it, the
    modules. Raises WrongRequest if the file adapts layers that `config.targets` does not include.
    """
    scales = {adapter.scale for adapter in lora.everything.values()}
    scale = scales.pop() if len(scales) == 1 else 1.0
    rank = config.rank or max(adapter.rank for adapter in lora.everything.values())
    alpha = config.alpha or (scale * rank if scale > 0 else float(rank))
    targets = config.targets or targets_of(lora, flux)
    resolved = replace(config, rank=rank, alpha=alpha, targets=targets, from_lora=lora.path.absolute())
    beyond = sorted(set(lora.adapters) - set(resolved.adapted().layers(matrices(flux))))
    if beyond:
        raise WrongRequest(
            f"{lora.path} adapts layers that lora.targets does not include, like {beyond[0]} ({len(beyond)} in all); "
            "leave out lora.targets to train what the file adapts, or add them"
        )
    notify(f"from {lora.path.name}: {plural(len(lora.everything), 'layer')}, rank {rank}, alpha {alpha:g}")
    if config.rank is None and lora.ranks[-1] > max(lora.file_ranks):
        notify(
            f"rank {rank}: the file splits fused layers into parts, whose ranks add up; --rank {max(lora.file_ranks)} "
            "takes less memory but is not exact"
        )
    return resolved


def targets_of(lora: Lora, flux: FluxConfig) -> tuple[str, ...]:
    """Targets that match exactly the file's modules: a preset if one does, else a pattern per module."""
    for preset in TARGETS:
        if set(targeted(matrices(flux), preset)) == set(lora.adapters):
            return (preset,)
    return tuple(map(re.escape, lora.adapters))


@torch.no_grad()
def start_from(lora: Lora, layers: Mapping[str, Linear], notify: Notify) -> None:
    """Copy the file's weights into `layers`, which have a fresh LoRA of the run's rank and scale. If CLIP-L is trained,
    its layers are among them.
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
        notify(f"{lora.path.name} was reduced to the rank of this run; relative error: {math.sqrt(lost / whole):.2%}")
    if fresh := len(layers) - len(lora.everything):
        notify(f"not in {lora.path.name}, so trained from zero: {plural(fresh, 'layer')}")
