"""Decides which implementation of the ops runs; nothing else does.

`reference` is plain PyTorch, runs anywhere and defines what is correct. `triton` runs on GPUs of compute capability 8.0
or newer if Triton is installed; with TRITON_INTERPRET=1 it can be selected anywhere.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from . import reference

BACKENDS = ("reference", "triton")
_forced: ModuleType | None = None


def ops(like: Tensor) -> ModuleType:
    """The module whose functions run on tensors on the device of `like`."""
    if _forced is not None:
        return _forced
    return _for_device(like.device)


@cache
def _for_device(device: torch.device) -> ModuleType:
    usable = device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)
    return _triton() if usable and triton_installed() else reference


def triton_installed() -> bool:
    """Whether Triton can be imported (on Windows, the package triton-windows)."""
    try:
        return importlib.util.find_spec("triton") is not None
    except ValueError:  # another module without a spec took its name
        return False


def _triton() -> ModuleType:
    from . import triton

    return triton


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Inside, run every op on backend `name`, on any device. Raises ValueError for an unknown name, or if Triton is not
    installed.
    """
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, not {name!r}")
    if name == "triton" and not triton_installed():
        raise ValueError("backend 'triton' needs the package triton; install it, or use 'reference'")
    before, _forced = _forced, reference if name == "reference" else _triton()
    try:
        yield
    finally:
        _forced = before
