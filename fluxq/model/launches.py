"""How many kernels a training step launches: a table, counted on the emulated GPU (`make emulated-host`).

Counted with LoRA of rank 16 on attention and MLP, the default; a layer without LoRA launches fewer. fp8 and int8 are
counted alike: they run the same code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_suffix(".json")


def launches(single: bool, format: str, compute: str, chunk: int) -> Mapping[str, int]:
    """Policy -> kernels of a single or double block, forward and backward; "forward" -> of its forward pass alone.

    chunk: how many numbers of a weight this GPU's kernels decode at a time (fluxq/kernels/chunks.py).
    """
    return _row(format, compute, chunk)["single" if single else "double"]


def outside(format: str, compute: str, chunk: int) -> int:
    """Kernels of a step outside the blocks, the optimizer's included."""
    return _row(format, compute, chunk)["outside"]


@cache
def _row(format: str, compute: str, chunk: int) -> Mapping[str, Any]:
    """The row of the nearest chunk; 0 cuts nothing, as the largest does."""
    rows = json.loads(FILE.read_text(encoding="utf-8"))
    wanted = format.replace("fp8", "int8"), compute.replace("fp8", "int8")
    own = [row for row in rows if (row["format"], row["compute"]) == wanted]
    largest = max(row["chunk"] for row in own)
    return min(own, key=lambda row: abs(row["chunk"] - (chunk or largest)))
