"""`fluxq lora extract`: the LoRA of a given rank that best turns one transformer into another.

The difference of each matrix of the blocks is reduced to the rank by a randomized singular value decomposition (Halko,
Martinsson and Tropp 2011, algorithms 4.4 and 5.1) with a fixed seed. One matrix is in memory at a time.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fluxq.console import byte_bar, console, plural
from fluxq.errors import WrongRequest
from fluxq.formats.checkpoint.files import refuse
from fluxq.formats.checkpoint.sizes import variant
from fluxq.formats.checkpoint.source import Source, open_flux
from fluxq.formats.lora.algebra import Adapter
from fluxq.formats.lora.read import Lora
from fluxq.model.config import FluxConfig

from .files import PRECISIONS, refuse_target, write

OVERSAMPLING = 16  # random columns beyond the rank
POWERS = 3  # multiplications by the matrix and its transpose, which separate close singular values


def extract_command(
    base: Path, tuned: Path, out: Path, rank: int, to: str, precision: str, overwrite: bool
) -> dict[str, Any]:
    """Write to `out` the LoRA of `rank` that is nearest to the difference `tuned` - `base`.

    Both models may have any layout and precision. Raises WrongRequest if their sizes differ, or if they are equal.
    """
    refuse_target(out, overwrite, to)
    first, second = open_flux(base), open_flux(tuned)
    if any(first.shapes[name] != second.shapes.get(name) for name in first.shapes):
        raise WrongRequest(f"{base} and {tuned} are models of different sizes; give a model and a finetune of it")
    adapters, lost, whole = extracted(first, second, rank)
    if not adapters:
        raise WrongRequest(f"{base} and {tuned} have the same weights in all blocks; there is nothing to extract")
    made = Lora(tuned, first.config, "extracted", adapters, {}, _metadata(base, tuned, first.config))
    error = math.sqrt(lost / whole)
    answer = write(out, made, to, PRECISIONS[precision])
    console.print(f"rank {rank} misses {error:.2%} of the difference")
    return {**answer, "modules": len(adapters), "difference_lost": error}


def extracted(
    first: Source[FluxConfig], second: Source[FluxConfig], rank: int
) -> tuple[dict[str, Adapter], float, float]:
    """(module -> adapter for every matrix that differs, squared norm of what they miss, that of the difference)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    adapters: dict[str, Adapter] = {}
    lost = whole = 0.0
    left_out, done = [], 0
    with byte_bar("extracting") as progress:
        for name, shape in first.shapes.items():
            is_block = len(shape) == 2 and "_blocks." in name
            difference = second.value(name, torch.float32, device).sub_(first.value(name, torch.float32, device))
            done += second.sizes[name]
            progress(done, second.nbytes)
            if not torch.linalg.vector_norm(difference).isfinite():
                for model in (first, second):
                    if not model.value(name, torch.float32).isfinite().all():
                        refuse(model.path, f"has NaN or infinite numbers in {name}", "use another file")
                raise WrongRequest(f"{name} of {first.path} and {second.path} are too far apart; give related models")
            if not difference.any():
                continue
            if not is_block:
                left_out.append(name)
                continue
            adapter = nearest(difference, rank)
            whole += float(difference.square().sum(dtype=torch.float64))
            lost += float(difference.sub_(adapter.change()).square().sum(dtype=torch.float64))
            adapters[name.removesuffix(".weight")] = Adapter(adapter.down.cpu(), adapter.up.cpu(), adapter.alpha)
    if left_out:
        more = ", ..." if len(left_out) > 3 else ""
        console.print(
            f"left out, because a LoRA of the blocks cannot change it: {plural(len(left_out), 'tensor')} "
            f"({', '.join(left_out[:3])}{more})"
        )
    return adapters, lost, whole


def nearest(matrix: Tensor, rank: int) -> Adapter:
    """The adapter nearest to `matrix` (out, in), of `rank` or of the matrix's own rank if that is lower."""
    out, inputs = matrix.shape
    generator = torch.Generator().manual_seed(0)
    count = min(rank + OVERSAMPLING, out, inputs)
    sketch = torch.randn(inputs, count, generator=generator).to(matrix.device)
    basis = torch.linalg.qr(matrix @ sketch)[0]
    for _ in range(POWERS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis)[0])[0]
    left, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    root = values[:rank].sqrt()
    return Adapter(right[:rank] * root[:, None], (basis @ left[:, :rank]) * root, float(len(root)))


def _metadata(base: Path, tuned: Path, config: FluxConfig) -> dict[str, str]:
    return {
        "modelspec.architecture": f"flux-1-{variant(config)}/lora",
        "modelspec.title": tuned.stem,
        "ss_sd_model_name": base.name,
    }
