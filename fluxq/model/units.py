"""Units: the frozen tensors that are kept, moved and stored together.

Without modulation, the blocks' weights make *units* of equal size: the image half of a double block, its text half, a
single block. Each block's modulation is a unit of its own, because it is used elsewhere and at another time.
Everything outside the blocks is the unit `rest` and stays with the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

REST = "rest"


def unit_of(name: str) -> str:
    """The unit of the tensor or module `name`: "double_blocks.0.img_attn.qkv.weight" -> "double_blocks.0.img"."""
    match = re.match(r"(double_blocks\.\d+)\.(img|txt)_(\w+)|(single_blocks\.\d+)\.(\w+)", name)
    if match is None:
        return REST
    double, stream, part, single, member = match.groups()
    if double:
        return f"{double}.mod" if part == "mod" else f"{double}.{stream}"
    return f"{single}.mod" if member == "modulation" else single


def by_unit(names: Iterable[str]) -> dict[str, list[str]]:
    """unit -> its tensors; units and tensors in the order of `names`."""
    units: dict[str, list[str]] = {}
    for name in names:
        units.setdefault(unit_of(name), []).append(name)
    return units
