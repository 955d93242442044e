"""Block inputs in host memory: every bit is restored, few are on the GPU, no race, and every wait is needed."""

from __future__ import annotations

import gc
import random
import weakref
from collections import Counter
from collections.abc import Mapping

import pytest
import torch
from live_bytes import LiveBytes
from torch import Tensor

from fluxq.offload import HostInputs, Immediate, Late, Schedule, simulation, spread
from fluxq.offload.arena import Arena
from fluxq.offload.clock import Event, TimedStreams, WatchedLane
from fluxq.offload.costs import BUFFERS
from fluxq.offload.inputs import INPUTS, PinnedBuffers, inputs_for
from fluxq.offload.simulation import run_steps

CPU = torch.device("cpu")


class Buffers:
    """Allocates on the host, and records the lengths."""

    def __init__(self):
        self.lengths = []

    def __call__(self, nbytes: int) -> Arena:
        self.lengths.append(nbytes)
        return Arena({INPUTS: nbytes}, lambda unit, out: None)


def streams_of(block: int, tokens: int, seed: int = 0) -> list[Tensor]:
    """Two streams first, then one, of odd sizes; the contents identify the block."""
    generator = torch.Generator().manual_seed(1000 * seed + block)
    shapes = [(2, tokens, 3), (2, 5, 3)] if block < 3 else [(2, tokens + 5, 3)]
    return [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]


def forward(inputs: HostInputs, tokens: int, blocks: int = 7, seed: int = 0) -> list:
    """A pass whose streams nobody else holds: for each block, the function that fetches its inputs."""
    away = inputs.begin()
    return [away.store(streams_of(block, tokens, seed)) for block in range(blocks)]


def assert_back(takes: list, tokens: int, stop: int = 0, seed: int = 0) -> None:
    """Fetch backward through the blocks down to number `stop`."""
    for block in range(len(takes) - 1, stop - 1, -1):
        back = takes[block]()
        for found, expected in zip(back, streams_of(block, tokens, seed), strict=True):
            assert found.dtype == expected.dtype and torch.equal(found, expected), block


