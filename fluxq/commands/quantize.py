"""`fluxq quantize`: convert a model file to fluxq's own quantized file, one tensor at a time.

`fluxq train` does the same by itself, once, into a cache folder.
"""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import torch

from fluxq.console import byte_bar, console
from fluxq.errors import WrongRequest
from fluxq.formats.checkpoint.source import open_flux
from fluxq.formats.quantized import fingerprint, stored_bytes, write_quantized
from fluxq.kernels import Weight, dequantize


def quantize_command(
    source: Path, target: Path, format: str, report: bool = False, overwrite: bool = False
) -> dict[str, Any]:
    """Write the transformer in `source` to `target` as `format`. report: also measure the error of each matrix.

    Raises WrongRequest for a source that is not a FLUX.1 transformer or has numbers that are not finite, a target that
    exists or is not named .safetensors, and a disk that is too full.
    """
    if target.exists() and not overwrite:
        raise WrongRequest(f"{target} exists; choose another name, or replace it with --overwrite")
    if target.suffix != ".safetensors":
        raise WrongRequest(f"{target} must be named .safetensors, like {target.stem}.safetensors")
    original, errors = open_flux(source), Errors()
    if target.is_dir() or any(target.exists() and target.samefile(path) for path in original.files):
        raise WrongRequest(f"{target} is a folder or the source itself; name a new file")
    about = {"files": [path.name for path in original.files], "fingerprint": fingerprint(original.files)}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    console.print(f"{target} will take {stored_bytes(original.shapes, format) / 1e9:.3g} GB")
    began = time.perf_counter()
    with byte_bar("quantizing") as progress:
        inspect = errors.add if report else lambda name, w, q: None
        write_quantized(target, original, format, about, device, progress, inspect)
    seconds, size = time.perf_counter() - began, target.stat().st_size
    if report:
        console.print("relative error of each type of layer:")
    for layer, error in errors.relative().items():
        console.print(f"{layer:40} {error:7.3%}")
    console.print(
        f"{target}: {size / 1e9:.3g} GB in {format}, from {original.nbytes / 1e9:.3g} GB at "
        f"{original.nbytes / 1e9 / seconds:.2f} GB/s"
    )
    answer = {"file": str(target), "format": format, "bytes": size, "source_bytes": original.nbytes, "seconds": seconds}
    return {**answer, "relative_errors": errors.relative()}


class Errors:
    """The relative Frobenius error of each type of layer, over all blocks."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = {}

    def add(self, name: str, w: Weight, q: Weight) -> None:
        kind = re.sub(r"\.\d+\.", ".*.", name.removesuffix(".weight"), count=1)
        sums = self._sums.setdefault(kind, [0.0, 0.0])
        exact = dequantize(w, torch.float32)
        sums[0] += float((dequantize(q, torch.float32) - exact).square().sum())
        sums[1] += float(exact.square().sum())

    def relative(self) -> dict[str, float]:
        """Layer type -> |stored - original| / |original|."""
        return {kind: (error / norm) ** 0.5 if norm else 0.0 for kind, (error, norm) in self._sums.items()}
