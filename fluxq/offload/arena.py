"""The host's memory for the units that are streamed: one allocation, pinned if the system lets it.

Copies from pinned memory run beside everything else and at the bus' full rate. torch's own pinned allocator rounds
every tensor up to a power of two; here the arena is registered with the driver as it lies, in chunks, and no unit lies
across two of them, since one copy may read from one registration only. Where the driver refuses (Windows limits it to
half of the memory) copies go through a few small pinned buffers: `streams_for` decides.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from .streams import CudaStreams, Immediate, Staged, Streams

ALIGNMENT, PAGE, CHUNK = 256, 4096, 2 << 30
STAGING_BUFFERS = 3


class Arena(Mapping[str, Tensor]):
    """Unit -> its bytes, flat uint8, each from a multiple of 256.

    nbytes: unit -> length; `read(unit, out)` is called for each to fill `out` with its bytes. `close` before it is let
    go, once no copy is under way; what it forgets is made up for when it is collected.
    """

    def __init__(self, nbytes: Mapping[str, int], read: Callable[[str, Tensor], Any], chunk: int = CHUNK) -> None:
        starts, self._chunks, end = {}, [], 0
        for unit, length in nbytes.items():
            end = _up(end, ALIGNMENT)
            if not self._chunks or end + length - self._chunks[-1][0] > chunk:
                end = _up(end, PAGE)
                self._chunks.append((end, end))
            starts[unit], end = end, end + length
            self._chunks[-1] = (self._chunks[-1][0], end)
        raw = torch.empty(end + PAGE, dtype=torch.uint8)
        self._memory = raw[-raw.data_ptr() % PAGE :][:end]
        self._units = {unit: self._memory[start : start + nbytes[unit]] for unit, start in starts.items()}
        self._registered: list[int] = []
        self._unpin: Callable[[], Any] = lambda: None
        for unit, out in self._units.items():
            read(unit, out)

    def __getitem__(self, unit: str) -> Tensor:
        return self._units[unit]

    def __iter__(self) -> Iterator[str]:
        return iter(self._units)

    def __len__(self) -> int:
        return len(self._units)

    @property
    def nbytes(self) -> int:
        return len(self._memory)

    def pin(self, cudart: Any = None) -> str | None:
        """Have the driver pin all of it; why it did not, in which case nothing is pinned. cudart: torch.cuda.cudart(),
        unless a test brings its own.
        """
        cudart = cudart or torch.cuda.cudart()
        base, failure = self._memory.data_ptr(), None
        self._unpin = weakref.finalize(self, _unregister, cudart, self._registered)
        for start, end in self._chunks:
            error = int(cudart.cudaHostRegister(base + start, end - start, 0))
            if error:
                failure = f"the driver pinned {start / 1e9:.1f} of {len(self._memory) / 1e9:.1f} GB (error {error})"
                break
            self._registered.append(base + start)
        if failure:
            self.unpin()
            _clear_error()
        return failure

    def unpin(self) -> None:
        """Give the driver its pins back. No copy may be under way. Raises RuntimeError where it does not take them."""
        self._unpin()

    close = unpin


def _unregister(cudart: Any, registered: list[int]) -> None:
    errors = [int(cudart.cudaHostUnregister(registered.pop())) for _ in range(len(registered))]
    if any(errors):
        raise RuntimeError(f"pinned memory could not be given back (CUDA error {max(errors)})")


def _clear_error() -> None:
    """What the driver refused stays its last error, which the next kernel would be blamed for: it is this one."""
    if torch.cuda.is_available():
        with suppress(RuntimeError):
            torch.zeros(1, device="cuda").add_(1)


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def streams_for(arena: Arena, device: torch.device, notify: Callable[[str], None]) -> Streams:
    """The streams for a ring on `device` that copies from `arena`: the faster of pinned and staged, measured there."""
    if device.type != "cuda" or not len(arena):
        return Immediate()
    longest = max(arena.values(), key=len)
    direct, size = CudaStreams(device), f"{arena.nbytes / 1e9:.1f} GB of weights wait in host memory"
    staged = staged_on(direct, len(longest), device)
    target = torch.empty(len(longest), dtype=torch.uint8, device=device)
    rates = {"staged": copy_rate(staged, target, longest)}
    if failure := arena.pin():
        notify(f"{size}, copied through pinned buffers at {rates['staged'] / 1e9:.1f} GB/s: {failure}")
        return staged
    rates["pinned"] = copy_rate(direct, target, longest)
    rates_text = f"{rates['pinned'] / 1e9:.1f} GB/s pinned, {rates['staged'] / 1e9:.1f} GB/s through pinned buffers"
    if rates["pinned"] >= rates["staged"]:
        notify(f"{size}, pinned: {rates_text}")
        return direct
    arena.unpin()
    notify(f"{size}, copied through pinned buffers: {rates_text}")
    return staged


def staged_on(streams: Streams, longest: int, device: torch.device) -> Staged:
    """`streams`, reached through buffers for pieces of up to `longest` bytes: what is not pinned, or lies in files."""
    buffers = Arena({f"buffer {i}": longest for i in range(STAGING_BUFFERS)}, lambda unit, out: None)
    if device.type == "cuda":
        buffers.pin()  # where even that is refused, copies are slow and right
    return Staged(streams, buffers.values())


def streams_from_files(longest: int, device: torch.device) -> Streams:
    """The streams for a ring on `device` whose units are read from files, in pieces of up to `longest` bytes, by a
    thread: the host holds a few pieces, and its cache of files is the arena that gives way when memory is short.
    """
    return staged_on(CudaStreams(device) if device.type == "cuda" else Immediate(), longest, device)


def copy_rate(streams: Streams, target: Tensor, source: Tensor, copies: int = 6) -> float:
    """Bytes a second of copying `source` to `target` again and again, after one that is not counted."""
    streams.copy_waits(streams.computed())  # the first copy waits for whatever had target's memory before
    streams.copy(target, source)
    streams.host_waits(streams.copied())
    start = time.perf_counter()
    for _ in range(copies):
        streams.copy(target, source)
    streams.host_waits(streams.copied())  # this measures: the clock stops when the last copy is done
    return copies * len(source) / (time.perf_counter() - start)
