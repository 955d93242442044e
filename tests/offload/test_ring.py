"""The ring on the CPU with poisoned slots, and under the virtual clock: no race, and every wait is needed."""

from __future__ import annotations

import gc
import random
import subprocess
import sys
import threading
import weakref
from concurrent.futures import Future, _base
from traceback import StackSummary
from types import SimpleNamespace

import pytest
import torch
from torch.cuda import _sanitizer

from fluxq.errors import WrongRequest
from fluxq.offload import (
    AllResident,
    ByteRange,
    Immediate,
    Late,
    Schedule,
    Staged,
    Stored,
    StreamingRing,
    spread,
)
from fluxq.offload import streams as streams_module
from fluxq.offload.clock import Race, VirtualStreams
from fluxq.offload.simulation import run_steps

SINGLE = tuple((f"s{i}",) for i in range(7))
MIXED = (("d0.img", "d0.txt"), ("d1.img", "d1.txt"), ("s0",), ("s1",), ("s2",))
CPU = torch.device("cpu")


def units_of(blocks) -> list[str]:
    return [unit for block in blocks for unit in block]


def host_of(schedule: Schedule) -> dict[str, torch.Tensor]:
    """Bytes that identify the unit; lengths differ."""
    return {u: torch.full((256 + 16 * i,), i + 1, dtype=torch.uint8) for i, u in enumerate(schedule.slot)}


class Reader:
    """Reads a ring's units as a layer would: every visit checks the bytes of its resident units."""

    def __init__(self, schedule: Schedule, streams=None):
        self.host, self.placed = host_of(schedule), {}
        place = self.placed.__setitem__
        self.ring = StreamingRing(schedule, self.host, place, CPU, streams or Immediate(), poison=True)

    def visit(self, units) -> None:
        with self.ring.resident(units):
            for unit in units:
                if unit in self.host:
                    assert torch.equal(self.placed[unit], self.host[unit]), unit


@pytest.mark.parametrize("streams", [Immediate, Late])
@pytest.mark.parametrize("slots", [2, 3, 5, 7])
@pytest.mark.parametrize("count", [0, 1, 3, 7])
@pytest.mark.parametrize("blocks", [SINGLE, MIXED])
def test_units_are_in_place_for_any_order_of_visits(blocks, count, slots, streams):
    reader = Reader(Schedule(blocks, spread(blocks, count), slots), streams())
    forward, backward = list(blocks), list(reversed(blocks))
    for visits in (forward + backward, forward, forward, forward + backward[:2], forward[:3], backward, forward):
        for units in visits:
            reader.visit(units)
    chance = random.Random(0)
    for _ in range(100):
        reader.visit(chance.choice([*blocks, *((unit,) for unit in units_of(blocks))]))


@pytest.mark.parametrize("slots", [2, 3, 6])
@pytest.mark.parametrize("count", [0, 2])
@pytest.mark.parametrize("backward", [None, (), (6,), (3, 4, 5, 6), (0, 2, 4)])
def test_the_ring_makes_the_copies_of_the_schedule(backward, count, slots):
    schedule = Schedule(SINGLE, spread(SINGLE, count), slots)
    reader = Reader(schedule)
    reader.ring.expect(backward)
    order = [*range(7), *sorted(range(7) if backward is None else backward, reverse=True)]
    made = []
    for _ in range(3):
        before = reader.ring.copies
        for i in order:
            reader.visit(SINGLE[i])
        made.append(reader.ring.copies - before)
    assert made[1] == made[2] == len(schedule.copies(schedule.step(backward)))


def test_sampling_during_training_costs_extra_copies_only_at_its_ends():
    schedule = Schedule(SINGLE, frozenset(), 3)
    reader = Reader(schedule)
    step, forward = [*SINGLE, *reversed(SINGLE)], list(SINGLE)
    counts = []
    for visits in (step, step, forward, forward, forward, step, step):
        before = reader.ring.copies
        for units in visits:
            reader.visit(units)
        counts.append(reader.ring.copies - before)
    train, sample = len(schedule.copies(schedule.step())), len(schedule.copies(schedule.forward))
    assert (train, sample) == (8, 7)
    assert counts[1] == counts[6] == train and counts[4] == sample
    assert max(counts) <= train + 2 * 3


