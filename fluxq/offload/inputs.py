"""Block inputs that are kept in host memory between the forward and the backward pass.

During the forward pass, a second stream copies each block's inputs to the host, and their GPU memory is released.
During the backward pass they are fetched ahead of the block that needs them. In addition to the inputs in use, those of
`BUFFERS` more blocks may be on the GPU, in transit; the planner counts on that.

The GPU memory is torch's, which reuses what the compute stream has released for whatever that stream does next. Hence
two rules, which all waits here follow: what the second stream reads or writes is released only after the compute stream
has waited for it, and the second stream writes only to memory that is newer than all compute issued before. So nothing
depends on how far ahead the host runs. (With `record_stream` the peak would: it frees when the host happens to check.)

Only the second stream touches the host buffers. It runs in order, so they are written and read in order.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from fluxq.console import Notify

from .arena import ALIGNMENT, Arena
from .costs import BUFFERS
from .streams import CudaStreams, Immediate, Streams, drain

T = TypeVar("T")
INPUTS = "inputs"


class Transit(Generic[T]):
    """Decides when block inputs are copied each way, and when compute waits for the copies.

    `HostInputs` follows these rules with tensors; the planner's simulation.py follows them with byte counts.
    `T` identifies one block's inputs. Subclasses make the copies and return an event for each.
    """

    def __init__(self) -> None:
        self._on_gpu: dict[T, Any] = {}  # inputs -> event of their last copy; the oldest first

    def to_host(self, inputs: T) -> None:
        """Call this before the block of `inputs` runs forward."""
        self._on_gpu[inputs] = self._copy_to_host(inputs)
        while len(self._on_gpu) > 1 + BUFFERS:
            self._release(next(iter(self._on_gpu)))

    def to_gpu(self, stored: Sequence[T | None], number: int) -> None:
        """Call this before the block of `stored[number]` runs backward.

        `stored`: the inputs of a pass in forward order, None for those already taken.
        """
        for inputs in reversed(stored[max(0, number - BUFFERS) : number + 1]):
            if inputs is not None and inputs not in self._on_gpu:
                self._on_gpu[inputs] = self._copy_to_gpu(inputs)
        self._wait(stored[number])

    def _release(self, inputs: T) -> None:
        """Release the GPU memory of `inputs`: compute(i) waits until store(i - 1 - BUFFERS) is done with it."""
        self._wait(inputs)

    def _wait(self, inputs: T | None) -> None:
        assert inputs is not None, "already taken"
        self._compute_waits(self._on_gpu.pop(inputs))

    def _copy_to_host(self, inputs: T) -> Any:
        raise NotImplementedError

    def _copy_to_gpu(self, inputs: T) -> Any:
        raise NotImplementedError

    def _compute_waits(self, event: Any) -> None:
        raise NotImplementedError


class _Stored:
    """One block's inputs: in `host`, and until they are released also on the GPU, flat, in `gpu`."""

    def __init__(self, tensors: Sequence[Tensor], host: Arena, free: list[Arena]) -> None:
        self.forms = [(t.shape, t.dtype) for t in tensors]
        self.device, self.places, end = tensors[0].device, list[slice](), 0
        for tensor in tensors:
            self.places.append(slice(end, end + tensor.nbytes))
            end = _up(end + tensor.nbytes)
        self.host = host[INPUTS][:end]
        self.gpu: list[Tensor] | None = [t.detach().contiguous().flatten().view(torch.uint8) for t in tensors]
        self.return_buffer = weakref.finalize(self, free.append, host)  # at the latest when its pass is abandoned

    def tensors(self) -> list[Tensor]:
        assert self.gpu is not None, "on the GPU"
        return [flat.view(dtype).view(shape) for flat, (shape, dtype) in zip(self.gpu, self.forms, strict=True)]


