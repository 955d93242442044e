"""For programs that run on the emulated GPU: `import emulated`."""

from __future__ import annotations

import ctypes
import json
from typing import Any

_library = ctypes.CDLL("libemulated_gpu.so")
_library.emulated_gpu_report.restype = ctypes.c_char_p


def report() -> dict[str, Any]:
    """Launches, copies, calls, errors and notes since the last reset, and the memory that is taken."""
    return json.loads(_library.emulated_gpu_report())


def reset() -> None:
    """Begin to count anew. Memory, and what is to fail, stay as they are."""
    _library.emulated_gpu_reset()


def fail(plan: str) -> None:
    """Let calls fail, counted from now: "alloc:7-9,module:1". Kinds: alloc, pin, module, handle, kernel."""
    if not _library.emulated_gpu_fail(plan.encode()):
        raise ValueError(f"cannot read {plan!r}; write it like 'alloc:7-9,module:1'")
