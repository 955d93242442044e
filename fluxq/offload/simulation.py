"""Training steps of the shipped ring under a virtual clock (clock.py): how long a step takes in the long run, and when
compute waits for copies of units, of block inputs, or of what is computed ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from .clock import Span, TimedStreams
from .inputs import Transit
from .ring import StreamingRing
from .schedule import Schedule


@dataclass(frozen=True)
class Timeline:
    """One training step in the long run: its seconds, those that compute waits for copies, and what the lanes did.

    Spans count from the start of the step. `copied` is the number of bytes copied.
    """

    seconds: float
    stalled: float
    copied: int
    spans: dict[str, list[Span]]

    @property
    def stall(self) -> float:
        """The fraction of the step in which compute waits."""
        return self.stalled / self.seconds if self.seconds else 0.0

    def busy(self, lane: str) -> float:
        """The fraction of the step in which a lane works; copies may have started in the step before."""
        spans = ((max(0.0, s.start), min(self.seconds, s.end)) for s in self.spans[lane])
        return sum(max(0.0, end - start) for start, end in spans) / self.seconds if self.seconds else 0.0


SETTLES = 2
"""Steps after a pass ahead until steps are alike again: the first one finds other units in the slots."""


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

    nbytes: the length of each unit; forward: seconds of each block; backward: block number -> seconds, replay included;
    tail: seconds of compute between steps (the optimizer, embedders) during which copies continue; run_ahead: see
    TimedStreams. ahead: extra unit -> seconds; all of them are visited before every `every`-th step. inputs: block
    number -> bytes that are kept on the host until it runs backward. Measures `steps` after `warmup`; returns their
    spans.
    """
    host = {unit: torch.empty(nbytes[unit], dtype=torch.uint8, device="meta") for unit in schedule.slot}
    clock = streams(copy_seconds, {id(source): unit for unit, source in host.items()}, run_ahead)
    ring = StreamingRing(schedule, host, lambda unit, flat: None, torch.device("meta"), clock)
    ring.expect(backward)
    settles = min(SETTLES, every)
    waiting, compute = _TimedInputs(clock, inputs or {}), clock.lanes["compute"]

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
        ring.announce([(unit,) for unit in ahead or ()])
        for unit, seconds in (ahead or {}).items():
            visit((unit,), f"ahead {unit}", seconds)
        repeat(settles)

    def counted(run: Callable[[], None]) -> tuple[float, float, int]:
        before = compute.time, compute.stalled, ring.bytes_copied + waiting.fetched
        run()
        after = compute.time, compute.stalled, ring.bytes_copied + waiting.fetched
        return after[0] - before[0], after[1] - before[1], after[2] - before[2]

    if ahead and every:
        passes()  # the pass that counts finds what this one leaves
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


class _TimedInputs(Transit[int]):
    """Block inputs as numbers of bytes, by block number, on a lane that copies both ways, in order.

    A search simulates many thousands of steps, so no tensors are made. Fetches share the bus with copies of units: of
    two copies, the one requested first goes first.
    """

    def __init__(self, streams: TimedStreams, sizes: Mapping[int, int]) -> None:
        super().__init__()
        self._streams, self._sizes, self._lane = streams, sizes, streams.lanes["inputs"]
        self._stored = sorted(sizes)
        self._places = {number: place for place, number in enumerate(self._stored)}
        self.fetched = 0

    def store(self, number: int) -> None:
        """Call this before block `number` runs forward."""
        if number in self._sizes:
            self.to_host(number)

    def take(self, number: int) -> None:
        """Call this before block `number` runs backward."""
        if number in self._sizes:
            self.to_gpu(self._stored, self._places[number])

    def _copy_to_host(self, inputs: int) -> float:
        return self._copy(inputs, f"store {inputs}")

    def _copy_to_gpu(self, inputs: int) -> float:
        self._lane.wait_until(self._streams.lanes["copy"].time)
        self._streams.bus_until = self._copy(inputs, f"fetch {inputs}")
        self.fetched += self._sizes[inputs]
        return self._lane.time

    def _compute_waits(self, event: float) -> None:
        self._streams.lanes["compute"].wait_until(event)

    def _copy(self, number: int, label: str) -> float:
        self._lane.wait_until(max(self._streams.lanes["compute"].time, self._streams.host_time))
        self._lane.run(label, self._streams.copy_seconds(self._sizes[number]))
        return self._lane.time
