"""What a machine does beside a run: other programs on the GPU, its clock, swap. All of it takes up to a second to read,
so it is read only where a line about it is due.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from .machine import ram_bytes

GIB = 2**30
FIELDS = {"clock": "clocks.sm", "heat": "temperature.gpu", "limit": "power.limit"}
"""Facts of `read_conditions` -> how nvidia-smi calls them; in MHz, degrees Celsius and watts."""

Conditions = Mapping[str, float]
"""Facts by name, without those that this machine does not tell. In bytes: `others`, the GPU memory that is not torch's,
`resident` and `swapped`, of this process, and `available` RAM; and FIELDS.
"""


def read_conditions() -> Conditions:
    """The conditions now."""
    found = {name: _bytes("/proc/self/status", field) for name, field in (("resident", "VmRSS"), ("swapped", "VmSwap"))}
    found["available"] = (ram_bytes() or (0, None))[1]
    if torch.cuda.is_available():
        with suppress(RuntimeError):
            free, total = torch.cuda.mem_get_info()
            found["others"] = total - free - torch.cuda.memory_reserved()
        for name, text in zip(FIELDS, nvidia_smi(list(FIELDS.values())), strict=False):
            with suppress(ValueError):  # "[N/A]"
                found[name] = float(text)
    return {name: value for name, value in found.items() if value is not None}


def nvidia_smi(fields: Sequence[str]) -> list[str]:
    """What the driver's tool says of the GPU in use; [] if it says nothing."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    with suppress(OSError, RuntimeError, AttributeError, subprocess.SubprocessError):
        command.append(f"--id=GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}")
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
        return [text.strip() for text in done.stdout.strip().split(",")]
    return []


def differences(before: Conditions, now: Conditions) -> list[str]:
    """What of `now` is worse than `before`, each in words."""
    found = []

    def grown(name: str, least: float = GIB / 2) -> bool:
        return name in before and name in now and now[name] > max(before[name] + least, 1.1 * before[name])

    def from_to(name: str) -> str:
        return f"from {before[name] / GIB:.1f} to {now[name] / GIB:.1f} GiB"

    if grown("others"):
        found.append(f"the GPU memory of other programs grew {from_to('others')}")
    if grown("resident"):
        found.append(f"this process's RAM grew {from_to('resident')}")
    if grown("swapped", GIB / 16):
        found.append(f"what is swapped out of it grew {from_to('swapped')}")
    if now.get("available", GIB) < GIB / 2 <= before.get("available", 0):
        found.append(f"only {now['available'] / GIB:.1f} GiB of RAM are available")
    for name, what, unit in (("clock", "the GPU's clock", "MHz"), ("limit", "the GPU's power limit", "W")):
        if name in before and name in now and now[name] < 0.9 * before[name]:
            heat = f" at {now['heat']:.0f} °C" if name == "clock" and "heat" in now else ""
            found.append(f"{what} fell from {before[name]:.0f} to {now[name]:.0f} {unit}{heat}")
    return found


def _bytes(path: str, field: str) -> float | None:
    """The number of a line "VmRSS:   12 kB", in bytes; None where there is no such line."""
    with suppress(OSError):
        if line := re.search(rf"^{field}:\s+(\d+) kB", Path(path).read_text(), re.MULTILINE):
            return float(line[1]) * 1024
    return None
