"""What each program of a kernel reads and writes, recorded in Triton's interpreter.

There, programs run one after another, so a kernel whose programs disturb each other gives the right result all the
same; on a GPU they run at once. After every launch three rules are checked, byte by byte: no two programs write a byte,
none reads a byte that another writes, and every load and store lies in the storage of one argument.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch


class SharedMemory(AssertionError):
    """A program of a kernel uses memory that another one, or nobody, has given it."""


class Programs:
    """Checks every launch while `monkeypatch` is in force. grids: kernel -> the most programs of a launch."""

    def __init__(self, monkeypatch) -> None:
        from triton.runtime import interpreter

        self.grids: Counter[str] = Counter()
        self._storages: list[tuple[int, int]] = []
        self._accesses: list[Access] = []
        self._outside = ""
        builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
        load, store, launch = builder.create_masked_load, builder.create_masked_store, executor.__call__

        def masked_load(own, pointers, mask, *others):
            self._note(False, own.grid_idx, pointers, mask)
            return load(own, pointers, mask, *others)

        def masked_store(own, pointers, value, mask, *others):
            self._note(True, own.grid_idx, pointers, mask)
            return store(own, pointers, value, mask, *others)

        def atomic(*_):
            raise NotImplementedError("what programs update atomically they may share: not recorded")

        def launched(own, *arguments, **options):
            self._storages, self._outside = list(_storages((*arguments, *options.values()))), ""
            self._accesses.clear()
            name = f"{own.fn.__module__.rpartition('.')[2]}.{own.fn.__name__}"
            try:
                launch(own, *arguments, **options)
            except interpreter.InterpreterError:
                if self._outside:
                    raise SharedMemory(f"{name}: {self._outside}") from None
                raise
            self.grids[name] = max(self.grids[name], math.prod(interpreter.interpreter_builder.grid_dim))
            if shared := self._shared():
                raise SharedMemory(f"{name}: {shared}")

        monkeypatch.setattr(builder, "create_masked_load", masked_load)
        monkeypatch.setattr(builder, "create_masked_store", masked_store)
        monkeypatch.setattr(builder, "create_atomic_rmw", atomic)
        monkeypatch.setattr(builder, "create_atomic_cas", atomic)
        monkeypatch.setattr(executor, "__call__", launched)

    def _note(self, writes: bool, program: tuple[int, int, int], pointers: Any, mask: Any) -> None:
        """Before the access is made."""
        addresses, chosen = np.broadcast_arrays(pointers.data, mask.data.astype(bool))
        addresses, item = addresses[chosen], max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        if not addresses.size:
            return
        first, end = int(addresses.min()), int(addresses.max()) + item
        for storage in self._storages:
            if storage[0] <= first and end <= storage[1]:
                self._accesses.append(Access(writes, program, storage, addresses, item))
                return
        verb = "writes" if writes else "reads"
        self._outside = f"program {program} {verb} {end - first} bytes that lie in the memory of no single argument"
        raise IndexError(self._outside)

    def _shared(self) -> str:
        """What two programs of the launch do with the same byte, or nothing."""
        programs = sorted({access.program for access in self._accesses})
        written = {access.storage for access in self._accesses if access.writes}
        writes = _by_byte([a for a in self._accesses if a.writes], programs)
        reads = _by_byte([a for a in self._accesses if not a.writes and a.storage in written], programs)
        twice = np.flatnonzero(writes[1:] >> PROGRAM == writes[:-1] >> PROGRAM)
        if len(twice):
            one, other = (programs[writes[twice[0] + i] & 0xFFFF] for i in (0, 1))
            return f"program {one} and program {other} write the same byte"
        place = np.minimum(np.searchsorted(writes, reads >> PROGRAM << PROGRAM), len(writes) - 1)
        found = np.flatnonzero((writes[place] >> PROGRAM == reads >> PROGRAM) & (writes[place] != reads))
        if len(found):
            one, other = (programs[each & 0xFFFF] for each in (reads[found[0]], writes[place[found[0]]]))
            return f"program {one} reads a byte that program {other} writes"
        return ""


class Access(NamedTuple):
    """A load or store of a program: the first byte of each number, and the bytes that a number has."""

    writes: bool
    program: tuple[int, int, int]
    storage: tuple[int, int]
    addresses: np.ndarray
    item: int


PROGRAM = 16
"""Bits below a byte's address that hold a program's number."""


def _by_byte(accesses: list[Access], programs: list[tuple[int, int, int]]) -> np.ndarray:
    """Each byte with each program that touches it, once, in order."""
    assert len(programs) < 1 << PROGRAM
    numbers = {program: number for number, program in enumerate(programs)}
    parts = [np.empty(0, np.int64)]
    for access in accesses:
        one_each = (access.addresses.astype(np.int64)[:, None] + np.arange(access.item)).ravel()
        parts.append(one_each << PROGRAM | numbers[access.program])
    return np.unique(np.concatenate(parts))


def _storages(arguments: tuple) -> Iterator[tuple[int, int]]:
    """(first byte, end) of the memory of every tensor."""
    for each in arguments:
        if isinstance(each, tuple):
            yield from _storages(each)
        elif isinstance(each, torch.Tensor):
            storage = each.untyped_storage()
            yield storage.data_ptr(), storage.data_ptr() + storage.nbytes()
