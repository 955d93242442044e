"""A virtual clock: the ring that trains, run on lanes that take no time, tells how long it would take elsewhere.

Each lane does its operations one after another, each for a given number of seconds, and starts one when the events that
it waits for have happened. The host runs ahead of both, without end or by a number of blocks. That is `TimedStreams`,
by which plans are predicted. `VirtualStreams` know beside the time what each lane has seen of the others (a vector
clock, Mattern 1989); so memory that is read before it is ready, or overwritten before it is free, is found whatever the
durations are: what nothing orders is an error even where it happens to go well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fluxq.offload.costs import BUFFERS
from fluxq.offload.ring import StreamingRing
from fluxq.offload.schedule import Schedule


class Race(RuntimeError):
    """Two lanes use the same memory, and no event orders them."""


class Span(NamedTuple):
    """What a lane did between two times."""

    label: str
    start: float
    end: float


@dataclass
class Lane:
    """Does one thing after another. time: when it is done with all it was given; stalled: seconds that it waited."""

    name: str
    time: float = 0.0
    stalled: float = 0.0
    spans: list[Span] = field(default_factory=list)

    def run(self, label: str, seconds: float) -> None:
        start = self.time
        self.time += seconds
        self.spans.append(Span(label, start, self.time))

    def wait_until(self, time: float) -> None:
        if time > self.time:
            self.stalled += time - self.time
            self.time = time


class TimedStreams:
    """Streams for a ring under a virtual clock; an event is a time. `copy_seconds`: the duration of a copy of so many
    bytes.

    run_ahead: how many operations the host may have given to the compute lane that it has not finished; None for any
    number. A copy cannot start before the host has got to it. The lanes are `compute`, `copy`, and for block inputs
    that go to the host and come back, `inputs`.
    """

    def __init__(
        self,
        copy_seconds: Callable[[int], float],
        labels: Mapping[int, str] | None = None,
        run_ahead: int | None = None,
    ) -> None:
        self.copy_seconds, self._labels = copy_seconds, labels or {}
        self._run_ahead, self.host_time, self.bus_until = run_ahead, 0.0, 0.0
        self.lanes: dict[str, Any] = {name: self.lane(name) for name in ("compute", "copy", "inputs")}

    def lane(self, name: str) -> Lane:
        return Lane(name)

    def compute(self, label: str, seconds: float, reads: Sequence[tuple[Tensor, Tensor]] = ()) -> None:
        """Compute for so long, reading slots: (slot, the source that its bytes should be of)."""
        lane = self.lanes["compute"]
        lane.run(label, seconds)
        if self._run_ahead is not None and len(lane.spans) > self._run_ahead:
            self.host_time = lane.spans[-1 - self._run_ahead].end

    def copy(self, slot: Tensor, source: Tensor) -> None:
        lane = self.lanes["copy"]
        lane.wait_until(max(self.host_time, self.bus_until))
        lane.run(self._label(source), self.copy_seconds(len(source)))

    def copied(self) -> Any:
        return self.lanes["copy"].time

    def computed(self) -> Any:
        return self.lanes["compute"].time

    def copy_waits(self, event: Any) -> None:
        self.lanes["copy"].wait_until(event)

    def compute_waits(self, event: Any) -> None:
        self.lanes["compute"].wait_until(event)

    def host_waits(self, event: Any) -> None:
        """The host's time is not counted."""

    def _label(self, source: Tensor | None) -> str:
        return "nothing" if source is None else self._labels.get(id(source), "a unit")


class Event(NamedTuple):
    """The state of a lane: the time at which it gets there, and how many operations of each lane come before that."""

    time: float
    seen: dict[str, int]


@dataclass
class WatchedLane(Lane):
    """A lane that knows how many operations of each lane are over when its next one starts."""

    seen: dict[str, int] = field(default_factory=dict)

    def run(self, label: str, seconds: float) -> None:
        super().run(label, seconds)
        self.seen[self.name] = self.seen.get(self.name, 0) + 1

    def event(self) -> Event:
        return Event(self.time, dict(self.seen))

    def wait(self, event: Event) -> None:
        self.wait_until(event.time)
        self.seen = {lane: max(self.seen.get(lane, 0), event.seen.get(lane, 0)) for lane in self.seen | event.seen}

    def knows(self, lane: str, number: int) -> bool:
        """Whether operation `number` of `lane` is over when this lane's next one starts."""
        return self.seen.get(lane, 0) >= number


