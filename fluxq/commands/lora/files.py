"""What the commands share: reading a LoRA with its notes, and writing one with its measured error."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fluxq.console import console, plural
from fluxq.errors import WrongRequest
from fluxq.formats.lora.algebra import Adapter, combined, resized
from fluxq.formats.lora.metadata import converted_metadata
from fluxq.formats.lora.read import Lora, described, load_lora
from fluxq.formats.lora.write import save_lora
from fluxq.model.config import FluxConfig

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def read(path: Path, config: FluxConfig | None = None) -> Lora:
    """The LoRA at `path`. Prints its notes."""
    lora = load_lora(path, config)
    for note in lora.notes:
        console.print(f"{path.name}: {note}")
    return lora


def refuse_target(target: Path, overwrite: bool, to: str | None = None) -> None:
    """Raise WrongRequest if `target` has a suffix that no program looks for, or exists, unless it is a file and
    `overwrite` is set. to: the dialect; PEFT's is a folder.
    """
    if target.is_dir():
        raise WrongRequest(f"{target} is an existing folder; choose another name")
    if target.exists() and not overwrite:
        raise WrongRequest(f"{target} exists; choose another name, or replace it with --overwrite")
    if to != "peft" and target.suffix != ".safetensors":
        raise WrongRequest(f"{target} must be named .safetensors, like {target.stem}.safetensors")


def dtype_of(precision: str | None, *loras: Lora) -> torch.dtype:
    """The dtype of `precision`, a key of PRECISIONS; without one, the dtype of all `loras`, or fp32 if they differ."""
    if precision:
        return PRECISIONS[precision]
    dtypes = {lora.dtype for lora in loras}
    return dtypes.pop() if len(dtypes) == 1 and dtypes <= set(PRECISIONS.values()) else torch.float32


def write(target: Path, made: Lora, to: str, dtype: torch.dtype, like: Lora | None = None) -> dict[str, Any]:
    """Write `made` in the dialect `to`, read it back, and print and return what was written.

    The relative error compares the weight change of the file with that of `like`, by default `made`.
    """
    like = like or made
    clip = {} if to == "peft" else made.clip
    if len(clip) < len(made.clip):
        console.print(
            f"its CLIP-L part ({plural(len(made.clip), 'module')}) is left out: a PEFT folder is for one model"
        )
    if not made.adapters and to == "peft":
        raise WrongRequest(f"{made.path} adapts only the text encoder; write it with --to kohya or --to comfy")
    everything = (*made.adapters.values(), *clip.values())
    metadata = converted_metadata(made.metadata, {a.rank for a in everything}, {a.alpha for a in everything})
    save_lora(target, made.adapters, made.config, to, dtype, metadata, clip)
    written = load_lora(target, made.config)
    error = relative_error(written.everything, (like if to != "peft" else replace(like, clip={})).everything)
    name = next(name for name, d in PRECISIONS.items() if d == dtype)
    console.print(f"{target}: {to}, {name}, {described(written)}; relative error of the weight change: {error:.2%}")
    return {
        "file": str(target),
        "dialect": to,
        "precision": name,
        "ranks": [*written.file_ranks],
        "relative_error": error,
    }


def relative_error(found: Mapping[str, Adapter], wanted: Mapping[str, Adapter]) -> float:
    """|change of `found` - change of `wanted`| / |change of `wanted`|, over all modules, in fp64."""
    lost = whole = 0.0
    for module in {**wanted, **found}:
        mine, theirs = found.get(module), wanted.get(module)
        whole += theirs.norm() ** 2 if theirs else 0.0
        if not (mine and theirs and _identical(mine, theirs)):
            pair = [({module: _wide(a)}, sign) for a, sign in ((mine, 1.0), (theirs, -1.0)) if a]
            lost += combined(pair)[module].norm() ** 2
    return math.sqrt(lost / whole) if whole else math.sqrt(lost)


def _wide(adapter: Adapter) -> Adapter:
    return Adapter(adapter.down.double(), adapter.up.double(), adapter.alpha)


def _identical(a: Adapter, b: Adapter) -> bool:
    return a.scale == b.scale and torch.equal(a.down, b.down) and torch.equal(a.up, b.up)


def reduced(lora: Lora, rank: int | None = None, energy: float | None = None) -> Lora:
    """`lora` with every adapter at `rank`, or at the lowest rank that keeps `energy` of its sum of squares."""
    parts = (lora.adapters, lora.clip)
    adapters, clip = ({m: resized(a, rank, energy).adapter for m, a in some.items()} for some in parts)
    return replace(lora, adapters=adapters, clip=clip)
