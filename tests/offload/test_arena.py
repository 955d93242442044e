"""The arena: where units are stored, how they are read and pinned, and what happens if the driver refuses."""

from __future__ import annotations

import gc
import threading
import time

import pytest
import torch

import fluxq.offload.arena as module
from fluxq.offload import Immediate, Staged
from fluxq.offload.arena import Arena, copy_rate, streams_for

SIZES = {"a": 5000, "b": 256, "c": 1, "d": 12_288, "e": 300}


def fill(unit: str, out: torch.Tensor) -> None:
    out.fill_(ord(unit))


class Driver:
    """A CUDA runtime that pins `limit` ranges and refuses the next."""

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


def test_pinned_memory_is_unpinned_once():
    arena, driver = Arena(SIZES, fill, 4096), Driver()
    arena.pin(driver)
    assert len(driver.pinned) > 1
    arena.close()
    arena.close()
    assert driver.pinned == {}


def test_a_collected_arena_unpins_its_memory():
    arena, driver = Arena(SIZES, fill), Driver()
    arena.pin(driver)
    del arena
    gc.collect()
    assert driver.pinned == {}


def test_a_refusal_leaves_nothing_pinned():
    arena, driver = Arena(SIZES, fill, 4096), Driver(limit=2)
    assert "error 2" in arena.pin(driver)
    assert driver.pinned == {}
    driver.limit = 100
    assert arena.pin(driver) is None


def test_a_failure_to_unpin_raises():
    arena = Arena(SIZES, fill)
    arena.pin(Driver(unregister_error=4))
    with pytest.raises(RuntimeError, match="CUDA error 4"):
        arena.close()


def test_a_read_error_is_raised():
    def read(unit, out):
        raise OSError(unit)

    with pytest.raises(OSError, match="a"):
        Arena(SIZES, read)


def test_no_units_need_no_memory():
    arena = Arena({}, fill)
    assert len(arena) == 0 and arena.nbytes == 0 and arena.pin(Driver()) is None


class Paced(Immediate):
    """A GPU's lanes whose copies take the given seconds, from pinned memory and through the staging thread."""

    def __init__(self, pinned: float, staged: float):
        self.seconds = {True: pinned, False: staged}

    def copy(self, slot, source):
        super().copy(slot, source)
        time.sleep(self.seconds[threading.current_thread() is threading.main_thread()])


@pytest.mark.parametrize(
    ("limit", "pinned", "staged", "chosen", "words"),
    [
        (100, 0.0, 0.01, Paced, "GB/s pinned, "),
        (100, 0.01, 0.0, Staged, "copied through pinned buffers: "),
        (2, 0.0, 0.01, Staged, "the driver pinned 0.0 of 0.0 GB (error 2)"),
        (0, 0.0, 0.01, Staged, "the driver pinned 0.0 of 0.0 GB (error 2)"),
    ],
)
def test_streams_are_chosen_by_measurement_with_one_notice(limit, pinned, staged, chosen, words, monkeypatch):
    """On a CPU that is passed off as a GPU. limit: ranges that can be pinned; the buffers are one."""
    driver, said, empty = Driver(limit), [], torch.empty
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    monkeypatch.setattr(torch, "empty", lambda *shape, device=None, **options: empty(*shape, **options))
    monkeypatch.setattr(module, "CudaStreams", lambda device: Paced(pinned, staged))
    arena = Arena(SIZES, fill, 4096)
    streams = streams_for(arena, torch.device("cuda"), said.append)
    assert type(streams) is chosen and len(said) == 1 and words in said[0]
    if chosen is Staged:
        assert len(driver.pinned) == min(limit, 1), "only the buffers"
    slot = torch.zeros(20_000, dtype=torch.uint8)
    streams.copy(slot, arena["d"])
    streams.compute_waits(streams.copied())
    assert (slot[:12_288] == ord("d")).all() and not slot[12_288:].any()
    del streams
    gc.collect()
    arena.close()
    assert not driver.pinned


def test_without_a_gpu_copies_are_plain():
    assert isinstance(streams_for(Arena(SIZES, fill), torch.device("cpu"), print), Immediate)
    arena = Arena(SIZES, fill)
    target = torch.zeros(20_000, dtype=torch.uint8)
    assert copy_rate(Immediate(), target, arena["d"]) > 0
    assert (target[:12_288] == ord("d")).all() and (target[12_288:] == 0).all()
