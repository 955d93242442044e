"""The recorder of what programs read and write names kernels that would go wrong on a GPU."""

from __future__ import annotations

import pytest
import torch
from programs import Programs, SharedMemory

pytest.importorskip("triton")

import triton
import triton.language as tl

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted where there is a GPU")


@triton.jit
def _shift(x_ptr, y_ptr, n, by, overlap, BLOCK: tl.constexpr):
    """y[i] = x[i + by]; each program writes `overlap` more than its own."""
    start = tl.program_id(0) * BLOCK
    place = start + tl.arange(0, 2 * BLOCK)
    mine = (place < start + BLOCK + overlap) & (place < n)
    tl.store(y_ptr + place, tl.load(x_ptr + place + by, mask=mine), mask=mine)


@triton.jit
def _first_of_all(x_ptr):
    tl.store(x_ptr + tl.program_id(0), tl.load(x_ptr))


@triton.jit
def _as_bytes(x_ptr, y_ptr):
    """Two bytes a program, as an int16 that begins at every byte."""
    place = tl.program_id(0)
    tl.store((y_ptr + place).to(tl.pointer_type(tl.int16)), tl.load(x_ptr + place).to(tl.int16))


def shift(by: int = 0, overlap: int = 0, n: int = 40) -> None:
    _shift[3,](torch.ones(48)[:40], torch.zeros(48), n, by, overlap, BLOCK=16)


def test_programs_that_keep_to_themselves_pass(triton_ops, recorded):
    shift()
    x = torch.ones(2)
    _first_of_all[1,](x)
    assert recorded.grids == {"test_programs._shift": 3, "test_programs._first_of_all": 1}


@pytest.mark.parametrize("launch, expected", [
    (lambda: shift(overlap=1), r"_shift: program \(0, 0, 0\) and program \(1, 0, 0\) write the same byte"),
    (lambda: shift(by=9), r"_shift: program \(2, 0, 0\) reads 32 bytes that lie in the memory of no single argument"),
    (lambda: shift(by=-1), r"_shift: program \(0, 0, 0\) reads 64 bytes that lie"),
    (lambda: _first_of_all[2,](torch.ones(2)), r"_first_of_all: program \(1, 0, 0\) reads a byte that program"),
    (lambda: _as_bytes[2,](torch.ones(2), torch.zeros(4, dtype=torch.uint8)), "_as_bytes: .* write the same byte"),
    (lambda: _as_bytes[1,](torch.ones(1), torch.zeros(1, dtype=torch.uint8)), "_as_bytes: .* writes 2 bytes that lie"),
])  # fmt: skip
def test_broken_kernels_are_named(launch, expected, triton_ops, recorded):
    with pytest.raises(SharedMemory, match=expected):
        launch()


def test_the_recorder_leaves_nothing_behind(triton_ops):
    with pytest.MonkeyPatch.context() as patch:
        Programs(patch)
    shift(overlap=1)
