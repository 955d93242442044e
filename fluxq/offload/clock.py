"""A virtual clock: on its lanes the shipped ring runs in no time and reports how long it would take on a GPU.

Each lane runs its operations one after another, each for a given number of seconds, and starts one when the events that
it waits for have happened. The host runs ahead of both lanes, without limit or by a number of operations. That is
`TimedStreams`, which predicts plans. `VirtualStreams` also track what each lane has seen of the others (a vector clock,
Mattern 1989). So they find memory that is read before it is ready or overwritten before it is free, whatever the
durations: a missing order is an error even if the timing happens to work out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from .streams import Bytes


class Race(RuntimeError):
    """Two lanes use the same memory, and no event orders them."""


class Span(NamedTuple):
    """What a lane did between two times."""

    label: str
    start: float
    end: float


@dataclass
class Lane:
    """Runs one operation after another. time: when its last operation ends; stalled: seconds that it waited."""

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
    """Streams for a ring under a virtual clock; an event is a time. `copy_seconds`: bytes -> how long a copy takes.

    run_ahead: how many unfinished operations the host may have queued on the compute lane; None for no limit. A copy
    cannot start before the host has issued it. The lanes are `compute`, `copy`, and `inputs` for block inputs that go
    to the host and come back.
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
        """Compute for `seconds`, reading slots: (slot, the source whose bytes it should hold)."""
        lane = self.lanes["compute"]
        lane.run(label, seconds)
        if self._run_ahead is not None and len(lane.spans) > self._run_ahead:
            self.host_time = lane.spans[-1 - self._run_ahead].end

    def copy(self, slot: Tensor, source: Bytes) -> None:
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
        """Not simulated: the host's time does not count."""

    def hold(self, held: object) -> None: ...

    def _label(self, source: Bytes | None) -> str:
        return "nothing" if source is None else self._labels.get(id(source), "a unit")


class Event(NamedTuple):
    """The state of a lane: its time, and how many operations of each lane are done by then."""

    time: float
    seen: dict[str, int]


@dataclass
class WatchedLane(Lane):
    """A lane that knows how many operations of each lane are done when its next one starts."""

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
        """Whether operation `number` of `lane` is done when this lane's next one starts."""
        return self.seen.get(lane, 0) >= number


@dataclass
class _Memory:
    """Who used a slot last, by the numbers of operations. Before the ring, an operation on the compute lane used it."""

    source: Bytes | None = None
    written: int = 0
    read: int = 1


class VirtualStreams(TimedStreams):
    """Streams under a virtual clock that raise Race if two lanes use the same memory and no event orders them."""

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

    def copy(self, slot: Tensor, source: Bytes) -> None:
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
        key = slot.untyped_storage()._cdata  # a copy may get a view of the slot
        return self._memory.setdefault(key, (slot, _Memory()))[1]
