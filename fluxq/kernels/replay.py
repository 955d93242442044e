"""What a block keeps from its forward pass, and how its replay in the backward pass uses that.

A block runs twice: once without gradients, and again in the backward pass with them. In between it keeps its inputs
and, depending on its policy, some inner values. The ops that produce or use such a value refer to it by name:

qkv        queries, keys and values after norm and RoPE      kept by `qk_norm_rope`
attention  attention's output and log-sum-exp                kept by `attention`
residual   the stream between attention and MLP              kept by `gated_add_modulate`
hidden     the MLP's inner layer before GELU                 kept by `gelu_tanh`, optionally in 8 bits

A linear layer's argument `feeds` names the value that its output is used for: if the replay already has that value,
nobody reads the output, so it is not computed. A replay never reads a block's final sum (`end`). Of such a layer only
s = x down^T is needed, for LoRA's gradient, and in 8 bits the scales of the weight's rows; they are kept, s up to
SMALL_RANK.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from .dispatch import ops
from .dropout import current, dropping

POLICIES = {
    "recompute": (),
    "keep_attention": ("attention",),
    "keep_qkv": ("attention", "qkv", "residual"),
    "keep_all8": ("attention", "qkv", "residual", "hidden"),
    "keep_all": ("attention", "qkv", "residual", "hidden"),
}
"""Policy -> what is kept in addition to the inputs, from least memory to least work. keep_all8 keeps `hidden` as int8
rows."""

SMALL_RANK = 32
"""Up to this rank, keeping s adds at most 0.5 % to what keep_all keeps, and saves reading every layer's input again."""

T = TypeVar("T")
_tape: Tape | None = None


class Tape:
    """The values kept between a block's forward pass and its replay, in order.

    `gates`: the gates are trained, so their gradients read what they multiply; then nothing that feeds a gated sum may
    be skipped. What LoRA leaves out (dropout.py) is the same in both.
    """

    def __init__(self, policy: str, gates: bool = False) -> None:
        self.dropped = current()
        self.keeps = set(POLICIES[policy])
        self.unread = self.keeps | {"end"} if not gates else self.keeps - {"residual"}
        self.eight_bits = policy == "keep_all8"
        self.replaying = False
        self.values: dict[str, deque[Any]] = defaultdict(deque)

    @contextmanager
    def record(self) -> Iterator[None]:
        """Inside, ops keep the values that the policy names."""
        with self._running(False):
            yield

    @contextmanager
    def replay(self) -> Iterator[None]:
        """Inside, ops use the kept values instead of computing them, each value once."""
        with self._running(True):
            yield

    @contextmanager
    def _running(self, replaying: bool) -> Iterator[None]:
        global _tape
        before, _tape, self.replaying = _tape, self, replaying
        try:
            with dropping(self.dropped):
                yield
        finally:
            _tape = before


def kept(name: str, compute: Callable[[], T]) -> T:
    """compute(); in a replay that has the value, its result from the forward pass."""
    if _tape is None or name not in _tape.keeps:
        return compute()
    if _tape.replaying:
        return _tape.values[name].popleft()
    value = compute()
    _tape.values[name].append(value)
    return value


def kept_rows(name: str, x: Tensor) -> Tensor:
    """`x` (..., K); in a replay that has the value, `x` from the forward pass: exact, or restored from int8 rows."""
    if _tape is None or not _tape.eight_bits:
        return kept(name, lambda: x)
    values, scale = kept(name, lambda: ops(x).row_quantize(x.flatten(0, -2), torch.int8))
    return ops(x).row_dequantize(values, scale, x.dtype).view(x.shape) if _tape.replaying else x


def unread(feeds: str | None) -> bool:
    """Whether this is a replay in which nobody reads what the value `feeds` is made from."""
    return _tape is not None and _tape.replaying and feeds in _tape.unread


def will_be_unread(feeds: str | None) -> bool:
    """Whether this is a forward pass whose replay will not read what the value `feeds` is made from."""
    return _tape is not None and not _tape.replaying and feeds in _tape.unread


def keep(name: str, value: Any) -> None:
    """Keep a value of a layer whose output the replay will not read."""
    assert _tape is not None
    _tape.values[name].append(value)


def take(name: str) -> Any:
    """The value that the next layer of this replay whose output is not read has kept under that name."""
    assert _tape is not None
    return _tape.values[name].popleft()


def placeholder(*shape: int, like: Tensor) -> Tensor:
    """A tensor of that shape that takes no memory and is NaN, for outputs that nobody reads."""
    return _nan(like.device, like.dtype).expand(shape)


@cache
def _nan(device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.full((), torch.nan, device=device, dtype=dtype)
