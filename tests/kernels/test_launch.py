"""A launched kernel asks Triton once for every way in which it can be compiled, and then launches what it got."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

import triton.language as tl
from triton.runtime.jit import JITFunction

from fluxq.kernels.triton import launch


def kernel(x_ptr, n, scale, other_ptr, BLOCK: tl.constexpr):
    pass


class Compiled:
    """What Triton returns from a first launch; it notes the later ones."""

    function, packed_metadata = "function", "metadata"

    def __init__(self) -> None:
        self.launches: list[tuple] = []

    def launch_metadata(self, grid, stream, *args):
        return "about"

    def run(self, *args):
        self.launches.append(args)


@pytest.fixture
def asked(monkeypatch) -> list[Compiled]:
    """One entry for every time that Triton is asked."""
    found: list[Compiled] = []

    def run(self, *args, grid, warmup, **options):
        found.append(Compiled())
        return found[-1]

    monkeypatch.setattr(JITFunction, "run", run)
    active = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 7)
    monkeypatch.setattr(launch, "driver", SimpleNamespace(active=active))
    return found


def test_the_second_launch_goes_past_triton_with_the_same_arguments(asked):
    own, x = launch._Launched(kernel), torch.zeros(64)
    own[3,](x, 32, 0.5, None, BLOCK=16, num_warps=4)
    own[5, 2](x, 48, 0.25, None, BLOCK=16, num_warps=4)
    (compiled,) = asked
    ((gx, gy, gz, stream, function, packed, about, enter, leave, *args),) = compiled.launches
    assert (gx, gy, gz, stream, function, packed, about) == (5, 2, 1, 7, "function", "metadata", "about")
    assert args[0] is x and args[1:] == [48, 0.25, None, 16], "the constants follow in the kernel's order"


@pytest.mark.parametrize(
    "change",
    [
        dict(n=33),  # no multiple of 16
        dict(n=1),
        dict(n=2**31),
        dict(x=torch.zeros(64, dtype=torch.bfloat16)),
        dict(x=torch.zeros(65)[1:]),  # not aligned
        dict(other=torch.zeros(64)),
        dict(BLOCK=32),
        dict(num_warps=8),
    ],
    ids=str,
)
def test_whatever_may_be_compiled_in_asks_triton_again(asked, change):
    own = launch._Launched(kernel)

    def launched(x=torch.zeros(64), n=32, other=None, BLOCK=16, num_warps=4):  # noqa: B008
        own[1,](x, n, 0.5, other, BLOCK=BLOCK, num_warps=num_warps)

    launched()
    launched(**change)
    launched()
    launched(**change)
    assert len(asked) == 2 and [len(compiled.launches) for compiled in asked] == [1, 1]