@pytest.mark.parametrize("streams", [Immediate, Late])
@pytest.mark.parametrize("slots", [2, 3, 8])
def test_an_announced_pass_makes_the_copies_of_the_schedule(slots, streams):
    """Before every second step, and one that is abandoned."""
    extra = tuple(f"m{i}" for i in range(5))
    schedule = Schedule(SINGLE, frozenset({"s4", "m1"}), slots, extra)
    reader, passed = Reader(schedule, streams()), [(unit,) for unit in extra]
    assert set(schedule.slot) == {"s0", "s1", "s2", "s3", "s5", "s6", "m0", "m2", "m3", "m4"}
    step = [*SINGLE, *reversed(SINGLE)]
    streamed = [visit for visit in passed if visit[0] in schedule.slot]
    made = []
    for _ in range(3):
        before = reader.ring.copies
        reader.ring.announce(passed)
        for units in passed + step + step:
            reader.visit(units)
        made.append(reader.ring.copies - before)
    assert made[1] == made[2] == len(schedule.copies([*streamed, *schedule.step(), *schedule.step()]))
    reader.ring.announce(passed)
    for units in passed[:2] + step:
        reader.visit(units)
    before = reader.ring.copies
    for units in step:
        reader.visit(units)
    assert reader.ring.copies - before == len(schedule.copies(schedule.step()))


def test_outside_resident_only_poison_can_be_read():
    """With late copies: a unit that was evicted and is needed later is absent in between."""
    reader = Reader(Schedule(SINGLE, frozenset(), 2), Late())
    for units in SINGLE[:3]:
        reader.visit(units)
    for unit in ("s1", "s2"):  # s2's slot waits for s4, s1's for s3
        assert (reader.placed[unit] == 0xFF).all()


def test_each_unit_has_one_address_and_views_are_made_once():
    schedule = Schedule(MIXED, frozenset({"s0"}), 3)
    reader = Reader(schedule)
    placed = dict(reader.placed)
    addresses = {unit: flat.data_ptr() for unit, flat in placed.items()}
    assert len(set(addresses.values())) == 3 and "s0" not in addresses
    for units in [*MIXED, *reversed(MIXED)]:
        reader.visit(units)
    assert reader.placed == placed


def test_impossible_visits_are_refused():
    reader = Reader(Schedule(SINGLE, frozenset({"s6"}), 2))
    with pytest.raises(KeyError, match="no unit s9"):
        reader.visit(("s9",))
    with pytest.raises(RuntimeError, match="s0 is needed together with a unit"):
        reader.visit(("s0", "s2"))
    with reader.ring.resident(("s0",)), pytest.raises(RuntimeError, match="use more slots"):
        reader.visit(("s2",))
    with reader.ring.resident(("s0",)):
        reader.visit(("s0",))  # once more inside, as replays may do
        reader.visit(("s1",))
        reader.visit(("s6",))
    for units in SINGLE:
        reader.visit(units)


def test_an_error_inside_leaves_the_ring_in_order():
    reader = Reader(Schedule(MIXED, frozenset(), 2))
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), reader.ring.resident(MIXED[1]):
            raise ZeroDivisionError
        for units in MIXED:
            reader.visit(units)


def test_a_closed_ring_prefetches_nothing():
    reader = Reader(Schedule(SINGLE, frozenset(), 3))
    reader.visit(SINGLE[0])
    reader.ring.close()
    before = reader.ring.copies
    reader.visit(SINGLE[5])
    reader.visit(SINGLE[6])
    assert reader.ring.copies == before + 2
    reader = Reader(Schedule(SINGLE, frozenset(), 3))
    reader.ring.announce(SINGLE)
    reader.ring.close()
    before = reader.ring.copies
    reader.visit(SINGLE[0])
    assert reader.ring.copies == before


