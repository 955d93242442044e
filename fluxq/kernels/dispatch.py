"""Which implementation of the ops runs: the only place where that is decided.

`reference` is plain PyTorch, runs anywhere and defines what is correct.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from fluxq.kernels import reference

_BACKENDS: dict[str, ModuleType] = {"reference": reference}
_current = reference


def ops() -> ModuleType:
    """The module whose functions run now."""
    return _current


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run every op inside on backend `name`. Raises ValueError for a name that is not there."""
    global _current
    if name not in _BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(_BACKENDS)}, not {name!r}")
    before, _current = _current, _BACKENDS[name]
    try:
        yield
    finally:
        _current = before
