"""The ops as Triton kernels, by the names and signatures of fluxq/kernels/reference.py.

What is not here yet is the reference's.
"""

from fluxq.kernels.reference import (
    dequantize,
    lora_linear,
    lora_linear_backward,
    matmul_8bit,
    nf4_quantize,
    room,
    row_dequantize,
    row_quantize,
    to_rows,
)
from fluxq.kernels.triton.gelu import gelu_tanh, gelu_tanh_backward
from fluxq.kernels.triton.modulate import (
    gated_add,
    gated_add_backward,
    gated_add_modulate,
    gated_add_modulate_backward,
    modulate,
    modulate_backward,
)
from fluxq.kernels.triton.qk_norm_rope import qk_norm_rope, qk_norm_rope_backward

__all__ = [
    "dequantize",
    "gated_add",
    "gated_add_backward",
    "gated_add_modulate",
    "gated_add_modulate_backward",
    "gelu_tanh",
    "gelu_tanh_backward",
    "lora_linear",
    "lora_linear_backward",
    "matmul_8bit",
    "modulate",
    "modulate_backward",
    "nf4_quantize",
    "qk_norm_rope",
    "qk_norm_rope_backward",
    "room",
    "row_dequantize",
    "row_quantize",
    "to_rows",
]
