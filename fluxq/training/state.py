"""The saved state of a run, from which it resumes bit for bit: the LoRA, the optimizer's state and the step number.

Everything else that a step depends on is a function of its number. The state is one safetensors file, written
atomically, with a checksum of all it holds, which is compared before anything of it is used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fluxq.errors import WrongRequest
from fluxq.formats.checkpoint.files import Checkpoint, checksum, refuse, well_formed, write_safetensors
from fluxq.model.linear import Linear

from .optim import FlatOptimizer

DAMAGED = "put a copy of that file back, or start another run from the run's last LoRA with --from-lora"

STARTS = ("start", "correction")
"""The names of a LoRA's start (fluxq/model/start.py): of one that does not count, and of one that does."""


@dataclass
class Progress:
    """How far a run is. identity: what tells it from others: "data" and "model" -> a digest, "settings" -> TOML."""

    identity: Mapping[str, str]
    step: int = 0
    seconds: float = 0.0
    validation: dict[str, float] | None = None  # before the first step
    rotated: list[str] = field(default_factory=list)  # int8 layers that rotate their inputs
    changes: list[str] = field(default_factory=list)  # of settings and data, since which step


def save_state(path: Path, progress: Progress, layers: Mapping[str, Linear], optimizer: FlatOptimizer) -> None:
    """Save what `load_state` reads."""
    saved = optimizer.state_dict()
    tensors: dict[str, Tensor] = {f"lora.{name}": p.detach() for name, p in _parameters(layers).items()}
    tensors |= _starts(layers)
    if (average := optimizer.average) is not None:
        own = average.of_parameters()
        tensors |= {f"average.{name}": own[p] for name, p in _parameters(layers).items()}
        tensors["average.count"] = torch.tensor(average.count)
    scalars: dict[str, dict] = {}
    for index, slots in saved["state"].items():
        for key, value in slots.items():
            if isinstance(value, dict):  # bitsandbytes nests its tensors
                tensors |= {f"optimizer.{index}.{key}.{inner}": tensor for inner, tensor in value.items()}
            elif isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{key}"] = value
            else:
                scalars.setdefault(str(index), {})[key] = value
    facts = {"seconds": progress.seconds, "validation": progress.validation, "rotated": progress.rotated}
    facts["changes"] = progress.changes
    facts |= progress.identity
    about = json.dumps({"step": progress.step, "scalars": scalars, "groups": saved["param_groups"], "facts": facts})
    contiguous = {name: tensor.cpu().clone().contiguous() for name, tensor in tensors.items()}
    digest = checksum(sorted(contiguous.items()), about)
    write_safetensors(path, contiguous, {"fluxq_state": about, "fluxq_checksum": digest})


def load_state(path: Path, layers: Mapping[str, Linear], optimizer: FlatOptimizer) -> Progress:
    """Put the LoRA and the optimizer back as they were saved; returns how far the run was.

    Raises WrongRequest for a file that is not a saved state, or that changed since it was written, or that belongs to
    other layers or another rank.
    """
    checkpoint = _opened(path)
    with well_formed(path, "is damaged", DAMAGED):
        return _loaded(path, checkpoint, _about(checkpoint), layers, optimizer)


