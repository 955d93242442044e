"""Differentiable ops on tensors, and the formats in which frozen weights are stored."""

from .activations import Activations, Wants
from .attention import attention
from .block_ops import fork_modulate, gated_add, gated_add_modulate, gelu_tanh, modulate, qk_norm_rope
from .dispatch import backend, ops
from .formats import dequantize, quantize
from .lora_linear import COMPUTES, lora_linear, lora_linear_parts, wants
from .reference import unnest_absmax
from .replay import POLICIES, Tape
from .weights import FORMATS, NF4Weight, RowScaled, Weight

__all__ = [
    "COMPUTES",
    "FORMATS",
    "POLICIES",
    "Activations",
    "NF4Weight",
    "RowScaled",
    "Tape",
    "Wants",
    "Weight",
    "attention",
    "backend",
    "dequantize",
    "fork_modulate",
    "gated_add",
    "gated_add_modulate",
    "gelu_tanh",
    "lora_linear",
    "lora_linear_parts",
    "modulate",
    "ops",
    "qk_norm_rope",
    "quantize",
    "unnest_absmax",
    "wants",
]
