"""`fluxq lora resize`: write a LoRA file at a lower rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fluxq.console import console
from fluxq.errors import WrongRequest
from fluxq.formats.lora.read import described

from .files import dtype_of, read, reduced, refuse_target, write


def resize_command(
    source: Path,
    target: Path,
    rank: int | None,
    energy: float | None,
    to: str,
    precision: str | None,
    overwrite: bool,
) -> dict[str, Any]:
    """Write `source` with each module at `rank`, or at the lowest rank that keeps `energy` of its sum of squares.

    Raises WrongRequest unless exactly one of `rank` and `energy` is given.
    """
    if (rank is None) == (energy is None):
        raise WrongRequest("give either --rank N or --energy X")
    if energy is not None and not 0 < energy <= 1:
        raise WrongRequest(f"--energy must be above 0 and at most 1, not {energy}")
    refuse_target(target, overwrite, to)
    lora = read(source)
    console.print(f"{source}: {lora.dialect}, {described(lora)}")
    return write(target, reduced(lora, rank, energy), to, dtype_of(precision, lora), lora)
