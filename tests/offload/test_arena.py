"""The arena: where units lie, how they are filled and pinned, and what happens where the driver refuses."""

from __future__ import annotations

import gc

import pytest
import torch

from fluxq.offload import Immediate
from fluxq.offload.arena import Arena, copy_rate, streams_for

SIZES = {"a": 5000, "b": 256, "c": 1, "d": 12_288, "e": 300}


def fill(unit: str, out: torch.Tensor) -> None:
    out.fill_(ord(unit))


class Driver:
    """A CUDA runtime that pins so many ranges and refuses the next."""

    def __init__(self, limit: int = 100, unregister_error: int = 0):
        self.pinned, self.limit, self.error = {}, limit, unregister_error

    def cudaHostRegister(self, address, length, flags):  # noqa: N802
        assert address % 4096 == 0
        if len(self.pinned) == self.limit:
            return 2
        self.pinned[address] = length
        return 0

    def cudaHostUnregister(self, address):  # noqa: N802
        del self.pinned[address]
        return self.error


@pytest.mark.parametrize("chunk", [1, 4096, 10_000, 1 << 30])
def test_units_are_aligned_apart_and_each_within_one_chunk(chunk):
    arena, driver = Arena(SIZES, fill, chunk), Driver()
    assert list(arena) == list(SIZES) and len(arena) == 5
    assert arena.pin(driver) is None
    ends = 0
    for unit, length in SIZES.items():
        start = arena[unit].data_ptr()
        assert len(arena[unit]) == length and (arena[unit] == ord(unit)).all()
        assert start % 256 == 0 and start >= ends
        ends = start + length
        assert sum(a <= start and ends <= a + n for a, n in driver.pinned.items()) == 1
    assert all(n <= max(chunk, max(SIZES.values())) for n in driver.pinned.values())
    ranges = sorted(driver.pinned.items())
    assert all(a + n <= b for (a, n), (b, _) in zip(ranges, ranges[1:], strict=False))
    assert len({unit.untyped_storage().data_ptr() for unit in arena.values()}) == 1


def test_what_was_pinned_is_given_back_once():
    arena, driver = Arena(SIZES, fill, 4096), Driver()
    arena.pin(driver)
    assert len(driver.pinned) > 1
    arena.close()
    arena.close()
    assert driver.pinned == {}


def test_an_arena_that_is_let_go_gives_back_its_pins():
    arena, driver = Arena(SIZES, fill), Driver()
    arena.pin(driver)
    del arena
    gc.collect()
    assert driver.pinned == {}


def test_where_the_driver_refuses_nothing_stays_pinned():
    arena, driver = Arena(SIZES, fill, 4096), Driver(limit=2)
    assert "error 2" in arena.pin(driver)
    assert driver.pinned == {}
    driver.limit = 100
    assert arena.pin(driver) is None


def test_pins_that_cannot_be_given_back_are_said():
    arena = Arena(SIZES, fill)
    arena.pin(Driver(unregister_error=4))
    with pytest.raises(RuntimeError, match="CUDA error 4"):
        arena.close()


def test_an_error_of_reading_is_passed_on():
    def read(unit, out):
        raise OSError(unit)

    with pytest.raises(OSError, match="a"):
        Arena(SIZES, read)


def test_no_units_need_no_memory():
    arena = Arena({}, fill)
    assert len(arena) == 0 and arena.nbytes == 0 and arena.pin(Driver()) is None


def test_without_a_card_copies_are_plain():
    assert isinstance(streams_for(Arena(SIZES, fill), torch.device("cpu"), print), Immediate)
    arena = Arena(SIZES, fill)
    target = torch.zeros(20_000, dtype=torch.uint8)
    assert copy_rate(Immediate(), target, arena["d"]) > 0
    assert (target[:12_288] == ord("d")).all() and (target[12_288:] == 0).all()
