"""T5's encoder and CLIP's text model, run block by block: each block is a unit, and only a few are in memory at once.

All captions pass through a block, in batches, before the next block is read. T5 is version 1.1 (Raffel et al. 2020;
Shazeer 2020): gated GELU, no biases, attention without a scale but with a learned bias per distance. CLIP is OpenAI's
(Radford et al. 2021). T5 attends to padding, as in FLUX.1's training, unless it is given the lengths of the captions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

TOKENS_PER_BATCH = 2048  # a T5-XXL block's widest activation is then 42 MB in bf16
T5_FAR = 128  # tokens: all distances from here on share one bucket
T5_BLOCK = (
    "layer.0.layer_norm",
    *(f"layer.0.SelfAttention.{part}" for part in "qkvo"),
    "layer.1.layer_norm",
    *(f"layer.1.DenseReluDense.{part}" for part in ("wi_0", "wi_1", "wo")),
)
CLIP_EPS = 1e-5
CLIP_BLOCK = (
    "layer_norm1",
    *(f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")),
    "layer_norm2",
    "mlp.fc1",
    "mlp.fc2",
)

Layers = Mapping[str, tuple[Tensor, ...]]
"""Layer of a block -> its weight, and its bias if it has one."""

Units = Mapping[str, Mapping[str, tuple[str, ...]]]
"""Unit -> layer -> names of its tensors; units in the order in which they run."""

BlockProgress = Callable[[int, int], None]
"""Called after each block with (blocks done, blocks in total)."""


class Weights(Protocol):
    """The tensors of a model by name, read on demand: on the device, in the dtype to compute in."""

    def resident(self, unit: str) -> AbstractContextManager[None]:
        """Inside, this unit's tensors can be read and used."""
        ...

    def read(self, name: str) -> Tensor: ...

    def rows(self, name: str, indices: Tensor) -> Tensor:
        """The rows of a matrix at `indices` (n,). Raises WrongRequest if one is beyond its end."""
        ...


def t5_units(layers: int) -> Units:
    blocks = (f"encoder.block.{i}" for i in range(layers))
    return {block: {layer: (f"{block}.{layer}.weight",) for layer in T5_BLOCK} for block in blocks}


@dataclass(frozen=True)
class T5Encoder:
    weights: Weights
    layers: int
    heads: int

    def __call__(
        self,
        ids: Tensor,
        progress: BlockProgress = lambda done, total: None,
        lengths: Sequence[int] | None = None,
    ) -> Tensor:
        """States (B, L, D) of token ids (B, L).

        lengths: each caption's tokens, which attend to each other alone; the states after them mean nothing.
        """
        x = _embed(self.weights, "shared.weight", ids)
        first = "encoder.block.0.layer.0.SelfAttention"
        table = self.weights.read(f"{first}.relative_attention_bias.weight")  # (buckets, H)
        bias = table[t5_buckets(ids.shape[1], len(table)).to(table.device)].permute(2, 0, 1)
        bias = bias[None].contiguous()  # (1, H, L, L)

        def block(x: Tensor, layers: Layers, rows: slice) -> Tensor:
            return t5_block(x, layers, self.heads, bias, lengths and lengths[rows])

        for done, (unit, names) in enumerate(t5_units(self.layers).items(), start=1):
            with self.weights.resident(unit):
                _run_block(block, x, self.weights, names)
            progress(done, self.layers)
        norm = self.weights.read("encoder.final_layer_norm.weight")
        for part in _batches(x):
            part.copy_(_rms_norm(part, norm))
        return x


def t5_block(x: Tensor, layers: Layers, heads: int, bias: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
    """x (B, L, D) after one block. layers: those of T5_BLOCK; bias (1, H, L, L) is added to the scores; lengths: see
    T5Encoder.
    """
    norm1, *attention, norm2, gate, up, down = (layers[name] for name in T5_BLOCK)
    x = x + t5_attention(_rms_norm(x, *norm1), attention, heads, bias, lengths)
    h = _rms_norm(x, *norm2)
    return x + F.linear(F.gelu(F.linear(h, *gate), approximate="tanh").mul_(F.linear(h, *up)), *down)


def t5_attention(
    h: Tensor, layers: Sequence[tuple[Tensor, ...]], heads: int, bias: Tensor, lengths: Sequence[int] | None = None
) -> Tensor:
    *inputs, to_out = layers
    q, k, v = (_heads(F.linear(h, *layer), heads) for layer in inputs)
    if lengths is None:
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)  # (B, H, L, D/H)
    else:
        attended = torch.zeros_like(q)
        for i, n in enumerate(lengths):
            own = (x[i : i + 1, :, :n] for x in (q, k, v))
            attended[i, :, :n] = F.scaled_dot_product_attention(*own, attn_mask=bias[..., :n, :n], scale=1.0)[0]
    return F.linear(attended.transpose(1, 2).flatten(2), *to_out)


