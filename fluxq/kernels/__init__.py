"""Differentiable ops on tensors, and the formats in which frozen weights are stored."""

from fluxq.kernels.activations import Activations, Wants
from fluxq.kernels.attention import attention
from fluxq.kernels.dispatch import backend, ops
from fluxq.kernels.formats import dequantize, quantize
from fluxq.kernels.lora_linear import COMPUTES, lora_linear, wants
from fluxq.kernels.reference import unnest_absmax
from fluxq.kernels.replay import POLICIES, Tape
from fluxq.kernels.steps import gated_add, gated_add_modulate, gelu_tanh, modulate, qk_norm_rope
from fluxq.kernels.weights import FORMATS, NF4Weight, RowScaled, Weight

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
    "unnest_absmax",
    "wants",
]
