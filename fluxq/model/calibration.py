"""Chooses the int8 layers that rotate their input: those whose inputs have outliers, measured on a few examples."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from fluxq.kernels import Activations, ops
from fluxq.kernels.rotation import rotate, rotation_block

from .flux import Flux
from .linear import Linear

ROWS = 256


def calibrate(flux: Flux, forward: Callable[[], Any]) -> list[str]:
    """Measure the int8 layers during forward(), which runs `flux`; rotate those where that at least halves the error.

    Returns their paths. A smaller gain is not worth it: a rotation costs a pass over the input and the decoded weight.
    """
    computes = {m: m.compute for m in flux.modules() if isinstance(m, Linear) and m.compute.startswith("int8")}
    paths = {
        m: path
        for path, m in flux.named_modules()
        if isinstance(m, Linear) and m in computes and rotation_block(m.in_features)
    }
    errors = {m: torch.zeros(2) for m in paths}

    def observe(layer: Any, arguments: tuple[Any, ...]) -> None:
        x = arguments[0].x if isinstance(arguments[0], Activations) else arguments[0]
        errors[layer] += rounding_errors(x.flatten(0, -2), rotation_block(layer.in_features)).cpu()

    hooks = [layer.register_forward_pre_hook(observe) for layer in paths]
    try:
        for layer in computes:
            layer.compute, layer.rotation = "bf16", 0
        with torch.no_grad():
            forward()
    finally:
        for hook in hooks:
            hook.remove()
        for layer, compute in computes.items():
            layer.compute = compute
    rotated = [paths[layer] for layer, (plain, rotating) in errors.items() if rotating < plain / 2]
    set_rotations(flux, rotated)
    return rotated


def set_rotations(flux: Flux, paths: Collection[str]) -> None:
    """Make the layers at these paths rotate their input, and no others."""
    for path, layer in flux.named_modules():
        if isinstance(layer, Linear):
            layer.rotation = rotation_block(layer.in_features) if path in paths else 0


def rounding_errors(rows: Tensor, block: int) -> Tensor:
    """(2,) relative int8 errors |x - int8(x)| / |x|, plain and rotated, of up to 256 rows spread over `rows` (M, K)."""
    rows = rows[:: max(1, len(rows) // ROWS)].float()
    return torch.stack([_error(rows), _error(rotate(rows, block))])


def _error(rows: Tensor) -> Tensor:
    rounded = ops(rows).row_dequantize(*ops(rows).row_quantize(rows, torch.int8), torch.float32)
    return (rounded - rows).norm() / rows.norm().clamp(min=1e-30)
