"""LoRA on a transformer: which layers get it, and how it is added, listed and taken out (Hu et al. 2021)."""

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
"""Presets of `targets`. A single block computes attention and MLP in the same two layers, so both presets train
those.
"""


def add_lora(
    model: nn.Module,
    rank: int,
    alpha: float,
    targets: str | Sequence[str] = "attention+mlp",
    generator: torch.Generator | None = None,
) -> dict[str, Linear]:
    """Add LoRA of `rank`, scaled by alpha / rank, to every linear layer whose path `targets` matches; path -> layer.

    `targets` is a preset of TARGETS or regular expressions, each matched against the whole path. Raises WrongRequest
    where an expression is malformed or matches no layer.
    """
    if rank < 1:
        raise WrongRequest(f"rank must be at least 1, not {rank}")
    layers = {path: module for path, module in model.named_modules() if isinstance(module, Linear)}
    chosen = {path: layers[path] for path in targeted(layers, targets)}
    for layer in chosen.values():
        layer.add_lora(rank, alpha, generator)
    return chosen


def targeted(paths: Iterable[str], targets: str | Sequence[str]) -> list[str]:
    """Those of `paths`, in their order, that `targets` match, as in `add_lora`."""
    if not targets:
        raise WrongRequest(f"no targets were given for the LoRA; presets are {', '.join(TARGETS)}")
    paths, chosen = list(paths), set()
    for expression in (TARGETS.get(t, t) for t in ([targets] if isinstance(targets, str) else targets)):
        try:
            matched = {path for path in paths if re.fullmatch(expression, path)}
        except re.error as error:
            raise WrongRequest(f"the target {expression!r} is no regular expression: {error}") from error
        if not matched:
            raise WrongRequest(
                f"the target {expression!r} matches no layer; presets are {', '.join(TARGETS)}, a path is {paths[0]}"
            )
        chosen |= matched
    return [path for path in paths if path in chosen]


def lora_layers(model: nn.Module) -> dict[str, Linear]:
    """path -> layer for every layer that has LoRA."""
    return {p: m for p, m in model.named_modules() if isinstance(m, Linear) and m.lora_down is not None}


def set_lora(model: nn.Module, adapters: Mapping[str, tuple[Tensor, Tensor, float]]) -> None:
    """Give the layers at these paths this LoRA, (down (R, K), up (N, R), scale), and every other layer none."""
    for path, layer in ((p, m) for p, m in model.named_modules() if isinstance(m, Linear)):
        down, up, scale = adapters.get(path, (None, None, 1.0))
        layer.set_lora(down, up, scale)


@contextmanager
def lora_strength(model: nn.Module, strength: float) -> Iterator[None]:
    """Inside, every LoRA of `model` acts `strength` times as strongly; 0 is the model without it."""
    layers = lora_layers(model).values()
    before = [layer.lora_scale for layer in layers]
    for layer in layers:
        layer.lora_scale *= strength
    try:
        yield
    finally:
        for layer, scale in zip(layers, before, strict=True):
            layer.lora_scale = scale
