"""LoRA on a model (Hu et al. 2021): choose layers and their ranks, add it, list it, replace it, scale it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fluxq.errors import WrongRequest
from fluxq.settings import block_numbers

from .linear import Linear

TARGETS = {
    "attention": r"(double_blocks\.\d+\.(img|txt)_attn\.(qkv|proj)|single_blocks\.\d+\.linear[12])",
    "attention+mlp": r"(double_blocks\.\d+\.(img|txt)_(attn\.(qkv|proj)|mlp\.[02])|single_blocks\.\d+\.linear[12])",
    "all": r"((double|single)_blocks\..*|(img|txt)_in|(time|vector|guidance)_in\.(in|out)_layer)",
    "mlp": r"double_blocks\.\d+\.(img|txt)_mlp\.[02]",
    "modulation": r"(double|single)_blocks\.\d+\..*mod.*\.lin",
    "double": r"double_blocks\..*",
    "single": r"single_blocks\..*",
}
"""Presets of `targets`. Both of the first two train a single block's two layers, which compute attention and MLP."""


class Size(NamedTuple):
    """Of one layer's LoRA, which is scaled by alpha / rank."""

    rank: int
    alpha: float


@dataclass(frozen=True)
class Adapted:
    """Which layers get a LoRA, of which rank and scale.

    ranks, alphas: "LAYERS=NUMBER", where LAYERS is a preset or a regular expression as in `targets`; the last that
    matches a layer counts; rank 0 leaves it out. Without an alpha of its own, a layer of another rank keeps alpha /
    rank. double_blocks, single_blocks: numbers of blocks like "0-3,5", or "none"; None: all. rank_stabilized: scale by
    alpha / sqrt(rank) (Kalajdzievski 2023); then each layer has the same alpha.
    """

    rank: int
    alpha: float
    targets: str | Sequence[str] = "attention+mlp"
    ranks: Sequence[str] = ()
    alphas: Sequence[str] = ()
    double_blocks: str | None = None
    single_blocks: str | None = None
    rank_stabilized: bool = False

    def layers(self, paths: Iterable[str]) -> dict[str, Size]:
        """path -> size. alpha is such that alpha / rank is the layer's scale, also if it is rank-stabilized.

        Raises WrongRequest for malformed expressions, for any that match no layer, and if no layer is left.
        """
        paths = list(paths)
        chosen = self._in_blocks(targeted(paths, self.targets))
        ranks, alphas = dict.fromkeys(chosen, self.rank), dict[str, float]()
        for layers, rank in map(_assigned, self.ranks):
            ranks |= dict.fromkeys(_among(chosen, paths, layers, "lora.ranks"), int(rank))
        for layers, alpha in map(_assigned, self.alphas):
            alphas |= dict.fromkeys(_among(chosen, paths, layers, "lora.alphas"), alpha)
        sizes = {path: self.size(rank, alphas.get(path)) for path, rank in ranks.items() if rank}
        if not sizes:
            raise WrongRequest("no layer is left to train: lora.ranks gives each of them rank 0")
        return sizes

    def size(self, rank: int, alpha: float | None = None) -> Size:
        if alpha is None:
            alpha = self.alpha if rank == self.rank or self.rank_stabilized else self.alpha * rank / self.rank
        return Size(rank, alpha * rank**0.5 if self.rank_stabilized else alpha)

    def _in_blocks(self, paths: Sequence[str]) -> list[str]:
        left = [*paths]
        for kind, wanted in (("double", self.double_blocks), ("single", self.single_blocks)):
            if wanted is not None:
                of_kind = {path: int(path.split(".")[1]) for path in paths if path.startswith(f"{kind}_blocks.")}
                chosen = block_numbers(wanted)
                if beyond := sorted(chosen - set(of_kind.values())):
                    raise WrongRequest(
                        f"lora.{kind}_blocks: no layer of {kind} block {beyond[0]} is a target; the blocks that have "
                        f"some are {min(of_kind.values(), default=0)} to {max(of_kind.values(), default=0)}"
                    )
                left = [path for path in left if path not in of_kind or of_kind[path] in chosen]
        if not left:
            raise WrongRequest("no layer is left to train: lora.double_blocks and single_blocks leave all of them out")
        return left


def _assigned(text: str) -> tuple[str, float]:
    """(layers, number) of "LAYERS=NUMBER"."""
    layers, _, number = text.rpartition("=")
    return layers, float(number)


def _among(chosen: Sequence[str], paths: Sequence[str], layers: str, key: str) -> list[str]:
    """Those of `chosen` that `layers`, of the setting `key`, match; some of all `paths` are not chosen."""
    matched = set(targeted(paths, layers, f"{key}:"))
    if not (found := [path for path in chosen if path in matched]):
        raise WrongRequest(f"{key}: {layers} is not among lora.targets, or not in the blocks that are chosen")
    return found


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
    return add_adapted(model, Adapted(rank, alpha, targets), generator)


def add_adapted(model: nn.Module, adapted: Adapted, generator: torch.Generator | None = None) -> dict[str, Linear]:
    """Add LoRA to the linear layers that `adapted` chooses, each of its own rank and scale; path -> layer."""
    layers = {path: module for path, module in model.named_modules() if isinstance(module, Linear)}
    sizes = adapted.layers(layers)
    for path, size in sizes.items():
        layers[path].add_lora(*size, generator)
    return {path: layers[path] for path in sizes}


def targeted(paths: Iterable[str], targets: str | Sequence[str], what: str = "the target") -> list[str]:
    """The `paths` that `targets` match, in their order; as in `add_lora`, but `what` is how an error begins."""
    if not targets:
        raise WrongRequest(f"no targets were given for the LoRA; presets: {', '.join(TARGETS)}")
    paths, chosen = list(paths), set()
    for name in [targets] if isinstance(targets, str) else targets:
        expression = TARGETS.get(name, name)
        try:
            matched = {path for path in paths if re.fullmatch(expression, path)}
        except re.error as error:
            raise WrongRequest(f"{what} {name!r} is not a regular expression: {error}") from error
        if not matched:
            raise WrongRequest(f"{what} {name!r} matches no layer; presets: {', '.join(TARGETS)}, a path is {paths[0]}")
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
