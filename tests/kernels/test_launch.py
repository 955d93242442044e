"""A launch asks Triton once for every way in which it can be compiled, and then launches what it got."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

import triton.language as tl
from triton.runtime.jit import JITFunction

from fluxq.kernels.triton import launch, shipped


def kernel(x_ptr, other_ptr, n, scale, BLOCK: tl.constexpr):
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


def made(*numbers: float) -> launch.Launch:
    return launch.Launch(JITFunction(kernel), (5, 2), *numbers, BLOCK=16, num_warps=4)


def test_the_second_launch_goes_past_triton_with_the_same_arguments(asked):
    own, x = made(48, 0.25), torch.zeros(64)
    for _ in range(2):
        own(x, None)
    (compiled,) = asked
    ((gx, gy, gz, stream, function, packed, about, enter, leave, *args),) = compiled.launches
    assert (gx, gy, gz, stream, function, packed) == (5, 2, 1, 7, "function", "metadata")
    assert about is enter is leave is None, "nobody listens"
    assert args[0] is x and args[1:] == [None, 48, 0.25, 16], "numbers and constants follow in the kernel's order"


def test_a_profiler_hears_of_every_launch(asked, monkeypatch):
    monkeypatch.setattr(launch, "knobs", SimpleNamespace(runtime=SimpleNamespace(
        launch_enter_hook=SimpleNamespace(calls=[print]), launch_exit_hook=None
    )))  # fmt: skip
    own = made(48, 0.25)
    for _ in range(2):
        own(torch.zeros(64), None)
    ((*_, about, enter, leave, _, _, _, _, _),) = asked[0].launches
    assert about == "about" and enter.calls == [print] and leave is None


@pytest.mark.parametrize(
    "change",
    [
        dict(x=torch.zeros(64, dtype=torch.bfloat16)),
        dict(x=torch.zeros(65)[1:]),  # not aligned
        dict(other=torch.zeros(64)),
    ],
    ids=["dtype", "alignment", "none"],
)
def test_tensors_of_another_kind_ask_triton_again(asked, change):
    own = made(48, 0.25)

    def launched(x=torch.zeros(64), other=None):  # noqa: B008
        own(x, other)

    launched()
    launched(**change)
    launched()
    launched(**change)
    assert len(asked) == 2 and [len(compiled.launches) for compiled in asked] == [1, 1]


def test_a_shape_makes_one_launch_and_another_tile_another():
    calls = []

    @launch.shaped
    def make(tile, shape, stride):
        calls.append(tile)
        return made(stride, 1.0)

    tile = shipped.Choice("triton", 16, 32, why="the first")
    assert make(tile, (2, 3), 3) is make(replace(tile), torch.Size((2, 3)), 3)
    assert make(replace(tile, step=2), (2, 3), 3) is not make(tile, (2, 3), 3) and len(calls) == 2