def t5_buckets(length: int, buckets: int = 32) -> Tensor:
    """The bucket (L, L) of the distance from each query to each key; half of `buckets` are for keys after the query.

    In each half, the first half holds one distance each; the rest grow logarithmically up to T5_FAR. Computed on the
    CPU: a GPU's logarithm could round differently and move a border.
    """
    distance = torch.arange(length)[None] - torch.arange(length)[:, None]
    half, single = buckets // 2, buckets // 4
    far = torch.log(distance.abs().clamp(min=1).float() / single) / math.log(T5_FAR / single) * (half - single)
    bucket = torch.where(distance.abs() < single, distance.abs(), (single + far.long()).clamp(max=half - 1))
    return bucket + half * (distance > 0)


def clip_units(layers: int) -> Units:
    blocks = (f"encoder.layers.{i}" for i in range(layers))
    return {block: {layer: _affine(f"{block}.{layer}") for layer in CLIP_BLOCK} for block in blocks}


@dataclass(frozen=True)
class ClipEncoder:
    weights: Weights
    layers: int
    heads: int

    def __call__(self, ids: Tensor, ends: Tensor) -> Tensor:
        """Pooled vectors (B, D) of token ids (B, L): the final states at the end tokens, at `ends` (B,)."""
        positions = self.weights.read("embeddings.position_embedding.weight")
        x = _embed(self.weights, "embeddings.token_embedding.weight", ids) + positions[: ids.shape[1]]

        def block(x: Tensor, layers: Layers, rows: slice) -> Tensor:
            apply = {name: partial(_layer_norm if "norm" in name else _linear, own=own) for name, own in layers.items()}
            return clip_block(x, apply, self.heads)

        for unit, names in clip_units(self.layers).items():
            with self.weights.resident(unit):
                _run_block(block, x, self.weights, names)
        x = x[torch.arange(len(x), device=x.device), ends.to(x.device)]
        return _layer_norm(x, tuple(map(self.weights.read, _affine("final_layer_norm"))))


def clip_block(x: Tensor, layers: Mapping[str, Callable[[Tensor], Tensor]], heads: int) -> Tensor:
    """x (B, L, D) after one block. layers: those of CLIP_BLOCK, as functions of their input."""
    norm1, to_q, to_k, to_v, to_out, norm2, fc1, fc2 = (layers[name] for name in CLIP_BLOCK)
    h = norm1(x)
    q, k, v = (_heads(layer(h), heads) for layer in (to_q, to_k, to_v))
    attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    x = x + to_out(attended.transpose(1, 2).flatten(2))
    h = fc1(norm2(x))
    return x + fc2(h * torch.sigmoid(1.702 * h))


def _embed(weights: Weights, name: str, ids: Tensor) -> Tensor:
    """Embeddings (B, L, D) of token ids (B, L); reads only the rows of the table that occur."""
    unique, places = ids.unique(return_inverse=True)
    table = weights.rows(name, unique)
    return table[places.to(table.device)]


def _run_block(
    block: Callable[[Tensor, Layers, slice], Tensor], x: Tensor, weights: Weights, names: Mapping[str, tuple[str, ...]]
) -> None:
    """Apply `block` to x (B, L, D) in place, to some of its rows at a time. Its weights, `names` by layer, are freed on
    return.
    """
    layers, start = {layer: tuple(map(weights.read, own)) for layer, own in names.items()}, 0
    for part in _batches(x):
        part.copy_(block(part, layers, slice(start, start + len(part))))
        start += len(part)


def _affine(layer: str) -> tuple[str, str]:
    return f"{layer}.weight", f"{layer}.bias"


def _batches(x: Tensor) -> tuple[Tensor, ...]:
    """Views of x (B, L, D) of about TOKENS_PER_BATCH tokens each."""
    return x.split(max(1, TOKENS_PER_BATCH // x.shape[1]))


def _heads(x: Tensor, heads: int) -> Tensor:
    """(B, L, D) -> (B, H, L, D/H)"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps=1e-6)


def _layer_norm(x: Tensor, own: tuple[Tensor, ...]) -> Tensor:
    return F.layer_norm(x, own[0].shape, *own, eps=CLIP_EPS)


def _linear(x: Tensor, own: tuple[Tensor, ...]) -> Tensor:
    return F.linear(x, *own)
