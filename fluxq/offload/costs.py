"""What training a model costs, in numbers: the table that the planner reads.

Bytes and FLOPs per unit (what is swapped together) and per block (what runs as one, forward and backward). Nothing here
knows the model; fluxq/model/costs.py fills in the table for FLUX.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import NamedTuple

OWNERS: tuple[str, ...] = ("weights", "slots", "lora", "optimizer", "activations", "workspace")
"""What the bytes are for. weights: frozen ones that stay on the GPU; slots: for streamed ones; lora: the LoRA's weights
and gradients; activations: kept for the backward pass; workspace: everything temporary."""

BUFFERS = 2
"""How many blocks' inputs may be on the GPU in transit to or from the host, in addition to those of the running block.
"""


class Matmul(NamedTuple):
    """A matrix product of `flops` in `kind` ("bf16", "int8", "fp8") with so many rows and columns of results."""

    kind: str
    rows: int
    columns: int
    flops: float


@dataclass(frozen=True)
class Work:
    """What a GPU has to do. bf16, int8, fp8: FLOPs of matrix products; attention and attention_backward: FLOPs of
    attention, in bf16; moved: bytes read and written by memory-bound ops; products: those of the matrix products that
    are large enough to fill the GPU, more or less.
    """

    bf16: float = 0.0
    int8: float = 0.0
    fp8: float = 0.0
    attention: float = 0.0
    attention_backward: float = 0.0
    moved: float = 0.0
    products: tuple[Matmul, ...] = ()

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def flops(self) -> float:
        return self.bf16 + self.int8 + self.fp8 + self.attention + self.attention_backward


@dataclass(frozen=True)
class PolicyCost:
    """What one policy costs in one block.

    kept: bytes kept from the forward to the backward pass, including the block's inputs. replay: the work of
    recomputation. forward_peak, backward_peak: the block's most bytes at once while it runs, including what it keeps,
    its inputs and the incoming gradients. exact: whether everything is kept without rounding. launches: kernels of the
    block, forward and backward.
    """

    kept: int
    replay: Work
    forward_peak: int
    backward_peak: int
    exact: bool = True
    launches: int = 0


@dataclass(frozen=True)
class BlockCost:
    """What runs as one. A block without policies has no backward pass: nothing before it is trained.

    inputs: bytes of the incoming streams, which can be kept on the host in between. gradients: bytes of the gradients
    of its trained weights, from its backward pass to the end of the step. launches: kernels of the forward pass, for a
    block without policies.
    """

    name: str
    units: tuple[str, ...]
    forward: Work
    forward_peak: int
    inputs: int = 0
    gradients: int = 0
    backward: Work = Work()
    policies: Mapping[str, PolicyCost] = field(default_factory=dict)
    launches: int = 0

    def launched(self, policy: str) -> int:
        """The kernels of a step in this block."""
        return self.policies[policy].launches if policy else self.launches


class Fragmentation(NamedTuple):
    """How many bytes more than are alive torch's allocator reserves: some, and a fraction of what a step allocates."""

    nbytes: int = 0
    fraction: float = 0.0


@dataclass(frozen=True)
class Costs:
    """One way of holding and multiplying a model's weights, for one batch of images.

    units: bytes of each unit, in the order of the forward pass; if not `streams`, all of them stay on the GPU. ahead:
    bytes of each unit whose results are computed for `window` steps at once, apart from the blocks; the results of one
    step take `ahead_step` bytes, and computing them `ahead_peak`. stays: frozen bytes that are always on the GPU; lora,
    gradients and optimizer: trained weights, gradients outside the blocks, the optimizer's state; scratch: workspace
    that is held all the time; library: cuBLAS's own. outside: the step's work outside the blocks; optimizer_peak:
    temporary bytes of the optimizer's step. accumulates: gradients of an earlier forward pass exist. tiles: rows that
    the autoencoder processes at a time (None: all) and its peak bytes, from fast to lean. fragmentation: of steps.
    launches: kernels of a step outside the blocks. error: relative, of the weights as they are stored and multiplied;
    smaller is more accurate.
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
    library: int = 0
    outside: Work = Work()
    accumulates: bool = False
    tiles: tuple[tuple[int | None, int], ...] = ()
    fragmentation: Fragmentation = Fragmentation()
    launches: int = 0
    about: Mapping[str, object] = field(default_factory=dict)

    @property
    def slot(self) -> int:
        """The bytes of a slot: those of the largest streamed unit."""
        return max((*self.units.values(), *self.ahead.values()), default=0)