class HostInputs(Transit[_Stored]):
    """Keeps the inputs of a model's blocks in host memory. `streams` are its own; its copies go both ways.

    buffer(nbytes) allocates on the host. Every pass uses the buffers again; they grow when a batch has more tokens.
    `poison` fills what is released, on the GPU and on the host, with 0xFF (NaN in every float format).
    """

    def __init__(self, streams: Streams, buffer: Callable[[int], Arena], poison: bool = False) -> None:
        super().__init__()
        self._streams, self._buffer, self._poison = streams, buffer, poison
        self._free: list[Arena] = []
        weakref.finalize(self, streams.hold, (self._free, self._on_gpu)).atexit = False

    @property
    def refused(self) -> str | None:
        """Why the driver has not pinned a buffer that is free now; None if it has pinned all."""
        return next((buffer.refused for buffer in self._free if buffer.refused), None)

    def begin(self) -> Pass:
        """A forward pass; its blocks store their inputs in it."""
        self.release()
        return Pass(self)

    def release(self) -> None:
        """Release what is left on the GPU, after a pass that failed or that never ran backward."""
        while self._on_gpu:
            self._release(next(iter(self._on_gpu)))

    def store(self, tensors: Sequence[Tensor]) -> _Stored:
        stored = _Stored(tensors, self._buffer_of(sum(_up(t.nbytes) for t in tensors)), self._free)
        self.to_host(stored)
        return stored

    def take(self, stored: Sequence[_Stored | None], number: int) -> list[Tensor]:
        """The inputs `stored[number]`, on the GPU; they are the caller's now."""
        self.to_gpu(stored, number)  # compute(i) waits until fetch(i) has arrived, or store(i) has left
        taken = stored[number]
        assert taken is not None
        if self._poison:
            taken.host.fill_(0xFF)
        taken.return_buffer()
        return taken.tensors()

    def _copy_to_host(self, inputs: _Stored) -> Any:
        self._streams.copy_waits(self._streams.computed())  # store(i) waits until compute(i - 1) has made it
        for place, flat in zip(inputs.places, inputs.gpu or (), strict=True):
            self._streams.copy(inputs.host[place], flat)
        return self._streams.copied()

    def _copy_to_gpu(self, inputs: _Stored) -> Any:
        flat = torch.empty(len(inputs.host), dtype=torch.uint8, device=inputs.device)
        self._streams.copy_waits(self._streams.computed())  # fetch(i) waits until compute has left that memory
        self._streams.copy(flat, inputs.host)
        inputs.gpu = [flat[place] for place in inputs.places]
        return self._streams.copied()

    def _compute_waits(self, event: Any) -> None:
        self._streams.compute_waits(event)

    def _release(self, inputs: _Stored) -> None:
        super()._release(inputs)
        for flat in inputs.gpu or () if self._poison else ():
            flat.fill_(0xFF)
        inputs.gpu = None

    def _buffer_of(self, nbytes: int) -> Arena:
        """A buffer of at least that length: a free one, or a new one in place of the free ones, all too short."""
        for number, buffer in enumerate(self._free):
            if buffer.nbytes >= nbytes:
                return self._free.pop(number)
        if self._free:
            drain(self._streams)  # the host frees them once the second stream is done with them
        while self._free:
            self._free.pop().close()
        return self._buffer(nbytes)


class Pass:
    """What one forward pass stores for its backward pass."""

    def __init__(self, owner: HostInputs) -> None:
        self._owner, self._stored = owner, list[_Stored | None]()

    def store(self, tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        """Send the inputs of the block that runs next to the host. Returns a function that brings them back, once: call
        it before that block's backward pass, and drop its result after.
        """
        self._stored.append(self._owner.store(tensors))
        return partial(self._take, len(self._stored) - 1)

    def _take(self, number: int) -> list[Tensor]:
        if self._stored[number] is None:
            raise RuntimeError("a block's inputs were already fetched from the host; a pass can run backward only once")
        tensors = self._owner.take(self._stored, number)
        self._stored[number] = None
        return tensors


def inputs_for(
    device: torch.device, notify: Notify, through: Callable[[Streams], Streams] = lambda streams: streams
) -> HostInputs:
    """For a model on `device`. If the driver refuses to pin memory for it, `notify` gets one warning: copies are slow
    then. `through` may wrap its streams.
    """
    if device.type != "cuda":
        return HostInputs(through(Immediate()), _buffer)
    return HostInputs(through(CudaStreams(device)), PinnedBuffers(notify))


class PinnedBuffers:
    """Allocates host buffers that the driver pins, until it refuses one; cudart: see Arena.pin."""

    def __init__(self, notify: Notify, cudart: Any = None) -> None:
        self._notify, self._cudart, self._refused = notify, cudart, False

    def __call__(self, nbytes: int) -> Arena:
        buffer = _buffer(nbytes)
        if not self._refused and (failure := buffer.pin(self._cudart)):
            self._refused = True
            self._notify(f"block inputs are kept in memory that is not pinned, so compute waits for copies: {failure}")
        return buffer


def _buffer(nbytes: int) -> Arena:
    return Arena({INPUTS: nbytes}, lambda unit, out: None)


def _up(n: int) -> int:
    return -(-n // ALIGNMENT) * ALIGNMENT
