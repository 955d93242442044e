"""The two lanes that a ring works with: one computes, one copies, and events order them.

Each lane does in order what it is given; between lanes nothing is ordered but by events. `CudaStreams` are those of a
GPU; `Immediate` and `Late` are the two extremes of what timing can do, on the CPU; `Staged` copies through
pinned buffers where the host's memory is not pinned, or where units lie in files. fluxq/offload/clock.py has lanes that
take no time at all.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from fluxq.errors import WrongRequest

T = TypeVar("T")
STAGING = "staging"


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

    def hold(self, held: object) -> None:
        """`held` is freed once all copies so far are over, and not before. The garbage collector may call this in any
        thread, in the midst of anything.
        """
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

    def hold(self, held: object) -> None: ...


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

    def hold(self, held: object) -> None:
        self.host_waits(self.copied())


class CudaStreams:
    """The GPU's current stream computes; one more copies. Compute must stay on one stream."""

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

    def hold(self, held: object) -> None:
        self._copies.synchronize()


class Staged:
    """`streams`, with a thread that brings every piece of a source into one of `buffers` before it is copied on.

    The copy lane is given its work by that thread, in order; so an event of it is a Future, and whoever waits for it
    waits until the thread has got there. An error of the thread's is raised there, and again by all that computes
    later; nothing is being copied then.

    The thread's queue is one that takes work in the midst of taking work, as when a ring is collected just then. Where
    the thread itself collects it, it cannot wait for what it has yet to do: there it does that, and frees it after.
    """

    def __init__(self, streams: Streams, buffers: Collection[Tensor]) -> None:
        self._owner = buffers  # of their memory, perhaps
        self._streams, self._work = streams, SimpleQueue[Callable[[], None] | None]()
        thread = threading.Thread(target=_run_queue, args=(self._work,), name=STAGING, daemon=True)
        thread.start()
        weakref.finalize(self, _stop, self._work, thread)  # at the latest when the program ends
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

    def hold(self, held: object) -> None:
        if threading.current_thread().name == STAGING:
            self._submit(lambda: self._streams.hold(held))
        else:
            drain(self)  # the caller has them meanwhile

    def _submit(self, work: Callable[[], T]) -> Future[T]:
        future = Future[T]()
        self._work.put(partial(self._fulfil, future, work))
        return future

    def _fulfil(self, future: Future[T], work: Callable[[], T]) -> None:
        try:
            future.set_result(self._unless_failed(work))
        except BaseException as error:
            future.set_exception(error)

    def _unless_failed(self, work: Callable[[], T]) -> T:
        if self._failure is None:
            try:
                return work()
            except BaseException as error:
                self._failure = error
                self._streams.host_waits(self._streams.copied())
        if isinstance(self._failure, WrongRequest):
            raise WrongRequest(str(self._failure)) from self._failure
        raise RuntimeError("a weight could not be brought to the GPU") from self._failure


def _run_queue(queue: SimpleQueue[Callable[[], None] | None]) -> None:
    """Do what comes, until None does; nothing of it is kept while nothing comes."""
    while (work := queue.get()) is not None:
        work()
        del work


def _stop(queue: SimpleQueue[Callable[[], None] | None], thread: threading.Thread) -> None:
    """Have the thread end, and wait until it has."""
    queue.put(None)
    if threading.current_thread().name != STAGING:
        thread.join()


def _pieces(source: Bytes) -> tuple[Piece, ...]:
    return source.pieces if isinstance(source, Stored) else (Piece(0, len(source), lambda out: out.copy_(source)),)
