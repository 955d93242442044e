"""e4m3 by integer arithmetic: the very bytes of PyTorch's cast."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
tl = triton.language

from fluxq.kernels.triton.e4m3 import to_e4m3  # noqa: E402


@triton.jit
def cast_all(x_ptr, bytes_ptr, N, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(bytes_ptr + i, to_e4m3(tl.load(x_ptr + i, mask=i < N)), mask=i < N)


def bytes_of(x):
    """Theirs and ours, of the numbers of x within e4m3's range."""
    x = x[x.abs() <= 448]
    out = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    cast_all[(triton.cdiv(len(x), 4096),)](x, out, len(x), BLOCK=4096)
    return x.to(torch.float8_e4m3fn).view(torch.uint8), out


def test_every_bf16_number_and_its_neighbours_become_pytorchs_bytes(device):
    """bf16's numbers hold all of e4m3's and all midpoints between them; the neighbours fall to either side."""
    numbers = torch.arange(-32768, 32768, dtype=torch.int32, device=device) << 16
    x = torch.cat([numbers, numbers + 1, numbers - 1]).view(torch.float32)
    assert torch.equal(*bytes_of(x))


def test_random_bits_become_pytorchs_bytes(device):
    x = torch.randint(-(2**31), 2**31, (100_001,), dtype=torch.int64).to(torch.int32).to(device).view(torch.float32)
    assert torch.equal(*bytes_of(x))