def test_units_of_an_announced_pass_are_copied_before_they_are_needed():
    extra = tuple(f"m{i}" for i in range(6))
    reader = Reader(Schedule(SINGLE, frozenset(), 3, extra))
    reader.ring.announce([(unit,) for unit in extra])
    for unit in extra:
        before = reader.ring.copies
        with reader.ring.resident((unit,)):
            assert reader.ring.copies == before, unit


def test_a_collected_ring_first_waits_for_its_copies():
    late = Late()
    reader = Reader(Schedule(SINGLE, frozenset(), 3), late)
    reader.ring = None
    assert late.copied() == late._done == 3


def test_a_model_that_fits_needs_no_ring():
    with AllResident().resident(["anything"]):
        pass


# --- the staging thread


@pytest.mark.parametrize("buffers", [1, 2, 3])
def test_staged_copies_arrive_as_direct_ones_do(buffers):
    schedule = Schedule(MIXED, frozenset(), 3)
    staged = Staged(Immediate(), [torch.empty(1024, dtype=torch.uint8) for _ in range(buffers)])
    reader = Reader(schedule, staged)
    for _ in range(20):
        for units in [*MIXED, *reversed(MIXED)]:
            reader.visit(units)
    reader.ring.close()


class Slow(Immediate):
    """Copies on request, to show what the staging thread waits for."""

    def __init__(self):
        self.waited, self.copies = [], 0

    def copy(self, slot, source):
        super().copy(slot, source)
        self.copies += 1

    def copied(self):
        return self.copies

    def host_waits(self, event):
        self.waited.append((event, threading.current_thread().name))


def test_a_staging_buffer_is_filled_again_only_when_its_copy_is_done():
    slow = Slow()
    staged = Staged(slow, [torch.empty(8, dtype=torch.uint8) for _ in range(2)])
    slot = torch.empty(8, dtype=torch.uint8)
    for i in range(5):
        staged.copy(slot, torch.full((8,), i, dtype=torch.uint8))
    staged.compute_waits(staged.copied())
    assert [event for event, _ in slow.waited] == [1, 2, 3]  # copy 3 waits for copy 1, and so on
    assert all("staging" in thread for _, thread in slow.waited)


def test_an_error_of_the_staging_thread_is_raised_where_its_copy_is_waited_for():
    staged = Staged(Immediate(), [torch.empty(8, dtype=torch.uint8)])
    staged.copy(torch.empty(8, dtype=torch.uint8), torch.empty(9, dtype=torch.uint8))
    event = staged.copied()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="could not be copied") as caught:
            staged.compute_waits(event)
    assert isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(RuntimeError, match="could not be copied"):
        staged.compute_waits(staged.copied())
    staged.host_waits(staged.copied())  # whoever only wants the memory back is not told again


def test_a_ring_whose_units_cannot_be_read_raises_why_and_is_freed():
    def read(out):
        raise WrongRequest("the file has become shorter")

    streams, host = Staged(Immediate(), [torch.empty(8, dtype=torch.uint8)]), {}
    for unit in ("s0", "s1", "s2"):
        host[unit] = Stored(8, (ByteRange(0, 8, read),))
    ring = StreamingRing(Schedule(SINGLE[:3], frozenset(), 2), host, lambda unit, flat: None, CPU, streams)
    with pytest.raises(WrongRequest, match="^the file has become shorter$"), ring.resident(("s0",)):
        pass
    left = weakref.ref(ring)
    del ring
    gc.collect()
    assert left() is None


def test_a_ring_may_be_collected_in_its_own_staging_thread():
    """And its slots live until the thread has done all its work."""
    rings, host, slots, over = [], {}, [], threading.Event()

    def read(out):
        rings.clear()  # as the garbage collector would, sooner or later
        out.fill_(7)

    class Watching(Immediate):
        def hold(self, held):
            assert all((slot == 7).all() for slot in held[0]) and all(slot() is not None for slot in slots)
            over.set()

    streams = Staged(Watching(), [torch.empty(8, dtype=torch.uint8) for _ in range(2)])
    for unit in ("s0", "s1", "s2"):
        host[unit] = Stored(8, (ByteRange(0, 8, lambda out: read(out)),))
    schedule, started = Schedule(SINGLE[:3], frozenset(), 2), threading.Event()
    streams._submit(started.wait)
    rings.append(StreamingRing(schedule, host, lambda unit, flat: slots.append(weakref.ref(flat)), CPU, streams))
    slots[:] = [weakref.ref(slot.memory) for slot in rings[0]._slots]
    started.set()
    assert over.wait(10)


