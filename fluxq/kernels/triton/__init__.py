"""The ops as Triton kernels, with the names and signatures of fluxq/kernels/reference.py."""

from ..chunks import padding
from .convert import dequantize, row_dequantize, to_rows
from .dropout import drop
from .gelu import gelu_tanh, gelu_tanh_backward
from .linear import lora_gradients, lora_linear, lora_linear_backward
from .matmul_8bit import matmul_8bit
from .modulate import (
    gated_add,
    gated_add_backward,
    gated_add_modulate,
    gated_add_modulate_backward,
    modulate,
    modulate_backward,
)
from .nf4 import nf4_quantize
from .qk_norm_rope import qk_norm_rope, qk_norm_rope_backward
from .rotation import rotate
from .rows import row_quantize

__all__ = [
    "dequantize",
    "drop",
    "gated_add",
    "gated_add_backward",
    "gated_add_modulate",
    "gated_add_modulate_backward",
    "gelu_tanh",
    "gelu_tanh_backward",
    "lora_gradients",
    "lora_linear",
    "lora_linear_backward",
    "matmul_8bit",
    "modulate",
    "modulate_backward",
    "nf4_quantize",
    "qk_norm_rope",
    "qk_norm_rope_backward",
    "padding",
    "rotate",
    "row_dequantize",
    "row_quantize",
    "to_rows",
]
