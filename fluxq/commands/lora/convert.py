"""`fluxq lora convert`: write a LoRA file for another program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fluxq.console import console
from fluxq.formats.lora.read import described

from .files import dtype_of, read, reduced, refuse_target, write


def convert_command(
    source: Path, target: Path, to: str, rank: int | None, precision: str | None, overwrite: bool
) -> dict[str, Any]:
    """Write the LoRA `source` to `target` in the dialect `to`. Only `rank` and rounding to `precision` lose anything.

    Raises WrongRequest for a source that is not a FLUX.1 LoRA, and for a target that exists.
    """
    refuse_target(target, overwrite, to)
    lora = read(source)
    console.print(f"{source}: {lora.dialect}, {described(lora)}")
    made = lora if rank is None else reduced(lora, rank)
    return {"source_dialect": lora.dialect, **write(target, made, to, dtype_of(precision, lora), lora)}