def test_a_ring_may_be_collected_while_work_is_queued(monkeypatch):
    streams = Staged(Immediate(), [torch.empty(8, dtype=torch.uint8)])
    host = {unit: torch.zeros(8, dtype=torch.uint8) for unit in ("s0", "s1", "s2")}
    rings = [StreamingRing(Schedule(SINGLE[:3], frozenset(), 2), host, lambda unit, flat: None, CPU, streams)]

    class Collecting(Future):
        def __init__(self):
            super().__init__()
            rings.clear()

    for module in (_base, streams_module):  # wherever the one that is used is looked up
        monkeypatch.setattr(module, "Future", Collecting, raising=False)
    thread = threading.Thread(target=streams.copied, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive() and not rings


def test_the_thread_ends_with_its_streams():
    before = {thread.ident for thread in threading.enumerate()}
    streams = Staged(Immediate(), [torch.empty(8, dtype=torch.uint8)])
    (own,) = [thread for thread in threading.enumerate() if thread.ident not in before]
    streams.copied().result()
    del streams
    assert not own.is_alive()


@pytest.mark.slow
def test_at_exit_the_program_waits_for_the_staging_thread():
    """A thread that computes during interpreter shutdown may crash the program."""
    program = """
import time, torch
from fluxq.offload import Immediate, Staged
streams = Staged(Immediate(), [torch.empty(8, dtype=torch.uint8)])
streams._submit(lambda: (time.sleep(0.5), print("done", flush=True)))
raise KeyboardInterrupt
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert ended.stdout == "done\n" and "KeyboardInterrupt" in ended.stderr


def test_a_unit_in_pieces_is_copied_whole_through_smaller_buffers():
    streams = Staged(Immediate(), [torch.empty(5, dtype=torch.uint8) for _ in range(2)])
    bytes = torch.randint(0, 255, (12,), dtype=torch.uint8)
    ends = [(0, 5), (5, 7), (8, 12)]
    pieces = tuple(ByteRange(a, b - a, lambda out, a=a, b=b: out.copy_(bytes[a:b])) for a, b in ends)
    for lanes in (streams, Immediate(), Late()):
        slot = torch.zeros(16, dtype=torch.uint8)
        lanes.copy(slot, Stored(12, pieces))
        lanes.compute_waits(lanes.copied())
        assert torch.equal(slot[:7], bytes[:7]) and torch.equal(slot[8:12], bytes[8:])
        assert not slot[12:].any() and not slot[7]


# --- the virtual clock


class Dropping(VirtualStreams):
    """A clock that leaves out one wait: of the copy lane before its operation `number`, or all of the compute lane
    before its operation `number`. `waits` lists the numbers of the waits that earlier ones do not imply.
    """

    def __init__(self, side: str = "", number: int = -1):
        super().__init__(lambda nbytes: 1.5)
        self.dropped, self.waits = (side, number), {"copy": [], "compute": []}

    def copy_waits(self, event):
        self._wait("copy", event)

    def compute_waits(self, event):
        self._wait("compute", event)

    def _wait(self, side, event):
        lane = self.lanes[side]
        number = lane.seen.get(side, 0)
        if not all(lane.knows(other, count) for other, count in event.seen.items()):
            self.waits[side].append(number)
        if self.dropped != (side, number):
            self._ordered(side, event)

    def _ordered(self, side, event):
        self.lanes[side].wait(event)


def clocked(blocks, slots: int, streams: VirtualStreams, odd: bool = True, device: str = "meta") -> StreamingRing:
    """Train, and if `odd` also sample, run part of a step, visits in random order, and an extra pass; the clock raises
    Race.
    """
    extra = tuple(f"m{i}" for i in range(4)) if odd else ()
    schedule, passed = Schedule(blocks, frozenset(), slots, extra), [(unit,) for unit in extra]
    host = {u: torch.empty(256, dtype=torch.uint8, device=device) for u in schedule.slot}
    ring = StreamingRing(schedule, host, lambda unit, flat: None, torch.device(device), streams)
    forward, backward = list(blocks), list(reversed(blocks))
    order = [forward + backward, forward + backward]
    if odd:
        order += [forward, forward, forward + backward, forward + backward[:2], [blocks[3], blocks[0]], forward]
        order += [passed + forward + backward, passed[:2] + forward]
    for visits in order:
        if visits[0] in passed:
            ring.announce(passed)
        for units in visits:
            with ring.resident(units):
                streams.compute("+".join(units), 1.0, [(ring.memory(u), host[u]) for u in units])
    return ring


@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("slots", [2, 3, 4])
@pytest.mark.parametrize("blocks", [SINGLE, MIXED])
def test_no_race_and_every_single_wait_is_needed(blocks, slots, odd):
    complete = Dropping()
    ring = clocked(blocks, slots, complete, odd)
    if not odd and blocks is SINGLE:  # nothing is waited for in vain, but that the first copies share one event
        assert len(complete.waits["copy"]) == ring.copies - (slots - 1)
    for side, error in (("copy", "before its slot is free"), ("compute", "before it is ready")):
        assert len(complete.waits[side]) >= 5
        for number in sorted(set(complete.waits[side])):
            with pytest.raises(Race, match=error):
                clocked(blocks, slots, Dropping(side, number), odd)


class Judged(Dropping):
    """Tells a second judge as well, before the clock judges: what PyTorch's CUDA sanitizer makes of each lane's reads,
    writes, and events. It sees addresses and an order of calls, and knows nothing of slots or times.
    """

    streams = {"compute": 0, "copy": 1}

    def __init__(self, side: str = "", number: int = -1):
        super().__init__(side, number)
        self.judge, self.events = _sanitizer.EventHandler(), []
        self._launch("compute", set(), set())  # whatever used the slots' memory before
        self.before = _sanitizer.Access(_sanitizer.AccessType.WRITE, 1, 0, "before", [], False, StackSummary())

    def copy(self, slot, source):
        known = self.judge.tensors_accessed
        if slot.data_ptr() not in known.accesses:
            known.create_tensor(slot.data_ptr(), None)
            known.set_write(slot.data_ptr(), self.before)
        self._launch("copy", {source.data_ptr()}, {slot.data_ptr()})
        super().copy(slot, source)

    def compute(self, label, seconds, reads=()):
        self._launch("compute", {slot.data_ptr() for slot, _ in reads}, set())
        super().compute(label, seconds, reads)

    def copied(self):
        return self._recorded("copy", super().copied())

    def computed(self):
        return self._recorded("compute", super().computed())

    def _launch(self, lane, reads, writes):
        names = {pointer: [] for pointer in reads | writes}
        if errors := self.judge._handle_kernel_launch(self.streams[lane], reads, writes, set(), lane, names):
            raise errors[0]

    def _recorded(self, lane, event):
        self.judge._handle_event_record(len(self.events), self.streams[lane])
        self.events.append(event)
        return event

    def _ordered(self, side, event):
        super()._ordered(side, event)
        (number,) = (i for i, other in enumerate(self.events) if other is event)
        self.judge._handle_event_wait(number, self.streams[side])


@pytest.mark.parametrize(("blocks", "slots"), [(SINGLE, 2), (MIXED, 3)])
def test_the_sanitizer_of_pytorch_finds_every_wait_that_is_left_out(blocks, slots, monkeypatch):
    no_stacks = SimpleNamespace(extract=lambda *_, **__: StackSummary())  # they take most of its time
    monkeypatch.setattr(_sanitizer, "traceback", SimpleNamespace(StackSummary=no_stacks, walk_stack=lambda frame: ()))
    complete = Judged()
    clocked(blocks, slots, complete, device="cpu")
    for side in ("copy", "compute"):
        waits = sorted(set(complete.waits[side]))
        assert len(waits) >= 20
        for number in waits[::3]:
            with pytest.raises(_sanitizer.UnsynchronizedAccessError):
                clocked(blocks, slots, Judged(side, number), device="cpu")


class Staging(Dropping):
    """A clock behind a staging thread; copies from its buffers are identified by their bytes."""

    def __init__(self, sources: dict[int, torch.Tensor], side: str = "", number: int = -1):
        super().__init__(side, number)
        self.sources = sources

    def copy(self, slot, source):
        super().copy(slot, self.sources[int(source[0])])


def staged(side: str = "", number: int = -1) -> Staging:
    """Three steps through a staging thread with two buffers. Raises Race, or the thread's error for it."""
    schedule = Schedule(SINGLE, frozenset(), 3)
    host = host_of(schedule)
    clock = Staging({int(source[0]): source for source in host.values()}, side, number)
    lanes = Staged(clock, [torch.empty(1024, dtype=torch.uint8) for _ in range(2)])
    ring = StreamingRing(schedule, host, lambda unit, flat: None, CPU, lanes)
    for (unit,) in [*SINGLE, *reversed(SINGLE)] * 3:
        with ring.resident((unit,)):
            clock.compute(unit, 1.0, [(ring.memory(unit), host[unit])])
    ring.close()
    return clock


def test_through_a_staging_thread_there_is_no_race_and_every_wait_is_needed():
    complete = staged()
    for side in ("copy", "compute"):
        assert len(complete.waits[side]) >= 8
        for number in sorted(set(complete.waits[side]))[::2]:
            with pytest.raises(RuntimeError) as caught:
                staged(side, number)
            assert isinstance(caught.value, Race) or isinstance(caught.value.__cause__, Race)


def test_the_clock_also_detects_wrong_bytes():
    streams, slot = VirtualStreams(lambda nbytes: 1.0), torch.empty(4, device="meta")
    a, b = torch.empty(4, device="meta"), torch.empty(4, device="meta")
    with pytest.raises(Race, match="reads nothing where"):
        streams.compute("x", 1.0, [(slot, a)])
    streams.copy_waits(streams.computed())
    streams.copy(slot, a)
    streams.compute_waits(streams.copied())
    streams.compute("x", 1.0, [(slot, a)])
    with pytest.raises(Race, match="where a unit should be"):
        streams.compute("x", 1.0, [(slot, b)])


@pytest.mark.parametrize(("count", "slots"), [(8, 2), (8, 4), (7, 4), (7, 5), (7, 3)])
def test_sampling_is_predicted_once_it_has_started(count, slots):
    """From its third pass on it never waits for copies that fit behind compute, nor does the second step after it, even
    with a host that never runs ahead. But if the last unit has the first one's slot, its copy shows once a pass.
    """
    streams, blocks = VirtualStreams(lambda nbytes: 0.9, run_ahead=0), tuple((f"s{i}",) for i in range(count))
    schedule = Schedule(blocks, frozenset(), slots)
    host = {u: torch.empty(1, dtype=torch.uint8, device="meta") for u in schedule.slot}
    ring = StreamingRing(schedule, host, lambda unit, flat: None, torch.device("meta"), streams)
    step, stalls = [*blocks, *reversed(blocks)], []
    for visits in [step, *[blocks] * 4, step, step]:
        before = streams.lanes["compute"].stalled
        for units in visits:
            with ring.resident(units):
                streams.compute(units[0], 1.0, [(ring.memory(units[0]), host[units[0]])])
        stalls.append(round(streams.lanes["compute"].stalled - before, 6))
    assert stalls[0] == 0.9  # the very first copy
    assert sum(stalls[3:5]) <= (2 if count % slots == 1 else 0) and stalls[6] == 0
    assert max(stalls) <= 0.9 * slots


class Recording(Immediate):
    """Numbers the events of the compute lane, and knows which one the copies waited for."""

    def __init__(self):
        self.recorded, self.waited = 0, []

    def computed(self):
        self.recorded += 1
        return self.recorded

    def copy_waits(self, event):
        self.waited.append((event, self.recorded))


def test_poison_is_computed_before_the_copy_may_start():
    recording = Recording()
    reader = Reader(Schedule(SINGLE, frozenset(), 2), recording)
    for units in [*SINGLE, *reversed(SINGLE), *SINGLE[3:], SINGLE[2], SINGLE[6], SINGLE[0]]:
        reader.visit(units)
    assert len(recording.waited) == reader.ring.copies
    assert all(event == newest for event, newest in recording.waited)


NBYTES = dict.fromkeys((u for (u,) in SINGLE), 100)


def timed(copy: float, slots=2, backward=2.0, resident=frozenset(), **more):
    """Seven blocks of one second forward, `copy` seconds each copy."""
    schedule = Schedule(SINGLE, frozenset(resident), slots)
    back = dict.fromkeys(range(7), backward)
    return run_steps(schedule, NBYTES, [1.0] * 7, back, lambda nbytes: copy * nbytes / 100, **more)


@pytest.mark.parametrize("run_ahead", [None, 1, 0])
def test_copies_hide_behind_compute_that_is_longer(run_ahead):
    timeline = timed(0.9, run_ahead=run_ahead)
    assert timeline.stall == 0 and timeline.seconds == pytest.approx(21) and timeline.copied == 10 * 100
    assert timeline.busy("compute") == pytest.approx(1) and timeline.busy("copy") == pytest.approx(9 / 21)


def test_a_slow_bus_bounds_a_step():
    """Ten copies of 3 s. At each turn both slots hold what is needed next, and the bus rests while one block runs both
    ways: 1 + 2 s.
    """
    timeline = timed(3.0, steps=4, warmup=3)
    assert timeline.copied == 1000
    assert timeline.seconds == pytest.approx(timeline.stalled + 21)
    assert timeline.seconds == pytest.approx(30 + 2 * 3)
    assert timeline.busy("copy") == pytest.approx(30 / timeline.seconds)


def test_spans_of_a_lane_do_not_overlap():
    for copy in (0.5, 1.0, 2.5):
        for spans in timed(copy).spans.values():
            assert all(a.end <= b.start + 1e-9 for a, b in zip(spans, spans[1:], strict=False))


def test_more_slots_and_more_residents_are_never_slower():
    for copy in (0.5, 1.4, 3.0):
        by_slots = [timed(copy, slots, steps=4, warmup=3).seconds for slots in range(2, 8)]
        assert by_slots == sorted(by_slots, reverse=True) and by_slots[-1] == pytest.approx(21)
        by_count = [timed(copy, 2, resident=spread(SINGLE, n), steps=4, warmup=3).seconds for n in range(8)]
        assert by_count == sorted(by_count, reverse=True) and by_count[-1] == pytest.approx(21)


FLUX = tuple((f"d{i}.img", f"d{i}.txt") for i in range(19)) + tuple((f"s{i}",) for i in range(38))


@pytest.mark.parametrize("count", [10, 19, 30])
@pytest.mark.parametrize("copy", [0.7, 0.9, 1.3])
def test_spread_residents_beat_those_in_a_row(count, copy):
    """With FLUX's blocks, which take equally long: against the first units, the last, and random ones."""
    units, chance = units_of(FLUX), random.Random(0)

    def seconds(resident) -> float:
        schedule = Schedule(FLUX, frozenset(resident), 4)
        return run_steps(
            schedule, dict.fromkeys(units, 1), [1.0] * 57, dict.fromkeys(range(57), 2.0), lambda n: copy, steps=2
        ).seconds

    ours = seconds(spread(FLUX, count))
    for other in (units[:count], units[-count:], *(chance.sample(units, count) for _ in range(3))):
        assert ours <= seconds(other) + 1e-9
