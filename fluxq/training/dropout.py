"""Dropout of the LoRA: what each micro-step leaves out of it, drawn by address (seed, purpose, micro-step).

inputs: each number of a layer's input, as `lora_dropout` of PEFT. ranks: each component of a layer for each image, as
sd-scripts' `rank_dropout`. What remains of both is scaled up, so that its mean is that of the whole. modules: each
layer's LoRA, not scaled, as sd-scripts' `module_dropout`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from fluxq.config import LoraConfig
from fluxq.data import generator
from fluxq.kernels.dropout import Dropped
from fluxq.model.linear import Linear
from fluxq.model.modulation import sent


@dataclass(frozen=True)
class Dropout:
    """Of `layers`, path -> layer, all that have LoRA, in an order that stays."""

    layers: Mapping[str, Linear]
    config: LoraConfig
    seed: int

    def drawn(self, index: int, examples: int) -> Mapping[Linear, Dropped] | None:
        """What each layer leaves out in micro-step `index`; None if dropout is off."""
        lora, count = self.config, len(self.layers)
        if not (lora.dropout or lora.rank_dropout or lora.module_dropout):
            return None
        downs = [layer.get_parameter("lora_down") for layer in self.layers.values()]
        ranks, device = [len(down) for down in downs], downs[0].device
        keeps = self._uniform("module dropout", index).random(count) >= lora.module_dropout
        factors = self._uniform("rank dropout", index).random((examples, sum(ranks))) >= lora.rank_dropout
        factors = (factors & keeps.repeat(ranks)) / ((1 - lora.rank_dropout) * (1 - lora.dropout))
        keys = self._uniform("input dropout", index).integers(2**63, size=(count, 2))  # 16 bytes apart, as kernels read
        each = sent(torch.from_numpy(factors.astype(np.float32)), device).split(ranks, 1)
        parts = zip(self.layers.values(), each, sent(torch.from_numpy(keys), device)[:, :1], strict=True)
        return {layer: Dropped(own, lora.dropout, key) for layer, own, key in parts}

    def _uniform(self, purpose: str, index: int) -> np.random.Generator:
        return generator(self.seed, purpose, index)
