"""Differentiable ops on tensors, and the formats in which frozen weights are stored."""

from .activations import Activations, Wants
from .attention import attention
from .dispatch import backend, ops
from .formats import dequantize, quantize
from .lora_linear import COMPUTES, lora_linear, wants
from .reference import unnest_absmax
from .replay import POLICIES, Tape
from .rounding import rows_of
from .steps import gated_add, gated_add_modulate, gelu_tanh, modulate, qk_norm_rope
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
    "gated_add",
    "gated_add_modulate",
    "gelu_tanh",
    "lora_linear",
    "modulate",
    "ops",
    "qk_norm_rope",
    "quantize",
    "rows_of",
    "unnest_absmax",
    "wants",
]
