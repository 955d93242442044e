"""The kernels' backend with kernels that are never launched: on `meta` it makes what a GPU would hold, and no numbers.

It is fluxq/kernels/triton itself, its outputs, scratch and all. What only CUDA does is put in its place: products that
are summed in fp32 have no factors in fp32, and attention's gradient has what its kernel has beside its outputs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from fluxq.kernels import backend


@contextmanager
def hollow(generation: int = 86) -> Iterator[None]:
    """Inside, every op is hollow, as on a GPU of that generation. Skips the test where there is no Triton."""
    pytest.importorskip("triton")
    from fluxq.kernels.triton import launch, linear, table

    attention = sys.modules["fluxq.kernels.attention"]
    gradient = attention._backward

    def attention_backward(dout: Tensor, q: Tensor, *rest: Tensor | None) -> tuple[Tensor, ...]:
        again = torch.empty_like(dout, memory_format=torch.contiguous_format)
        sums = torch.empty(q.shape, dtype=torch.float32, device=q.device)
        found = gradient(again, q, *rest)
        del sums
        return found

    with (
        patch.object(launch.Launch, "__call__", lambda own, *tensors: None),
        patch.object(table, "generation", lambda device: generation),
        patch.object(
            linear,
            "_mm_fp32",
            lambda a, b, scale=1.0, out=None: (
                a.new_empty(a.shape[0], b.shape[1], dtype=torch.float32) if out is None else out
            ),
        ),
        patch.object(linear, "_scratches", {}),
        patch.object(attention, "_backward", attention_backward),
        backend("triton"),
    ):
        yield
