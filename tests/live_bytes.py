"""How many bytes tensors take while code runs: the peak that a GPU would see, counted on any machine.

`LiveBytes` watches every operator (a TorchDispatchMode) and follows the storages that come out of them by weak
references, each once, however many views it has. A storage counts from the operator that made it until its last tensor
is gone, so the number depends on no allocator, on no page cache, and on no sampling.

Tensors on `meta` have sizes and no contents: there the code of a full-size model runs in seconds, and what stays on the
host is told apart. Every storage has an owner, so that the peak is known by owner too. Not seen are the workspace
inside one operator (a convolution's, a matrix product's) and what an allocator loses between blocks. Attention is one
operator on a GPU and on a CPU; meta takes it apart into products and a softmax, and its whole table of scores
counts: an upper bound.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from itertools import accumulate

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors on `device` (all where None) that are made inside, and of `before`, which were made
    before. `live` is what there is, `peak` the most there was at once, both in bytes.

    Other tensors that were made outside are never counted, whatever views of them are taken inside. A storage belongs
    to nobody ("") until `belongs` says to whom; that may be said after the peak.
    """

    def __init__(self, before: Iterable[Tensor] = (), device: str | None = None) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._device = device
        self._known: dict[int, weakref.ref[UntypedStorage]] = {}  # by their address, those from outside too
        self._numbers: dict[int, int] = {}  # address -> number, of the storages that count and are there
        self._sizes: list[int] = []  # by number, of all that were ever there, as of now
        self._owners: list[str] = []
        self._changes: list[tuple[int, int]] = []  # (number, bytes more), since the peak was reset
        for tensor in before:
            self._meet(tensor, counts=True)

    def reset_peak(self) -> None:
        """Measure the peak from here on."""
        self.peak = self.live
        self._changes = [(number, self._sizes[number]) for number in self._numbers.values()]

    def belongs(self, owner: str, tensors: Iterable[Tensor] | None = None) -> None:
        """The storages of `tensors` belong to `owner`; without tensors all that are there and belong to nobody."""
        if tensors is None:
            numbers = [number for number in self._numbers.values() if not self._owners[number]]
        else:
            keys = {tensor.untyped_storage()._cdata for tensor in tensors}
            numbers = [self._numbers[key] for key in keys if key in self._numbers]
        for number in numbers:
            self._owners[number] = owner

    def peak_by_owner(self) -> dict[str, int]:
        """Owner -> bytes at the moment of the peak, the first if there were several."""
        totals = [*accumulate(more for _, more in self._changes)]
        found: Counter[str] = Counter()
        for number, more in self._changes[: totals.index(max(totals)) + 1] if totals else ():
            found[self._owners[number]] += more
        return {owner: nbytes for owner, nbytes in found.items() if nbytes}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op is not torch.ops.aten.lift_fresh.default:  # its argument is what torch.tensor has just made
            self._meet_all(args, counts=False)
            if kwargs:
                self._meet_all(kwargs.values(), counts=False)
        result = op(*args, **(kwargs or {}))
        self._meet_all((result,), counts=True)
        return result

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing here is compiled, and the guard against it takes a quarter of the time."""
        return False

    def _meet_all(self, values: Iterable[object], counts: bool) -> None:
        for value in values:
            if isinstance(value, Tensor):
                self._meet(value, counts)
            elif isinstance(value, (tuple, list)):
                self._meet_all(value, counts)

    def _meet(self, tensor: Tensor, counts: bool) -> None:
        if tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            self._known[key] = weakref.ref(storage, lambda _: self._forget(key))
            if counts and self._device in (None, tensor.device.type):
                self._numbers[key] = len(self._sizes)
                self._sizes.append(0)
                self._owners.append("")
        if key in self._numbers:  # its size may have changed, as that of an empty `out=` does
            self._change(self._numbers[key], storage.nbytes())

    def _forget(self, key: int) -> None:
        del self._known[key]
        if key in self._numbers:
            self._change(self._numbers.pop(key), 0)

    def _change(self, number: int, nbytes: int) -> None:
        if more := nbytes - self._sizes[number]:
            self._sizes[number] = nbytes
            self._changes.append((number, more))
            self.live += more
            self.peak = max(self.peak, self.live)
