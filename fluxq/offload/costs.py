"""What training a model costs, as numbers: the table that a planner reads.

Bytes and FLOPs per unit (what is swapped together) and per block (what runs as one, forward and backward). Nothing here
knows which model it is; fluxq/model/costs.py fills the table in for FLUX.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

OWNERS: tuple[str, ...] = ("weights", "slots", "lora", "optimizer", "activations", "workspace")
"""Whose bytes they are. weights: frozen ones that stay on the GPU; slots: those that pass through; lora: its weights
and gradients; activations: what is kept for the backward pass; workspace: all that comes and goes."""

BUFFERS = 2
"""Block inputs that may be on the GPU while they travel to the host or back, beside those of the block that runs."""


@dataclass(frozen=True)
class Work:
    """What a GPU has to do. bf16, int8, fp8: FLOPs of matrix products; attention and attention_backward: FLOPs of
    attention, in bf16; moved: bytes read and written by what waits for memory alone.
    """

    bf16: float = 0.0
    int8: float = 0.0
    fp8: float = 0.0
    attention: float = 0.0
    attention_backward: float = 0.0
    moved: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def flops(self) -> float:
        return self.bf16 + self.int8 + self.fp8 + self.attention + self.attention_backward


@dataclass(frozen=True)
class PolicyCost:
    """What one policy costs in one block.

    kept: bytes from the forward pass to the backward pass, the block's inputs among them. replay: what is computed
    again. forward_peak, backward_peak: the most bytes of the block at once while it runs, what it keeps, its inputs and
    the gradients that come in among them. exact: it rounds nothing of what it keeps.
    """

    kept: int
    replay: Work
    forward_peak: int
    backward_peak: int
    exact: bool = True


@dataclass(frozen=True)
class BlockCost:
    """What runs as one. A block with no policy has no backward pass: nothing before it is trained.

    inputs: bytes of the streams that come in, which can go to the host meanwhile. gradients: bytes of the gradients of
    its trained weights, there from its backward pass to the end of the step.
    """

    name: str
    units: tuple[str, ...]
    forward: Work
    forward_peak: int
    inputs: int = 0
    gradients: int = 0
    backward: Work = Work()
    policies: Mapping[str, PolicyCost] = field(default_factory=dict)


@dataclass(frozen=True)
class Costs:
    """One way of holding and multiplying a model's weights, for one batch of images.

    units: bytes of each unit, in the order in which the forward pass needs them; not `streams`: all of them stay.
    ahead: bytes of each unit whose results are computed for `window` steps at once, apart from the blocks; a step's
    results take `ahead_step` bytes, and computing them `ahead_peak`.
    stays: frozen bytes that are always on the GPU; lora, gradients and optimizer: trained weights, gradients outside
    the blocks, the optimizer's state; scratch: workspace held all the time. outside: the step's work outside the
    blocks, and `optimizer_peak` the bytes that come and go in the optimizer's step. accumulates: gradients of an
    earlier forward pass are there. tiles: rows that the autoencoder works on at a time (None: all) and its most bytes,
    from fast to lean. error: of the weights as they are stored and multiplied, relative; the smaller, the more
    faithful.
    """

    format: str
    compute: str
    error: float
    units: Mapping[str, int]
    blocks: tuple[BlockCost, ...]
    ahead: Mapping[str, int] = field(default_factory=dict)
    ahead_step: int = 0
    ahead_peak: int = 0
    window: int = 0
    streams: bool = True
    stays: int = 0
    lora: int = 0
    gradients: int = 0
    optimizer: int = 0
    optimizer_peak: int = 0
    scratch: int = 0
    outside: Work = Work()
    accumulates: bool = False
    tiles: tuple[tuple[int | None, int], ...] = ()
    about: Mapping[str, object] = field(default_factory=dict)

    @property
    def slot(self) -> int:
        """The bytes of a slot: those of the largest unit that passes through."""
        return max((*self.units.values(), *self.ahead.values()), default=0)
