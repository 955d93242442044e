"""8-bit numbers by integer arithmetic, compared bit for bit with PyTorch's conversions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from fluxq.kernels.triton import bits
from fluxq.kernels.triton.bits import e4m3_decode, e4m3_encode, int8_decode, int8_encode

pytestmark = pytest.mark.usefixtures("triton_ops")


@triton.jit
def apply(x_ptr, y_ptr, n, FUNCTION: tl.constexpr):
    at = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    tl.store(y_ptr + at, FUNCTION(tl.load(x_ptr + at, mask=at < n, other=0)), mask=at < n)


def applied(function, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    apply[(triton.cdiv(x.numel(), 1024),)](x, y, x.numel(), FUNCTION=function)
    return y


def test_every_e4m3_number_is_decoded(device):
    byte = torch.arange(256, dtype=torch.uint8, device=device)
    expected = byte.view(torch.float8_e4m3fn).float()
    numbers = ~expected.isnan()
    assert torch.equal(applied(e4m3_decode, byte, torch.float32)[numbers], expected[numbers])


def test_every_int8_number_is_decoded(device):
    byte = torch.arange(256, dtype=torch.uint8, device=device)
    assert torch.equal(applied(int8_decode, byte, torch.float32), byte.view(torch.int8).float())


def test_e4m3_is_rounded_like_pytorch_at_and_next_to_every_tie(device):
    """All numbers, all midpoints between neighbors, the floats next to those, and random ones of every size."""
    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = (numbers[1:] + numbers[:-1]) / 2
    beside = [torch.nextafter(ties, torch.tensor(end)) for end in (0.0, 448.0)]
    some = torch.rand(100_000) * torch.logspace(-45, 2.65, 100_000)
    size = torch.cat([numbers, ties, *beside, some])
    x = torch.cat([size, -size]).to(device)
    assert x.abs().max() == 448
    expected = x.cpu().to(torch.float8_e4m3fn).view(torch.uint8)
    assert torch.equal(applied(e4m3_encode, x, torch.uint8).cpu(), expected)


def test_int8_is_rounded_half_to_even(device):
    ties = torch.arange(-127, 127) + 0.5
    beside = [torch.nextafter(ties, torch.tensor(end)) for end in (-128.0, 128.0)]
    x = torch.cat([ties, *beside, torch.arange(-127.0, 128.0), torch.rand(10_000) * 254 - 127]).to(device)
    assert torch.equal(applied(int8_encode, x, torch.uint8).view(torch.int8), x.round().to(torch.int8))


def test_no_kernel_takes_a_maximum_that_leaves_nan_out():
    """On a GPU `tl.max` of floats does, and `tl.maximum` unless told; in Triton's interpreter neither does."""
    for path in Path(bits.__file__).parent.glob("*.py"):
        assert "tl.max(tl.abs" not in path.read_text(encoding="utf-8"), f"{path.name}: use bits.largest"
