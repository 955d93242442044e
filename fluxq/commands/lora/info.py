"""`fluxq lora info`: what is in a LoRA file, and which programs read it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from fluxq.console import console
from fluxq.formats.checkpoint.files import printable
from fluxq.formats.lora.algebra import Adapter
from fluxq.formats.lora.metadata import trigger_of
from fluxq.formats.lora.programs import programs
from fluxq.formats.lora.read import described, load_lora

SHOWN = {  # metadata on the screen; --json has all of it
    "modelspec.title": "title",
    "modelspec.architecture": "made for",
    "ss_sd_model_name": "base",
    "ss_steps": "steps",
    "ss_learning_rate": "learning rate",
    "ss_num_train_images": "images",
    "ss_resolution": "resolution",
    "modelspec.date": "date",
    "modelspec.license": "license",
}


def info_command(path: Path) -> dict[str, Any]:
    """Print and return the LoRA's dialect, ranks and norms by type of layer, metadata, trigger and programs."""
    lora = load_lora(path)
    layers = by_layer(lora.adapters) | {f"CLIP-L {name}": row for name, row in by_layer(lora.clip).items()}
    trigger, readers = trigger_of(lora.metadata), programs(lora)
    precision = str(lora.dtype).removeprefix("torch.")
    console.print(f"{path}: a LoRA, {lora.dialect}, {precision}, {described(lora)}")
    table = Table("layer", "count", "rank", "alpha / rank", "mean norm", "max norm", box=None, pad_edge=False)
    for name, row in layers.items():
        cells = (row["count"], _span(row["ranks"]), _span(row["scales"]), row["norm_mean"], row["norm_largest"])
        table.add_row(name, *(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells))
    console.print(table)
    facts = {label: lora.metadata[key] for key, label in SHOWN.items() if lora.metadata.get(key, "None") != "None"}
    facts = {"trigger": trigger or "not named", **facts}
    for label, value in facts.items():
        console.print(f"{label:<14}{printable(value)}")
    for program, verdict in readers.items():
        console.print(f"{program:<14}{verdict}")
    for note in lora.notes:
        console.print(f"note: {note}")
    answer = {"file": str(path), "dialect": lora.dialect, "precision": precision, "modules": len(lora.adapters)}
    answer |= {"clip_modules": len(lora.clip), "ranks": lora.ranks, "layers": layers, "trigger": trigger}
    return {**answer, "programs": readers, "metadata": lora.metadata, "notes": lora.notes}


def by_layer(adapters: Mapping[str, Adapter]) -> dict[str, dict[str, Any]]:
    """Type of layer (like "double_blocks.*.img_attn.qkv") -> count, ranks, scales, norms of the weight change."""
    groups: dict[str, list[Adapter]] = {}
    for module, adapter in adapters.items():
        groups.setdefault(re.sub(r"\.\d+\.", ".*.", module, count=1), []).append(adapter)
    rows = {}
    for name, some in groups.items():
        norms = [adapter.norm() for adapter in some]
        rows[name] = {
            "count": len(some),
            "ranks": sorted({adapter.rank for adapter in some}),
            "scales": sorted({adapter.scale for adapter in some}),
            "norm_mean": sum(norms) / len(norms),
            "norm_largest": max(norms),
        }
    return rows


def _span(values: list[Any]) -> str:
    ends = dict.fromkeys((values[0], values[-1]))
    return " to ".join(f"{value:g}" for value in ends)
