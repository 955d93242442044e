"""A run's peak memory, and a watch for drivers that spill into system memory."""

from __future__ import annotations

import sys

import torch

from .machine import SpillWatch

_spill = SpillWatch(lambda: None)


def reset_peak() -> None:
    """Measure the GPU's peak from now on. Memory in use counts, so call this before the run loads anything."""
    global _spill
    _spill = SpillWatch()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_bytes() -> int | None:
    """The peak memory so far: on the GPU if there is one, else resident in RAM; None if unknown."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def spill_note() -> str | None:
    """A warning if the driver has started to use system memory for the GPU since `reset_peak`; see SpillWatch."""
    return _spill.note()
