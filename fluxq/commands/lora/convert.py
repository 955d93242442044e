"""`fluxq lora convert` and `resize`: a LoRA file for another program, or of another rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fluxq.console import console
from fluxq.formats.lora.read import described

from .files import dtype_of, read, refuse_existing, shortened, write


def convert_command(
    source: Path, target: Path, to: str, rank: int | None, precision: str | None, overwrite: bool
) -> dict[str, Any]:
    """Write the LoRA `source` as `to`. Exact within the rounding of `precision`, unless `rank` asks for less.

    Raises WrongRequest for a source that is no LoRA of FLUX.1, and for a target that exists.
    """
    refuse_existing(target, overwrite)
    lora = read(source)
    console.print(f"{source}: {lora.dialect}, {described(lora)}")
    made = lora if rank is None else shortened(lora, rank)
    return {"source_dialect": lora.dialect, **write(target, made, to, dtype_of(precision, lora), lora)}
