"""A virtual clock: the ring that trains, run on lanes that take no time, tells how long it would take elsewhere.

Each lane does its operations one after another, each for a given number of seconds, and starts one when the events that
it waits for have happened. The host runs ahead of both, without end or by a number of blocks. Beside the time, each
lane knows what it has seen of the others (a vector clock, Mattern 1989); so memory that is read before it is ready, or
overwritten before it is free, is found whatever the durations are: what nothing orders is an error even where it
happens to go well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fluxq.offload.ring import StreamingRing
from fluxq.offload.schedule import Schedule
from fluxq.offload.streams import Bytes


class Race(RuntimeError):
    """Two lanes use the same memory, and no event orders them."""


class Span(NamedTuple):
    """What a lane did between two times."""

    label: str
    start: float
    end: float


class Event(NamedTuple):
    """The state of a lane: the time at which it gets there, and how many operations of each lane come before that."""

    time: float
    seen: dict[str, int]


@dataclass
class Lane:
    name: str
    time: float = 0.0
    stalled: float = 0.0
    seen: dict[str, int] = field(default_factory=dict)
    spans: list[Span] = field(default_factory=list)

    def run(self, label: str, seconds: float) -> int:
        """Do something; the number that it has on this lane, from 1."""
        self.spans.append(Span(label, self.time, self.time + seconds))
        self.time += seconds
        self.seen[self.name] = self.seen.get(self.name, 0) + 1
        return self.seen[self.name]

    def event(self) -> Event:
        return Event(self.time, dict(self.seen))

    def wait(self, event: Event) -> None:
        self.stalled += max(0.0, event.time - self.time)
        self.time = max(self.time, event.time)
        self.seen = {lane: max(self.seen.get(lane, 0), event.seen.get(lane, 0)) for lane in self.seen | event.seen}

    def knows(self, lane: str, number: int) -> bool:
        """Whether operation `number` of `lane` is over when this lane's next one starts."""
        return self.seen.get(lane, 0) >= number


@dataclass
class _Memory:
    """Who used a slot last: operations by their numbers. Before the ring it was somebody else's on the compute lane."""

    source: Bytes | None = None
    written: int = 0
    read: int = 1


class VirtualStreams:
    """Streams for a ring under a virtual clock. `copy_seconds` gives the duration of a copy of so many bytes.

    run_ahead: how many operations the host may have given to the compute lane that it has not finished; None for any
    number. A copy cannot start before the host has got to it. The lanes are `compute`, `copy`, and for block inputs
    that go to the host and come back, `activations`.
    """

    def __init__(
        self,
        copy_seconds: Callable[[int], float],
        labels: Mapping[int, str] | None = None,
        run_ahead: int | None = None,
    ) -> None:
        self._run_ahead, self._host_time = run_ahead, 0.0
        self.lanes = {name: Lane(name) for name in ("compute", "copy", "activations")}
        self._copy_seconds, self._labels = copy_seconds, labels or {}
        self._memory: dict[int, tuple[Tensor, _Memory]] = {}
        self.lanes["compute"].run("before", 0.0)

    def compute(self, label: str, seconds: float, reads: Sequence[tuple[Tensor, Tensor]] = ()) -> None:
        """Compute for so long, reading slots: (slot, the source that its bytes should be of). Raises Race."""
        lane = self.lanes["compute"]
        for slot, source in reads:
            memory = self._of(slot)
            if memory.source is not source:
                raise Race(f"{label} reads {self._label(memory.source)} where {self._label(source)} should be")
            if not lane.knows("copy", memory.written):
                raise Race(f"{label} reads {self._label(source)} before it is ready")
        number = lane.run(label, seconds)
        for slot, _ in reads:
            self._of(slot).read = number
        if self._run_ahead is not None and len(lane.spans) > self._run_ahead:
            self._host_time = lane.spans[-1 - self._run_ahead].end

    def copy(self, slot: Tensor, source: Bytes) -> None:
        lane, memory = self.lanes["copy"], self._of(slot)
        if not lane.knows("compute", memory.read):
            raise Race(f"{self._label(source)} overwrites {self._label(memory.source)} before its slot is free")
        lane.wait(Event(self._host_time, {}))
        memory.written, memory.source = lane.run(self._label(source), self._copy_seconds(len(source))), source

    def copied(self) -> Event:
        return self.lanes["copy"].event()

    def computed(self) -> Event:
        return self.lanes["compute"].event()

    def copy_waits(self, event: Event) -> None:
        self.lanes["copy"].wait(event)

    def compute_waits(self, event: Event) -> None:
        self.lanes["compute"].wait(event)

    def host_waits(self, event: Event) -> None:
        """The host's time is not counted."""

    def _of(self, slot: Tensor) -> _Memory:
        return self._memory.setdefault(id(slot), (slot, _Memory()))[1]

    def _label(self, source: Bytes | None) -> str:
        return "nothing" if source is None else self._labels.get(id(source), "a unit")


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
) -> Timeline:
    """The mean of `steps` training steps after `warmup`, by the ring itself.

    nbytes: the length of each unit; forward: seconds of each block; backward: block's number -> seconds, replay
    included; tail: seconds of computing between steps (the optimiser, embedders) in which copies can go on; run_ahead:
    see VirtualStreams.
    """
    host = {unit: torch.empty(nbytes[unit], dtype=torch.uint8, device="meta") for unit in schedule.slot}
    streams = VirtualStreams(copy_seconds, {id(source): unit for unit, source in host.items()}, run_ahead)
    ring = StreamingRing(schedule, host, lambda unit, flat: None, torch.device("meta"), streams)
    ring.expect(backward)
    compute, start, stalled, copied = streams.lanes["compute"], 0.0, 0.0, 0

    def visit(number: int, direction: str, seconds: float) -> None:
        units = schedule.blocks[number]
        with ring.resident(units):
            reads = [(ring.memory(unit), host[unit]) for unit in units if unit in host]
            streams.compute(f"{direction} {number}", seconds, reads)

    for step in range(warmup + steps):
        if step == warmup:
            start, stalled, copied = compute.time, compute.stalled, ring.bytes_copied
        for number, seconds in enumerate(forward):
            visit(number, "forward", seconds)
        for number in sorted(backward, reverse=True):
            visit(number, "backward", backward[number])
        compute.run("tail", tail)
    return Timeline(
        (compute.time - start) / steps,
        (compute.stalled - stalled) / steps,
        (ring.bytes_copied - copied) // steps,
        {
            name: [Span(s.label, s.start - start, s.end - start) for s in lane.spans if s.end > start]
            for name, lane in streams.lanes.items()
        },
    )
