"""The two streams that a ring uses: one computes, one copies, and events order them.

Each lane runs its work in order; only events order work on different lanes. `CudaStreams` are those of a GPU;
`Immediate` and `Late` are the two extremes of timing, on the CPU; `Staged` copies through pinned buffers if host memory
is not pinned or if units are in files. fluxq/offload/clock.py has lanes that take no time.
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


class ByteRange(NamedTuple):
    """`length` bytes of a unit from byte `begin` on. `read(out)` fills `out`, flat uint8 on the host, with them."""

    begin: int
    length: int
    read: Callable[[Tensor], Any]


@dataclass(frozen=True)
class Stored:
    """A unit of `length` bytes that is stored in files: each piece is read when it is copied."""

    length: int
    pieces: tuple[ByteRange, ...]

    def __len__(self) -> int:
        return self.length


Bytes = Tensor | Stored
"""A unit on the host: flat uint8, or something that reads it."""


class Streams(Protocol):
    """An event marks all work that its lane had when it was recorded."""

    def copy(self, slot: Tensor, source: Bytes) -> None:
        """The copy lane copies `source` to the start of `slot`, flat uint8."""
        ...

    def copied(self) -> Any:
        """An event of the copy lane."""
        ...

    def computed(self) -> Any:
        """An event of the compute lane."""
        ...

    def copy_waits(self, event: Any) -> None:
        """Later work on the copy lane waits for `event`."""
        ...

    def compute_waits(self, event: Any) -> None:
        """Later work on the compute lane waits for `event`."""
        ...

    def host_waits(self, event: Any) -> None:
        """The caller waits for `event`."""
        ...

    def hold(self, held: object) -> None:
        """Keep `held` until all copies so far are done. The garbage collector may call this in any thread, at any
        moment.
        """
        ...


def drain(streams: Streams) -> None:
    """The caller waits for all copies; only then may their sources and targets be freed."""
    streams.host_waits(streams.copied())


class Immediate:
    """Everything happens at once: copies run as early as possible."""

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
    """Copies run when something waits for them, and no sooner: as late as possible."""

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
    """The GPU's current stream computes; a second one copies. Compute must stay on one stream."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._copies = device, torch.cuda.Stream(device)

    def copy(self, slot: Tensor, source: Bytes) -> None:
        assert isinstance(source, Tensor), "units in files need Staged"
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
    """`streams`, with a thread that loads every piece of a source into one of `buffers` before it is copied on.

    That thread gives the copy lane its work, in order, so an event of that lane is a Future, and waiting for it
    includes waiting for the thread. If the thread fails, the error is raised there, and again in all later waits; no
    copy is running then.

    The thread's queue can be used reentrantly, for when garbage collection drops a ring in the middle of a queue
    operation. If the thread itself collects the ring, it cannot wait for its own later work; it queues the release
    behind that work instead.
    """

    def __init__(self, streams: Streams, buffers: Collection[Tensor]) -> None:
        self._owner = buffers  # may own their memory
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
            self._streams.host_waits(emptied)  # the thread waits until the copy out of this buffer is done
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
            drain(self)  # the caller keeps them until then

    def _submit(self, work: Callable[[], T]) -> Future[T]:
        future = Future[T]()
        self._work.put(partial(self._fulfill, future, work))
        return future

    def _fulfill(self, future: Future[T], work: Callable[[], T]) -> None:
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
        raise RuntimeError("a weight could not be copied to the GPU") from self._failure


def _run_queue(queue: SimpleQueue[Callable[[], None] | None]) -> None:
    """Run queued work until None arrives; keep no reference to it while the queue is empty."""
    while (work := queue.get()) is not None:
        work()
        del work


def _stop(queue: SimpleQueue[Callable[[], None] | None], thread: threading.Thread) -> None:
    """End the thread, and wait until it has ended."""
    queue.put(None)
    if threading.current_thread().name != STAGING:
        thread.join()


def _pieces(source: Bytes) -> tuple[ByteRange, ...]:
    return source.pieces if isinstance(source, Stored) else (ByteRange(0, len(source), lambda out: out.copy_(source)),)