def _loaded(
    path: Path, checkpoint: Checkpoint, about: Any, layers: Mapping[str, Linear], optimizer: FlatOptimizer
) -> Progress:
    facts = dict(about["facts"])
    seconds, validation, rotated = (facts.pop(name) for name in ("seconds", "validation", "rotated"))
    changes = facts.pop("changes", [])  # former states have none
    texts = [*facts.values(), *rotated, *changes]
    pairs = list(zip(about["groups"], optimizer.param_groups, strict=True))
    numbers = [seconds, *(validation or {}).values(), *(v for saved, own in pairs for v in _numbers(saved, own))]
    if type(about["step"]) is not int or about["step"] < 0 or not all(isinstance(text, str) for text in texts):
        raise ValueError("its step is not a number, or one of its names is not text")
    if not all(isinstance(number, int | float) for number in numbers):
        raise ValueError("one of its settings is not a number")
    parameters = _parameters(layers)
    saved = {key.removeprefix("lora."): key for key in checkpoint.keys() if key.startswith("lora.")}
    if {n: tuple(p.shape) for n, p in parameters.items()} != {n: checkpoint.shape(k) for n, k in saved.items()}:
        raise WrongRequest(f"{path} was saved with another rank or other targets; resume with the settings of that run")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(checkpoint.get(saved[name]))
        if (average := optimizer.average) is not None:
            own, average.count = average.of_parameters(), int(checkpoint.get("average.count"))
            for name, parameter in parameters.items():
                own[parameter].copy_(checkpoint.get(f"average.{name}"))
    for key in checkpoint.keys():
        kind, _, name = key.partition(".")
        if kind in STARTS and name.endswith(".down"):
            layer, keys = layers[name.removesuffix(".down")], (key, f"{key.removesuffix('down')}up")
            if [checkpoint.shape(k) for k in keys] != [
                p.shape for p in (layer.lora_down, layer.lora_up) if p is not None
            ]:
                raise ValueError(f"{key} does not fit its layer")
            layer.set_start(*map(checkpoint.get, keys), corrects=kind == STARTS[1])
    state: dict[int, dict] = {int(index): dict(slots) for index, slots in about["scalars"].items()}
    for key in checkpoint.keys():
        if key.startswith("optimizer."):
            _, index, slot, *inner = key.split(".")
            slots = state.setdefault(int(index), {})
            (slots.setdefault(slot, {}) if inner else slots)[inner[0] if inner else slot] = checkpoint.get(key)
    optimizer.load_state_dict({"state": state, "param_groups": about["groups"]})
    optimizer.done = about["step"]
    return Progress(facts, about["step"], seconds, validation, rotated, changes)


def saved_settings(path: Path) -> str | None:
    """The settings of the run, as TOML, when the state was saved; None in states of former versions.

    Raises WrongRequest as `load_state` does.
    """
    checkpoint = _opened(path)
    with well_formed(path, "is damaged", DAMAGED):
        settings = _about(checkpoint)["facts"].get("settings")
        if settings is not None and not isinstance(settings, str):
            raise ValueError("its settings are not text")
        return settings


def _opened(path: Path) -> Checkpoint:
    """The file at `path`, as it was written. States of former versions have no checksum."""
    try:
        checkpoint = Checkpoint(path)
    except WrongRequest as error:
        if isinstance(error.__cause__, OSError):  # it cannot be read now
            raise
        raise WrongRequest(f"{str(error).rpartition('; ')[0]}; {DAMAGED}") from error
    if (written := checkpoint.metadata.get("fluxq_checksum")) is not None:
        tensors = ((name, checkpoint.get(name)) for name in sorted(checkpoint.keys()))
        if checksum(tensors, checkpoint.metadata.get("fluxq_state", "")) != written:
            refuse(path, "is damaged (its bytes are not those that were written)", DAMAGED)
    return checkpoint


def _about(checkpoint: Checkpoint) -> dict[str, Any]:
    if "fluxq_state" not in checkpoint.metadata:
        raise WrongRequest(
            f"{checkpoint.path} is not a saved state of fluxq; name the run directory, which has state/ in it"
        )
    return json.loads(checkpoint.metadata["fluxq_state"])


def _numbers(group: Mapping[str, Any], own: Mapping[str, Any]) -> list[Any]:
    """The settings of an optimizer's group that are numbers, as those of `own` are; JSON has lists for tuples."""
    names = [key for key in group if not (isinstance(group[key], str) and isinstance(own.get(key), str))]
    values = [group[key] for key in names if key != "params" and group[key] is not None]
    return [number for value in values for number in (value if isinstance(value, list) else [value])]


def _parameters(layers: Mapping[str, Linear]) -> dict[str, nn.Parameter]:
    pairs = [
        (f"{path}.{part}", getattr(layer, f"lora_{part}")) for path, layer in layers.items() for part in ("down", "up")
    ]
    return {name: parameter for name, parameter in pairs if parameter is not None}


def _starts(layers: Mapping[str, Linear]) -> dict[str, Tensor]:
    parts = [
        (f"{STARTS[layer.corrects]}.{path}.{part}", layer.get_buffer(f"start_{part}"))
        for path, layer in layers.items()
        if layer.start_down is not None
        for part in ("down", "up")
    ]
    return dict(parts)
