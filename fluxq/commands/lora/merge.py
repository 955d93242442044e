"""`fluxq lora merge`: merge LoRAs into one LoRA, or into a transformer's checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fluxq.config_files import file_and_strength
from fluxq.console import byte_bar, console, plural
from fluxq.errors import WrongRequest
from fluxq.formats.lora.algebra import combined
from fluxq.formats.lora.base import Base, merge_into
from fluxq.formats.lora.read import Lora, described

from .files import dtype_of, read, reduced, refuse_target, write


def merge_command(
    files: Sequence[str],
    out: Path,
    base: Path | None,
    to: str | None,
    rank: int | None,
    precision: str | None,
    overwrite: bool,
) -> dict[str, Any]:
    """Merge `files`, "FILE" or "FILE=STRENGTH", into the LoRA `out`, or into `out` as a copy of the transformer `base`.

    Without `rank`, ranks add up and only rounding loses anything. Raises WrongRequest for LoRAs of different models.
    """
    refuse_target(out, overwrite, None if base else to)
    chosen = [file_and_strength(file) for file in files]
    given = [name for name, value in (("--to", to), ("--rank", rank), ("--precision", precision)) if value]
    if base is not None and given:
        raise WrongRequest(
            f"{', '.join(given)} is for a merged LoRA; with --base, the checkpoint keeps its layout and precision"
        )
    checkpoint = None if base is None else Base(base)
    loras = [(read(path, checkpoint.config if checkpoint else None), strength) for path, strength in chosen]
    for lora, strength in loras:
        console.print(f"{lora.path}: {lora.dialect}, {described(lora)}, at {strength:g}")
    whole = _sum(loras)
    if checkpoint is None:
        made = whole if rank is None else reduced(whole, rank)
        dtype = dtype_of(precision, *(lora for lora, _ in loras))
        return write(out, made, to or "kohya", dtype, whole)
    whole.require_transformer()
    if whole.clip:
        console.print(
            f"the CLIP-L part ({plural(len(whole.clip), 'module')}) is left out: it is not part of the transformer"
        )
    names = ", ".join(f"{path.name}={strength:g}" for path, strength in chosen)
    with byte_bar("merging") as progress:
        errors = merge_into(checkpoint, out, whole.adapters, names, progress)
    console.print(
        f"{out}: {plural(len(whole.adapters), 'layer')} changed; rounding error {errors.relative:.2%} of the change"
    )
    return {"file": str(out), "modules": len(whole.adapters), "relative_error": errors.relative}


def _sum(loras: Sequence[tuple[Lora, float]]) -> Lora:
    """The sum of `loras` as one LoRA, with the metadata of the first that is still true."""
    first = loras[0][0]
    for lora, _ in loras:
        if lora.config != first.config:
            raise WrongRequest(
                f"{lora.path} and {first.path} are LoRAs of different models; merge LoRAs of the same model"
            )
    if len(loras) == 1 and loras[0][1] == 1:
        return first
    adapters = combined([(lora.adapters, strength) for lora, strength in loras])
    clip = combined([(lora.clip, strength) for lora, strength in loras])
    metadata = {k: v for k, v in first.metadata.items() if k in ("modelspec.architecture", "ss_base_model_version")}
    metadata["modelspec.merged_from"] = ", ".join(f"{lora.path.name}={strength:g}" for lora, strength in loras)
    triggers = [t for lora, _ in loras if (t := lora.metadata.get("modelspec.trigger_phrase"))]
    metadata |= {"modelspec.trigger_phrase": ", ".join(dict.fromkeys(triggers))} if triggers else {}
    return replace(first, adapters=adapters, clip=clip, metadata=metadata, notes=[])
