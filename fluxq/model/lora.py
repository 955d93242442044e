"""LoRA on a model (Hu et al. 2021): choose layers, add it, list it, replace it, scale it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fluxq.errors import WrongRequest

from .linear import Linear

TARGETS = {
    "attention": r"(double_blocks\.\d+\.(img|txt)_attn\.(qkv|proj)|single_blocks\.\d+\.linear[12])",
    "attention+mlp": r"(double_blocks\.\d+\.(img|txt)_(attn\.(qkv|proj)|mlp\.[02])|single_blocks\.\d+\.linear[12])",
    "all": r"((double|single)_blocks\..*|(img|txt)_in|(time|vector|guidance)_in\.(in|out)_layer)",
}
"""Presets of `targets`. Both of the first two train a single block's two layers, which compute attention and MLP."""


def add_lora(
    model: nn.Module,
    rank: int,
    alpha: float,
    targets: str | Sequence[str] = "attention+mlp",
    generator: torch.Generator | None = None,
) -> dict[str, Linear]:
    """Add LoRA of `rank`, scaled by alpha / rank, to every linear layer whose path `targets` match; path -> layer.

    targets: a preset of TARGETS, or regular expressions, each matched against the whole path. Raises WrongRequest if
    rank < 1, or if an expression is malformed or matches no layer.
    """
    if rank < 1:
        raise WrongRequest(f"rank must be at least 1, not {rank}")
    layers = {path: module for path, module in model.named_modules() if isinstance(module, Linear)}
    chosen = {path: layers[path] for path in targeted(layers, targets)}
    for layer in chosen.values():
        layer.add_lora(rank, alpha, generator)
    return chosen


def targeted(paths: Iterable[str], targets: str | Sequence[str]) -> list[str]:
    """The `paths` that `targets` match, in their order; targets and errors as in `add_lora`."""
    if not targets:
        raise WrongRequest(f"no targets were given for the LoRA; presets: {', '.join(TARGETS)}")
    paths, chosen = list(paths), set()
    for expression in (TARGETS.get(t, t) for t in ([targets] if isinstance(targets, str) else targets)):
        try:
            matched = {path for path in paths if re.fullmatch(expression, path)}
        except re.error as error:
            raise WrongRequest(f"the target {expression!r} is not a regular expression: {error}") from error
        if not matched:
            raise WrongRequest(
                f"the target {expression!r} matches no layer; presets: {', '.join(TARGETS)}, a path is {paths[0]}"
            )
        chosen |= matched
    return [path for path in paths if path in chosen]


def lora_layers(model: nn.Module) -> dict[str, Linear]:
    """path -> layer for every layer that has LoRA."""
    return {p: m for p, m in model.named_modules() if isinstance(m, Linear) and m.lora_down is not None}


def set_lora(model: nn.Module, adapters: Mapping[str, tuple[Tensor, Tensor, float]]) -> None:
    """Set the LoRA of every linear layer: path -> (down (R, K), up (N, R), scale). Layers without an entry get none."""
    for path, layer in ((p, m) for p, m in model.named_modules() if isinstance(m, Linear)):
        down, up, scale = adapters.get(path, (None, None, 1.0))
        layer.set_lora(down, up, scale)


@contextmanager
def lora_strength(model: nn.Module, strength: float) -> Iterator[None]:
    """Inside, every LoRA of `model` is multiplied by `strength`; 0 switches it off."""
    layers = lora_layers(model).values()
    before = [layer.lora_scale for layer in layers]
    for layer in layers:
        layer.lora_scale *= strength
    try:
        yield
    finally:
        for layer, scale in zip(layers, before, strict=True):
            layer.lora_scale = scale
