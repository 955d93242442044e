"""Host memory for the streamed units: one allocation, pinned if the system allows it.

Copies from pinned memory run in parallel with everything else and at the full rate of the bus. torch's own pinned
allocator rounds every tensor up to a power of two; here the arena is registered with the driver as it is, in chunks. No
unit spans two chunks, since one copy may read from only one registration. If the driver refuses (Windows limits pinned
memory to half of RAM), copies go through a few small pinned buffers: `streams_for` decides.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from fluxq.console import Notify

from .streams import CudaStreams, Immediate, Staged, Streams

ALIGNMENT, PAGE, CHUNK = 256, 4096, 2 << 30
STAGING_BUFFERS = 3


class Arena(Mapping[str, Tensor]):
    """Unit -> its bytes, flat uint8, each at a multiple of 256.

    nbytes: unit -> length. `read(unit, out)` is called for each unit to fill `out` with its bytes. Call `close` before
    dropping the arena, when no copy is running; if that is forgotten, garbage collection does it.
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
        self.refused: str | None = None  # why the driver has not pinned it, if it was asked
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
        """Have the driver pin all of it. Returns None, or why the driver refused; then nothing is pinned. cudart:
        torch.cuda.cudart(), unless a test passes its own.
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
        self.refused = failure
        return failure

    def unpin(self) -> None:
        """Unpin the memory. No copy may be running. Raises RuntimeError if the driver refuses."""
        self._unpin()

    close = unpin


def _unregister(cudart: Any, registered: list[int]) -> None:
    errors = [int(cudart.cudaHostUnregister(registered.pop())) for _ in range(len(registered))]
    if any(errors):
        raise RuntimeError(f"the driver refused to unpin memory (CUDA error {max(errors)})")


def _clear_error() -> None:
    """A refusal stays the driver's last error, which the next kernel launch would report: let this launch report it."""
    if torch.cuda.is_available():
        with suppress(RuntimeError):
            torch.zeros(1, device="cuda").add_(1)


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def streams_for(arena: Arena, device: torch.device, notify: Notify) -> Streams:
    """The streams for a ring on `device` that copies from `arena`: pinned or staged, whichever a measurement shows to
    be faster.
    """
    if device.type != "cuda" or not len(arena):
        return Immediate()
    longest = max(arena.values(), key=len)
    direct, size = CudaStreams(device), f"{arena.nbytes / 1e9:.1f} GB of weights in RAM"
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
    """`streams` behind pinned buffers for pieces of up to `longest` bytes: for unpinned memory or files."""
    buffers = Arena({f"buffer {i}": longest for i in range(STAGING_BUFFERS)}, lambda unit, out: None)
    if device.type == "cuda":
        buffers.pin()  # if even that is refused, copies are slow but correct
    return Staged(streams, buffers.values())


def streams_from_files(longest: int, device: torch.device) -> Streams:
    """The streams for a ring on `device` whose units a thread reads from files, in pieces of up to `longest` bytes.

    The host holds only a few pieces; the system's file cache serves as the arena, and shrinks when memory is short.
    """
    return staged_on(CudaStreams(device) if device.type == "cuda" else Immediate(), longest, device)


def copy_rate(streams: Streams, target: Tensor, source: Tensor, copies: int = 6) -> float:
    """Bytes per second of copying `source` to `target` repeatedly, after one warm-up copy."""
    streams.copy_waits(streams.computed())  # the first copy waits for whatever used target's memory before
    streams.copy(target, source)
    streams.host_waits(streams.copied())
    start = time.perf_counter()
    for _ in range(copies):
        streams.copy(target, source)
    streams.host_waits(streams.copied())  # for timing: the clock stops when the last copy is done
    return copies * len(source) / (time.perf_counter() - start)
