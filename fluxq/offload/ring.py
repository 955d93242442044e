"""Who may use which frozen weights when.

A *unit* is what is swapped together. Whatever computes with frozen weights does so inside `with ring.resident(units)`:
that is the only promise a ring makes, and all that the model knows of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class Ring(Protocol):
    def resident(self, units: Sequence[str]) -> AbstractContextManager[None]:
        """Inside, the frozen weights of `units` lie where their layers expect them."""
        ...


class AllResident:
    """The ring of a model that fits: every unit always lies where its layers expect it."""

    def resident(self, units: Sequence[str]) -> AbstractContextManager[None]:
        return nullcontext()