@dataclass
class _Memory:
    """Who used a slot last: operations by their numbers. Before the ring it was somebody else's on the compute lane."""

    source: Tensor | None = None
    written: int = 0
    read: int = 1


class VirtualStreams(TimedStreams):
    """Streams under a virtual clock that raise Race where memory is used by two lanes and no event orders them."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._memory: dict[int, tuple[Tensor, _Memory]] = {}
        self.lanes["compute"].run("before", 0.0)

    def lane(self, name: str) -> WatchedLane:
        return WatchedLane(name)

    def compute(self, label: str, seconds: float, reads: Sequence[tuple[Tensor, Tensor]] = ()) -> None:
        lane = self.lanes["compute"]
        for slot, source in reads:
            memory = self._of(slot)
            if memory.source is not source:
                raise Race(f"{label} reads {self._label(memory.source)} where {self._label(source)} should be")
            if not lane.knows("copy", memory.written):
                raise Race(f"{label} reads {self._label(source)} before it is ready")
        super().compute(label, seconds, reads)
        for slot, _ in reads:
            self._of(slot).read = lane.seen["compute"]

    def copy(self, slot: Tensor, source: Tensor) -> None:
        lane, memory = self.lanes["copy"], self._of(slot)
        if not lane.knows("compute", memory.read):
            raise Race(f"{self._label(source)} overwrites {self._label(memory.source)} before its slot is free")
        super().copy(slot, source)
        memory.written, memory.source = lane.seen["copy"], source

    def copied(self) -> Event:
        return self.lanes["copy"].event()

    def computed(self) -> Event:
        return self.lanes["compute"].event()

    def copy_waits(self, event: Event) -> None:
        self.lanes["copy"].wait(event)

    def compute_waits(self, event: Event) -> None:
        self.lanes["compute"].wait(event)

    def _of(self, slot: Tensor) -> _Memory:
        return self._memory.setdefault(id(slot), (slot, _Memory()))[1]


class _Inputs:
    """Block inputs that wait on the host, as fluxq/offload/inputs.py has them: one lane both ways, in order. Beside the
    block's own, those of BUFFERS more may be on the card.

    They come back over the bus that units take too: of two copies the one that was asked for first goes first.
    """

    def __init__(self, streams: TimedStreams, sizes: Mapping[int, int]) -> None:
        self._streams, self._sizes, self._lane = streams, sizes, streams.lanes["inputs"]
        self._on_card: dict[int, float] = {}  # block -> when its last copy is done
        self.fetched = 0

    def store(self, number: int) -> None:
        """Before block `number` runs forward."""
        if number in self._sizes:
            self._copy(number, f"store {number}")
            while len(self._on_card) > 1 + BUFFERS:
                oldest = next(iter(self._on_card))
                self._streams.lanes["compute"].wait_until(self._on_card.pop(oldest))

    def take(self, number: int) -> None:
        """Before block `number` runs backward."""
        if number not in self._sizes:
            return
        for ahead in range(number, number - BUFFERS - 1, -1):
            if ahead in self._sizes and ahead not in self._on_card:
                self._lane.wait_until(self._streams.lanes["copy"].time)
                self._copy(ahead, f"fetch {ahead}")
                self._streams.bus_until = self._lane.time
                self.fetched += self._sizes[ahead]
        self._streams.lanes["compute"].wait_until(self._on_card.pop(number))

    def _copy(self, number: int, label: str) -> None:
        self._lane.wait_until(max(self._streams.lanes["compute"].time, self._streams.host_time))
        self._lane.run(label, self._streams.copy_seconds(self._sizes[number]))
        self._on_card[number] = self._lane.time


@dataclass(frozen=True)
class Timeline:
    """One training step in the long run: its seconds, those that compute waits for copies, and what the lanes did.

    Spans begin at the step's own zero. `copied` are the bytes that were moved.
    """

    seconds: float
    stalled: float
    copied: int
    spans: dict[str, list[Span]]

    @property
    def stall(self) -> float:
        """The share of the step in which compute waits."""
        return self.stalled / self.seconds if self.seconds else 0.0

    def busy(self, lane: str) -> float:
        """The share of the step in which a lane works; copies may have been begun in the step before."""
        spans = ((max(0.0, s.start), min(self.seconds, s.end)) for s in self.spans[lane])
        return sum(max(0.0, end - start) for start, end in spans) / self.seconds if self.seconds else 0.0


SETTLES = 2
"""After a pass aside, steps until they are alike again: the first has other units in the slots."""


def run_steps(
    schedule: Schedule,
    nbytes: Mapping[str, int],
    forward: Sequence[float],
    backward: Mapping[int, float],
    copy_seconds: Callable[[int], float],
    steps: int = 1,
    warmup: int = 1,
    tail: float = 0.0,
    run_ahead: int | None = None,
    ahead: Mapping[str, float] | None = None,
    every: int = 0,
    inputs: Mapping[int, int] | None = None,
    streams: type[TimedStreams] = TimedStreams,
) -> Timeline:
    """The mean of training steps in the long run, by the ring itself.

    nbytes: the length of each unit; forward: seconds of each block; backward: block's number -> seconds, replay
    included; tail: seconds of computing between steps (the optimiser, embedders) in which copies can go on; run_ahead:
    see TimedStreams. ahead: seconds with each unit aside, which are visited before one step of `every`. inputs: block's
    number -> bytes that wait on the host until it runs backward. `steps` are looked at after `warmup`; their spans are
    returned.
    """
    host = {unit: torch.empty(nbytes[unit], dtype=torch.uint8, device="meta") for unit in schedule.slot}
    clock = streams(copy_seconds, {id(source): unit for unit, source in host.items()}, run_ahead)
    ring = StreamingRing(schedule, host, lambda unit, flat: None, torch.device("meta"), clock)
    ring.expect(backward)
    settles = min(SETTLES, every)
    waiting, compute = _Inputs(clock, inputs or {}), clock.lanes["compute"]

    def visit(units: Sequence[str], label: str, seconds: float) -> None:
        with ring.resident(units):
            clock.compute(label, seconds, [(ring.memory(unit), host[unit]) for unit in units if unit in host])

    def step() -> None:
        for number, seconds in enumerate(forward):
            waiting.store(number)
            visit(schedule.blocks[number], f"forward {number}", seconds)
        for number in sorted(backward, reverse=True):
            waiting.take(number)
            visit(schedule.blocks[number], f"backward {number}", backward[number])
        compute.run("tail", tail)

    def repeat(times: int) -> None:
        for _ in range(times):
            step()

    def passes() -> None:
        ring.foresee([(unit,) for unit in ahead or ()])
        for unit, seconds in (ahead or {}).items():
            visit((unit,), f"ahead {unit}", seconds)
        repeat(settles)

    def counted(run: Callable[[], None]) -> tuple[float, float, int]:
        before = compute.time, compute.stalled, ring.bytes_copied + waiting.fetched
        run()
        after = compute.time, compute.stalled, ring.bytes_copied + waiting.fetched
        return after[0] - before[0], after[1] - before[1], after[2] - before[2]

    if ahead and every:
        passes()  # the one that counts meets what this one has left
    repeat(warmup)
    start = compute.time
    seconds, stalled, copied = (x / steps for x in counted(lambda: repeat(steps)))
    spans = {
        name: [Span(s.label, s.start - start, s.end - start) for s in lane.spans if s.end > start]
        for name, lane in clock.lanes.items()
    }
    if ahead and every:
        more = counted(passes)
        seconds += (more[0] - settles * seconds) / every
        stalled += (more[1] - settles * stalled) / every
        copied += (more[2] - settles * copied) / every
    return Timeline(seconds, stalled, round(copied), spans)
