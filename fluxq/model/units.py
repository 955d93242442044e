"""Which frozen tensors are kept, moved and stored together.

The blocks' weights without modulation are equal *units*: the image half of a double block, its text half, one single
block. Modulation is needed elsewhere and at another time, so it is a unit of its own for each block. What lies outside
the blocks stays with the model and is the unit `rest`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

REST = "rest"


def unit_of(name: str) -> str:
    """The unit that the tensor or module `name` belongs to: "double_blocks.0.img_attn.qkv.weight" ->
    "double_blocks.0.img".
    """
    match = re.match(r"(double_blocks\.\d+)\.(img|txt)_(\w+)|(single_blocks\.\d+)\.(\w+)", name)
    if match is None:
        return REST
    double, stream, part, single, member = match.groups()
    if double:
        return f"{double}.mod" if part == "mod" else f"{double}.{stream}"
    return f"{single}.mod" if member == "modulation" else single


def by_unit(names: Iterable[str]) -> dict[str, list[str]]:
    """unit -> its tensors, both in the order of `names`."""
    units: dict[str, list[str]] = {}
    for name in names:
        units.setdefault(unit_of(name), []).append(name)
    return units