@pytest.mark.parametrize("blocks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("streams", [Immediate, Late])
def test_inputs_are_restored_for_any_order_of_passes(streams, blocks):
    inputs = HostInputs(streams(), Buffers(), poison=True)
    assert_back(forward(inputs, 33, blocks), 33)
    forward(inputs, 33, blocks, seed=1)  # given up at once
    failed = forward(inputs, 33, blocks, seed=2)
    assert_back(failed, 33, stop=blocks // 2, seed=2)  # fails on the way back, and lives on
    inputs.release()
    first, second = forward(inputs, 33, blocks, seed=3), forward(inputs, 33, blocks, seed=4)
    assert_back(second, 33, seed=4)
    assert_back(first, 33, seed=3)
    assert_back(failed[: blocks // 2], 33, seed=2)


def test_inputs_are_fetched_only_once():
    takes = forward(HostInputs(Immediate(), Buffers()), 33)
    takes[6]()
    with pytest.raises(RuntimeError, match="already fetched from the host"):
        takes[6]()


def test_strided_inputs_are_restored():
    inputs, x = HostInputs(Late(), Buffers(), poison=True), torch.randn(3, 5, 4)
    away = inputs.begin()
    takes = [away.store([x.mT.clone().mT, x[:, 1:3]]) for _ in range(6)]
    for take in reversed(takes):
        assert all(map(torch.equal, take(), (x, x[:, 1:3])))


def test_buffers_are_reused_and_replaced_for_a_longer_batch():
    buffers = Buffers()
    inputs = HostInputs(Immediate(), buffers)
    for _ in range(3):
        assert_back(forward(inputs, 33), 33)
    assert len(buffers.lengths) == 7
    for tokens in (20, 33, 1, 32):
        assert_back(forward(inputs, tokens), tokens)
    assert len(buffers.lengths) == 7
    assert_back(forward(inputs, 192), 192)
    assert len(buffers.lengths) == 14 and min(buffers.lengths[7:]) > max(buffers.lengths[:7])
    for _ in range(3):
        forward(inputs, 192, seed=1)  # given up: its buffers come back too
    assert_back(forward(inputs, 33), 33)
    assert len(buffers.lengths) == 14


@pytest.mark.parametrize("blocks", [2, 7, 12])
def test_inputs_in_transit_take_the_memory_that_the_planner_counts(blocks):
    inputs, size = HostInputs(Nothing(), Buffers()), 1 << 16
    with LiveBytes(device="meta") as live:
        away, takes = inputs.begin(), []
        for _ in range(blocks):
            takes.append(away.store([torch.empty(size, dtype=torch.uint8, device="meta")]))
            assert live.live <= (1 + BUFFERS) * size
        assert live.peak == min(blocks, 1 + BUFFERS + 1) * size  # the next one is made before one is given up
        live.reset_peak()
        for number in reversed(range(blocks)):
            taken = takes[number]()
            assert live.live == min(number + 1, 1 + BUFFERS) * size
            del taken
        assert live.peak == min(blocks, 1 + BUFFERS) * size and live.live == 0
        forward_only = inputs.begin()
        for _ in range(blocks):
            forward_only.store([torch.empty(size, dtype=torch.uint8, device="meta")])
        inputs.release()
        assert live.live == 0


class Nothing(Immediate):
    """Streams for tensors without contents."""

    def copy(self, slot: Tensor, source: Tensor) -> None: ...


# --- the virtual clock


class Clock:
    """Lanes on which wait `number` of `side` is left out. What an allocator assumes is a rule here: memory is released
    only when the compute lane knows that the second lane is done with it, and the second lane writes to new memory only
    after all earlier compute. `races` lists every broken rule.
    """

    def __init__(self, side: str = "", number: int = -1):
        self.lanes = {name: WatchedLane(name) for name in ("compute", "second", "host")}
        self.dropped, self.waits, self.races = (side, number), Counter(), []
        self.needed: list[tuple[str, int]] = []  # waits that earlier ones do not imply
        self.made: dict[int, int] = {}  # a storage on the GPU -> the operation of compute that made it
        self.fetched: dict[int, int] = {}  # ... -> the copy that brought it
        self.used: dict[int, int] = {}  # any storage -> the last copy from or to it
        self.watched: dict[int, weakref.ref] = {}
        self.buffers = Buffers()

    def buffer(self, nbytes: int) -> Arena:
        arena = self.buffers(nbytes)
        self._watch(arena[INPUTS], "host")
        return arena

    def make(self, tensors: list[Tensor]) -> list[Tensor]:
        """Compute makes these."""
        self.lanes["compute"].run("make", 1.0)
        for tensor in tensors:
            self.made[self._watch(tensor, "compute")] = self.lanes["compute"].seen["compute"]
        return tensors

    def read(self, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            if not self.lanes["compute"].knows("second", self.fetched.get(key_of(tensor), 0)):
                self.races.append("read before it has arrived")
        self.lanes["compute"].run("read", 1.0)

    def copy(self, slot: Tensor, source: Tensor) -> None:
        slot[: len(source)].copy_(source)
        second, compute = self.lanes["second"], self.lanes["compute"]
        outwards = key_of(source) in self.made
        gpu = source if outwards else slot
        if not second.knows("compute", self.made[key_of(gpu)] if outwards else compute.seen["compute"]):
            self.races.append("stored before it is made" if outwards else "overwrites what compute still uses")
        second.run("store" if outwards else "fetch", 1.5)
        number = second.seen["second"]
        if not outwards:
            self.fetched[self._watch(gpu, "compute")] = number
        self.used[key_of(slot)] = self.used[key_of(source)] = number

    def copied(self) -> Event:
        return self.lanes["second"].event()

    def computed(self) -> Event:
        return self.lanes["compute"].event()

    def copy_waits(self, event: Event) -> None:
        self._wait("second", event)

    def compute_waits(self, event: Event) -> None:
        self._wait("compute", event)

    def host_waits(self, event: Event) -> None:
        self._wait("host", event)

    def hold(self, held: object) -> None:
        self.host_waits(self.copied())

    def _wait(self, side: str, event: Event) -> None:
        lane, number = self.lanes[side], self.waits[side]
        self.waits[side] += 1
        if not all(lane.knows(other, count) for other, count in event.seen.items()):
            self.needed.append((side, number))
        if self.dropped != (side, number):
            for waiting in self.lanes.values() if side == "host" else (lane,):  # what the host gives later comes later
                waiting.wait(event)

    def _watch(self, tensor: Tensor, side: str) -> int:
        key = key_of(tensor)
        self.watched[key] = weakref.ref(tensor.untyped_storage(), lambda _: self._freed(key, side))
        return key

    def _freed(self, key: int, side: str) -> None:
        if not self.lanes[side].knows("second", self.used.pop(key, 0)):
            self.races.append(f"freed on the {'host' if side == 'host' else 'GPU'} before its copy is over")
        for known in (self.made, self.fetched, self.watched):
            known.pop(key, None)


def key_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def pass_forward(inputs: HostInputs, clock: Clock, tokens: int, blocks: int = 7) -> list:
    away, takes = inputs.begin(), []
    for block in range(blocks):
        x = clock.make([torch.empty(2, n, 3) for n in ([tokens, 5] if block < 3 else [tokens + 5])])
        takes.append(away.store(x))
        clock.read(x)
        del x
    return takes


def pass_back(clock: Clock, takes: list, stop: int = 0) -> None:
    while len(takes) > stop:
        clock.read(takes.pop()())


def clocked(clock: Clock) -> Clock:
    """Steps, some abandoned forward and backward, some of another size, two interleaved; then everything is dropped."""
    inputs = HostInputs(clock, clock.buffer)
    for tokens, stop in ((33, 0), (20, 3), (192, 0), (33, 7), (33, 0)):
        takes = pass_forward(inputs, clock, tokens)
        pass_back(clock, takes, stop)
    first, second = pass_forward(inputs, clock, 33), pass_forward(inputs, clock, 33, 2)
    pass_back(clock, second)
    pass_back(clock, first)
    pass_forward(inputs, clock, 33)
    del inputs, takes
    return clock


@pytest.mark.slow
def test_no_race_and_every_single_wait_is_needed():
    complete = clocked(Clock())
    assert complete.races == []
    assert Counter(side for side, _ in complete.needed).keys() == {"second", "compute", "host"}
    assert len(complete.needed) > 60
    for side, number in complete.needed:
        assert clocked(Clock(side, number)).races, (side, number)


def test_copies_hide_behind_blocks_that_take_longer():
    """Copies of 1.5 s and blocks of 2 s: compute waits only for the last store, which is released at once."""
    clock = Clock()
    inputs = HostInputs(clock, clock.buffer)
    for _ in range(2):
        away, takes = inputs.begin(), []
        for block in range(3, 12):
            takes.append(away.store(clock.make(streams_of(block, 33))))
            clock.lanes["compute"].run("forward", 1.0)  # of 2 s
        for take in reversed(takes):
            clock.read(take())
            clock.lanes["compute"].run("backward", 1.0)
    assert clock.lanes["compute"].stalled <= 2 * 1.0


# --- pinned memory


class Driver:
    """A CUDA runtime that pins `limit` ranges and refuses the next."""

    def __init__(self, limit: int):
        self.pinned, self.limit, self.asked = set(), limit, 0

    def cudaHostRegister(self, address, length, flags):  # noqa: N802
        self.asked += 1
        if len(self.pinned) == self.limit:
            return 2
        self.pinned.add(address)
        return 0

    def cudaHostUnregister(self, address):  # noqa: N802
        self.pinned.remove(address)
        return 0


@pytest.mark.parametrize("limit", [0, 3, 100])
def test_without_pinning_inputs_are_restored_with_one_notice(limit):
    driver, said = Driver(limit), []
    inputs = HostInputs(Late(), PinnedBuffers(said.append, driver), poison=True)
    for _ in range(2):
        assert_back(forward(inputs, 33), 33)
    assert len(driver.pinned) == min(limit, 7) and driver.asked == min(limit + 1, 7)
    assert len(said) == (limit < 7) and all("not pinned" in line and "error 2" in line for line in said)
    assert_back(forward(inputs, 192), 192)  # longer ones: those that were pinned are given back
    assert len(driver.pinned) == (7 if limit == 100 else 0)
    del inputs
    gc.collect()
    assert not driver.pinned


def test_without_a_gpu_nothing_is_pinned():
    assert_back(forward(inputs_for(CPU, print), 33), 33)


# --- what the planner counts with


class InputsLane(Immediate):
    """The second lane of a clock on which units are copied too: fetches share their bus."""

    def __init__(self, clock: TimedStreams):
        self.clock, self.lane, self.fetched = clock, clock.lanes["inputs"], 0

    def copy(self, slot: Tensor, source: Tensor) -> None:
        fetches = source.device == CPU
        if fetches:
            self.lane.wait_until(self.clock.lanes["copy"].time)
            self.fetched += len(source)
        self.lane.run("fetch" if fetches else "store", self.clock.copy_seconds(len(source)))
        self.clock.bus_until = self.lane.time if fetches else self.clock.bus_until

    def copied(self) -> float:
        return self.lane.time

    def computed(self) -> float:
        return self.clock.lanes["compute"].time

    def copy_waits(self, event: float) -> None:
        self.lane.wait_until(max(event, self.clock.host_time))

    def compute_waits(self, event: float) -> None:
        self.clock.lanes["compute"].wait_until(event)


class Shipped:
    """HostInputs in place of the planner's simulation, which makes no tensors."""

    def __init__(self, clock: TimedStreams, sizes: Mapping[int, int]):
        self.lane, self.sizes, self.takes = InputsLane(clock), sizes, {}
        self.inputs = HostInputs(self.lane, Buffers())

    def store(self, number: int) -> None:
        if number in self.sizes:
            self.away = self.away if self.takes else self.inputs.begin()
            made = torch.empty(self.sizes[number], dtype=torch.uint8, device="meta")
            self.takes[number] = self.away.store([made])

    def take(self, number: int) -> None:
        if number in self.sizes:
            self.takes.pop(number)()

    @property
    def fetched(self) -> int:
        return self.lane.fetched


@pytest.mark.parametrize("seed", range(20))
def test_the_simulation_waits_like_the_shipped_inputs(seed, monkeypatch):
    """Together with streamed units, with the backward pass starting at any block, and with any host."""
    draw = random.Random(seed)
    blocks = tuple((f"b{i}",) for i in range(draw.randint(3, 9)))
    first = draw.randrange(len(blocks) - 1)
    trained = range(first, len(blocks))
    schedule = Schedule(blocks, spread(blocks, draw.randrange(len(blocks))), draw.randint(2, 4))
    forward = [draw.uniform(0.5, 2) for _ in blocks]
    backward = {i: 2 * forward[i] * draw.uniform(0.5, 2) for i in trained}
    sizes = {i: 256 * draw.randint(1, 6) for i in trained}
    bus, run_ahead = draw.choice([200, 600, 2000]), draw.choice([None, 0, 1])

    def timeline():
        nbytes = {unit: 512 for (unit,) in blocks}
        options = dict(steps=2, warmup=2, tail=0.3, run_ahead=run_ahead, inputs=sizes)
        return run_steps(schedule, nbytes, forward, backward, lambda n: n / bus, **options)

    counted = timeline()
    monkeypatch.setattr(simulation, "_TimedInputs", Shipped)
    made = timeline()
    assert (made.seconds, made.stalled) == pytest.approx((counted.seconds, counted.stalled))
    assert made.copied == counted.copied
    for lane, spans in made.spans.items():
        assert [s.end for s in spans] == pytest.approx([s.end for s in counted.spans[lane]]), lane
