"""How many bytes tensors take while code runs: the peak that a card would see, counted on any machine.

`LiveBytes` watches every operator (a TorchDispatchMode) and follows the storages that come out of them by weak
references, each once, however many views it has. A storage counts from the operator that made it until its last tensor
is gone, so the number depends on no allocator, on no page cache, and on no sampling.

Tensors on `meta` have sizes and no contents: there the code of a full-size model runs in seconds, and what stays on the
host is told apart. Not seen are the workspace inside one operator (a convolution's, a matrix product's) and what an
allocator loses between blocks. Attention is one operator on a card and on a processor; meta takes it apart into
products and a softmax, and its whole table of scores counts: an upper bound.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors on `device` (all where None) that are made inside, and of `before`, which were made
    before. `live` is what there is, `peak` the most there was at once, both in bytes.

    Other tensors that were made outside are never counted, whatever views of them are taken inside.
    """

    def __init__(self, before: Iterable[Tensor] = (), device: str | None = None) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._device = device
        self._sizes: dict[int, int] = {}  # of the storages that count, by their address
        self._known: dict[int, weakref.ref[UntypedStorage]] = {}  # of all, those from outside too
        for tensor in before:
            self._meet(tensor, counts=True)

    def reset_peak(self) -> None:
        """Measure the peak from here on."""
        self.peak = self.live

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op is not torch.ops.aten.lift_fresh.default:  # its argument is what torch.tensor has just made
            for tensor in tree_leaves((args, kwargs)):
                self._meet(tensor, counts=False)
        result = op(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            self._meet(tensor, counts=True)
        return result

    def _meet(self, tensor: object, counts: bool) -> None:
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            self._known[key] = weakref.ref(storage, lambda _: self._forget(key))
            if counts and self._device in (None, tensor.device.type):
                self._sizes[key] = 0
        if key in self._sizes:  # its size may have changed, as that of an empty `out=` does
            self.live += storage.nbytes() - self._sizes[key]
            self._sizes[key] = storage.nbytes()
            self.peak = max(self.peak, self.live)

    def _forget(self, key: int) -> None:
        del self._known[key]
        self.live -= self._sizes.pop(key, 0)
