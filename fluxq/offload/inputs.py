"""Inputs of blocks that wait on the host from the forward pass to the backward pass.

While a pass goes forward, each block's inputs are copied to the host on a second lane and their memory on the GPU is
given up; on the way back they are brought ahead of the block that needs them. Beside the inputs in use, those of
`BUFFERS` more blocks may be on the GPU, on their way: so the planner counts.

Memory on the GPU is torch's, which hands what the compute lane has let go to whatever that lane is given next. Two
rules follow, and all waits here keep to them: what the second lane reads or writes is let go once the compute lane has
waited for it, and the second lane writes to memory that is new after all that compute had been given before. So nothing
depends on the host's pace; with `record_stream`, which frees when the host happens to look, the peak would.

Only the second lane touches the buffers on the host. It works in order, so there they are written and read in order.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .arena import ALIGNMENT, Arena
from .costs import BUFFERS
from .streams import CudaStreams, Immediate, Streams, drain

INPUTS = "inputs"


class _Waiting:
    """One block's inputs: in `host`, and until they are let go also on the GPU, flat, in `gpu`.

    `passed` is an event: the last copy from or to the GPU has been made.
    """

    def __init__(self, tensors: Sequence[Tensor], host: Arena, free: list[Arena]) -> None:
        self.forms = [(t.shape, t.dtype) for t in tensors]
        self.device, self.places, end = tensors[0].device, list[slice](), 0
        for tensor in tensors:
            self.places.append(slice(end, end + tensor.nbytes))
            end = _up(end + tensor.nbytes)
        self.host = host[INPUTS][:end]
        self.gpu: list[Tensor] | None = [t.detach().contiguous().flatten().view(torch.uint8) for t in tensors]
        self.passed: Any = None
        self.give_back = weakref.finalize(self, free.append, host)  # at the latest when its pass is given up

    def tensors(self) -> list[Tensor]:
        assert self.gpu is not None, "on the GPU"
        return [flat.view(dtype).view(shape) for flat, (shape, dtype) in zip(self.gpu, self.forms, strict=True)]


class HostInputs:
    """Where the inputs of a model's blocks wait. `streams` are its own; its copies go both ways.

    buffer(nbytes) allocates on the host. Buffers are used again in every pass, and grow where a batch has more tokens.
    `poison` fills with 0xFF (NaN in every float format) what is given up, on the GPU and on the host.
    """

    def __init__(self, streams: Streams, buffer: Callable[[int], Arena], poison: bool = False) -> None:
        self._streams, self._buffer, self._poison = streams, buffer, poison
        self._free: list[Arena] = []
        self._on_gpu: deque[_Waiting] = deque()  # they lie there until compute has waited for their copies
        weakref.finalize(self, streams.hold, (self._free, self._on_gpu)).atexit = False

    def begin(self) -> Pass:
        """A pass forward, whose blocks are to store their inputs in it."""
        self.settle()
        return Pass(self)

    def settle(self) -> None:
        """Give up what is left on the GPU: a pass that failed or was never gone back through leaves some."""
        while self._on_gpu:
            self._let_go(self._on_gpu[0])

    def store(self, tensors: Sequence[Tensor]) -> _Waiting:
        waiting = _Waiting(tensors, self._buffer_of(sum(_up(t.nbytes) for t in tensors)), self._free)
        self._streams.copy_waits(self._streams.computed())  # store(i) waits until compute(i - 1) has made it
        for place, flat in zip(waiting.places, waiting.gpu or (), strict=True):
            self._streams.copy(waiting.host[place], flat)
        self._travels(waiting)
        while len(self._on_gpu) > 1 + BUFFERS:
            self._let_go(self._on_gpu[0])
        return waiting

    def fetch(self, waiting: _Waiting) -> None:
        """Have `waiting` on the GPU, or on its way."""
        if waiting.gpu is None:
            flat = torch.empty(len(waiting.host), dtype=torch.uint8, device=waiting.device)
            self._streams.copy_waits(self._streams.computed())  # fetch(i) waits until compute has left that memory
            self._streams.copy(flat, waiting.host)
            waiting.gpu = [flat[place] for place in waiting.places]
            self._travels(waiting)

    def take(self, waiting: _Waiting) -> list[Tensor]:
        """The inputs, fetched before; they are the caller's now."""
        self._on_gpu.remove(waiting)
        self._streams.compute_waits(waiting.passed)  # compute(i) waits until fetch(i) has arrived, or store(i) has left
        if self._poison:
            waiting.host.fill_(0xFF)
        waiting.give_back()
        return waiting.tensors()

    def _travels(self, waiting: _Waiting) -> None:
        waiting.passed = self._streams.copied()
        self._on_gpu.append(waiting)

    def _let_go(self, waiting: _Waiting) -> None:
        self._on_gpu.remove(waiting)
        self._streams.compute_waits(waiting.passed)  # compute(i) waits until store(i - 1 - BUFFERS) has left its memory
        for flat in waiting.gpu or () if self._poison else ():
            flat.fill_(0xFF)
        waiting.gpu = None

    def _buffer_of(self, nbytes: int) -> Arena:
        """A buffer of at least that length: one that is free, or a new one, in place of all that are free and too
        short.
        """
        for number, buffer in enumerate(self._free):
            if buffer.nbytes >= nbytes:
                return self._free.pop(number)
        if self._free:
            drain(self._streams)  # the host frees them when the second lane has left them
        while self._free:
            self._free.pop().close()
        return self._buffer(nbytes)


class Pass:
    """What one pass forward stores, for the one back through it."""

    def __init__(self, owner: HostInputs) -> None:
        self._owner, self._stored = owner, list[_Waiting | None]()

    def store(self, tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        """Send the inputs of the block that runs next to the host. What comes back gives them back, once: call it
        before that block's backward pass, and let go of them after.
        """
        self._stored.append(self._owner.store(tensors))
        return partial(self._take, len(self._stored) - 1)

    def _take(self, number: int) -> list[Tensor]:
        stored, first = self._stored[number], max(0, number - BUFFERS)
        if stored is None:
            raise RuntimeError("a block's inputs came back from the host already; a pass can be gone back through once")
        for ahead in reversed(self._stored[first : number + 1]):
            if ahead is not None:
                self._owner.fetch(ahead)
        self._stored[number] = None
        return self._owner.take(stored)


def inputs_for(
    device: torch.device,
    notify: Callable[[str], None],
    through: Callable[[Streams], Streams] = lambda streams: streams,
) -> HostInputs:
    """For a model on `device`. Where the driver pins no memory for it, that is said, once: copies are slow then.
    `through` may put something between it and its streams.
    """
    if device.type != "cuda":
        return HostInputs(through(Immediate()), _buffer)
    return HostInputs(through(CudaStreams(device)), PinnedBuffers(notify))


class PinnedBuffers:
    """Allocates buffers on the host that the driver pins, until it refuses one; cudart: see Arena.pin."""

    def __init__(self, notify: Callable[[str], None], cudart: Any = None) -> None:
        self._notify, self._cudart, self._refused = notify, cudart, False

    def __call__(self, nbytes: int) -> Arena:
        buffer = _buffer(nbytes)
        if not self._refused and (failure := buffer.pin(self._cudart)):
            self._refused = True
            self._notify(f"inputs of blocks wait in memory that is not pinned, and compute waits for them: {failure}")
        return buffer


def _buffer(nbytes: int) -> Arena:
    return Arena({INPUTS: nbytes}, lambda unit, out: None)


def _up(n: int) -> int:
    return -(-n // ALIGNMENT) * ALIGNMENT
