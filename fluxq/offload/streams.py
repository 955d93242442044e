"""The two lanes that a ring works with: one computes, one copies, and events order them.

Each lane does in order what it is given; between lanes nothing is ordered but by events. `CudaStreams` are those of a
card; `Immediate` and `Late` are the two extremes of what timing can do, on the processor; `Staged` copies through
pinned buffers where the host's memory is not pinned, or where units lie in files. fluxq/offload/clock.py has lanes that
take no time at all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from fluxq.errors import WrongRequest

T = TypeVar("T")


class Piece(NamedTuple):
    """`length` bytes of a unit from its byte `begin` on. `read(out)` fills `out`, flat uint8 on the host, with them."""

    begin: int
    length: int
    read: Callable[[Tensor], Any]


@dataclass(frozen=True)
class Stored:
    """A unit of `length` bytes that lies in files: each of its pieces is read when it is copied."""

    length: int
    pieces: tuple[Piece, ...]

    def __len__(self) -> int:
        return self.length


Bytes = Tensor | Stored
"""A unit on the host: flat uint8, or what reads it."""


class Streams(Protocol):
    """An event stands for all that its lane had been given when it was recorded."""

    def copy(self, slot: Tensor, source: Bytes) -> None:
        """The copy lane copies `source` to the beginning of `slot`, flat uint8."""
        ...

    def copied(self) -> Any:
        """An event of the copy lane."""
        ...

    def computed(self) -> Any:
        """An event of the compute lane."""
        ...

    def copy_waits(self, event: Any) -> None:
        """What the copy lane is given from now on waits for `event`."""
        ...

    def compute_waits(self, event: Any) -> None:
        """What the compute lane is given from now on waits for `event`."""
        ...

    def host_waits(self, event: Any) -> None:
        """The caller waits for `event`."""
        ...


def drain(streams: Streams) -> None:
    """The caller waits for all copies: what they read and write may be freed after this, and not before."""
    streams.host_waits(streams.copied())


class Immediate:
    """Everything is done at once: copies as early as they can be."""

    def copy(self, slot: Tensor, source: Bytes) -> None:
        for begin, length, read in _pieces(source):
            read(slot[begin : begin + length])

    def copied(self) -> None: ...

    def computed(self) -> None: ...

    def copy_waits(self, event: None) -> None: ...

    def compute_waits(self, event: None) -> None: ...

    def host_waits(self, event: None) -> None: ...


class Late(Immediate):
    """Copies are done when they are waited for, and no sooner: as late as they can be."""

    def __init__(self) -> None:
        self._queue: deque[tuple[Tensor, Bytes]] = deque()
        self._enqueued = self._done = 0

    def copy(self, slot: Tensor, source: Bytes) -> None:
        self._queue.append((slot, source))
        self._enqueued += 1

    def copied(self) -> int:
        return self._enqueued

    def compute_waits(self, event: int) -> None:
        while self._done < event:
            super().copy(*self._queue.popleft())
            self._done += 1

    def host_waits(self, event: int) -> None:
        self.compute_waits(event)


class CudaStreams:
    """The card's current stream computes; one more copies. Compute must stay on one stream."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._copies = device, torch.cuda.Stream(device)

    def copy(self, slot: Tensor, source: Bytes) -> None:
        assert isinstance(source, Tensor), "what lies in files is staged"
        with torch.cuda.stream(self._copies), torch.no_grad():
            slot[: len(source)].copy_(source, non_blocking=True)

    def copied(self) -> Any:
        return self._copies.record_event()

    def computed(self) -> Any:
        return torch.cuda.current_stream(self._device).record_event()

    def copy_waits(self, event: torch.cuda.Event) -> None:
        self._copies.wait_event(event)

    def compute_waits(self, event: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self._device).wait_event(event)

    def host_waits(self, event: torch.cuda.Event) -> None:
        event.synchronize()


class Staged:
    """`streams`, with a thread that brings every piece of a source into one of `buffers` before it is copied on.

    The copy lane is given its work by that thread, in order; so an event of it is a Future, and whoever waits for it
    waits until the thread has got there. An error of the thread's is raised there, and again by all that computes
    later; nothing is being copied then.
    """

    def __init__(self, streams: Streams, buffers: Collection[Tensor]) -> None:
        self._owner = buffers  # of their memory, perhaps
        self._streams, self._worker = streams, ThreadPoolExecutor(1, thread_name_prefix="staging")
        self._buffers: deque[tuple[Tensor, Any]] = deque((buffer, None) for buffer in buffers)
        self._failure: BaseException | None = None

    def copy(self, slot: Tensor, source: Bytes) -> None:
        for piece in _pieces(source):
            self._submit(lambda piece=piece: self._copy(slot, *piece))

    def _copy(self, slot: Tensor, begin: int, length: int, read: Callable[[Tensor], Any]) -> None:
        buffer, emptied = self._buffers.popleft()
        if emptied is not None:
            self._streams.host_waits(emptied)  # the thread waits until the copy out of this buffer has been done
        read(staged := buffer[:length])
        self._streams.copy(slot[begin:], staged)
        self._buffers.append((buffer, self._streams.copied()))

    def copied(self) -> Future[Any]:
        return self._submit(self._streams.copied)

    def computed(self) -> Any:
        return self._streams.computed()

    def copy_waits(self, event: Any) -> None:
        self._submit(lambda: self._streams.copy_waits(event))

    def compute_waits(self, event: Future[Any]) -> None:
        self._streams.compute_waits(event.result())

    def host_waits(self, event: Future[Any]) -> None:
        if event.exception() is None:
            self._streams.host_waits(event.result())

    def _submit(self, work: Callable[[], T]) -> Future[T]:
        return self._worker.submit(self._unless_failed, work)

    def _unless_failed(self, work: Callable[[], T]) -> T:
        if self._failure is None:
            try:
                return work()
            except BaseException as error:
                self._failure = error
                self._streams.host_waits(self._streams.copied())
        if isinstance(self._failure, WrongRequest):
            raise WrongRequest(str(self._failure)) from self._failure
        raise RuntimeError("a weight could not be brought to the card") from self._failure


def _pieces(source: Bytes) -> tuple[Piece, ...]:
    return source.pieces if isinstance(source, Stored) else (Piece(0, len(source), lambda out: out.copy_(source)),)
