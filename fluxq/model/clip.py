"""CLIP-L's text model for training: frozen weights on the transformer's device, LoRA on its linear layers.

The math is that of text_layers.py, which encodes captions once and streams the blocks. Here the LoRA changes every
step, so the blocks stay loaded, each step encodes its captions again, and the gradient comes back through the pooled
vector, FLUX.1's `y`. Names are those of transformers 5.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .linear import Linear
from .text_layers import CLIP_BLOCK, CLIP_EPS, clip_block

CLIP_TARGETS = r"encoder\..*"
"""All linear layers, as in sd-scripts: in each block, four of the attention and two of the MLP."""

Tokens = Callable[[Sequence[str]], tuple[Tensor, Tensor, list[bool]]]
"""Captions -> token ids (B, L), the index of each end token (B,), and whether each caption was cut."""


class Table(nn.Module):
    """A frozen embedding of N rows (N, D)."""

    weight: Tensor

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.empty(rows, width))

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


class LayerNorm(nn.Module):
    """Layer norm over the last axis, frozen."""

    weight: Tensor
    bias: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.empty(width))
        self.register_buffer("bias", torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, eps=CLIP_EPS)


class ClipBlock(nn.Module):
    def __init__(self, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.layer_norm1, self.layer_norm2 = LayerNorm(width), LayerNorm(width)
        self.self_attn = nn.ModuleDict({f"{part}_proj": Linear(width, width) for part in ("q", "k", "v", "out")})
        self.mlp = nn.ModuleDict({"fc1": Linear(width, hidden), "fc2": Linear(hidden, width)})

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, D) after one block."""
        return clip_block(x, {name: self.get_submodule(name) for name in CLIP_BLOCK}, self.heads)


class Clip(nn.Module):
    """The text model of `config` (fluxq/formats/checkpoint/detect.py). A new one's buffers are uninitialized."""

    def __init__(self, config: Mapping[str, int], tokens: Tokens) -> None:
        super().__init__()
        self._tokens, width = tokens, config["hidden_size"]
        sizes = width, config["intermediate_size"], config["num_attention_heads"]
        rows = {"token": config["vocab_size"], "position": config["max_position_embeddings"]}
        blocks = (ClipBlock(*sizes) for _ in range(config["num_hidden_layers"]))
        self.embeddings = nn.ModuleDict({f"{name}_embedding": Table(count, width) for name, count in rows.items()})
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(blocks)})
        self.final_layer_norm = LayerNorm(width)

    def pooled(self, captions: Sequence[str]) -> Tensor:
        """Pooled vectors (B, D) fp32 of captions."""
        ids, ends, _ = self._tokens(captions)
        device = self.final_layer_norm.weight.device
        return self(ids.to(device), ends.to(device)).float()

    def forward(self, ids: Tensor, ends: Tensor) -> Tensor:
        """The final states (B, D) of token ids (B, L) at the indices `ends` (B,)."""
        x = self.embeddings["token_embedding"](ids)
        x = x + self.embeddings["position_embedding"](torch.arange(ids.shape[1], device=ids.device))
        for block in cast(nn.ModuleList, self.encoder["layers"]):
            x = block(x)
        return self.final_layer_norm(x[torch.arange(len(x), device=x.device), ends])
