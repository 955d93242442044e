"""Differentiable ops on tensors, and the formats in which frozen weights are stored."""

from fluxq.kernels.dispatch import backend, ops
from fluxq.kernels.formats import FORMATS, NF4Weight, RowScaled, Weight, dequantize, quantize
from fluxq.kernels.lora_linear import lora_linear
from fluxq.kernels.reference import unnest_absmax

__all__ = [
    "FORMATS",
    "NF4Weight",
    "RowScaled",
    "Weight",
    "backend",
    "dequantize",
    "lora_linear",
    "ops",
    "quantize",
    "unnest_absmax",
]
