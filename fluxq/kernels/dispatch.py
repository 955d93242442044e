"""Which implementation of the ops runs: the only place where that is decided.

`reference` is plain PyTorch, runs anywhere and defines what is correct. `triton` is what runs on a GPU of compute
capability 8.0 or newer where Triton is installed; under TRITON_INTERPRET=1 it can be asked for anywhere.
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
    """The module whose functions run on tensors that lie where `like` lies."""
    if _forced is not None:
        return _forced
    return _for_device(like.device)


@cache
def _for_device(device: torch.device) -> ModuleType:
    usable = device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)
    return _triton() if usable and triton_installed() else reference


def triton_installed() -> bool:
    """Whether Triton can be imported (on Windows it is the package triton-windows)."""
    try:
        return importlib.util.find_spec("triton") is not None
    except ValueError:  # a module without a specification stands in its place
        return False


def _triton() -> ModuleType:
    from . import triton

    return triton


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run every op inside on backend `name`, wherever its tensors lie. Raises ValueError for a name that is not there,
    or where Triton is not installed.
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
