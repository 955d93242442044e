"""What is wrong with a run, from its steps so far: gradients that are not finite, a loss that climbs, steps that became
slow. Each is said once, with what to do; slow steps are said again if they come again after a while. A check reads the
first and the last records only, so it takes as long at step 20,000 as at step 1,000.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean, median

from fluxq.config import OPTIMIZERS
from fluxq.errors import WrongRequest

from .history import STEPS
from .watch import Watch

BAD_IN_A_ROW, BAD_OF_LAST, LAST = 5, 20, 1000
HIGHEST_LEARNING_RATE = 1e-2
"""Of AdamW and optimizers like it, whose steps are about as long as the learning rate, whatever the gradient."""

SETTLED = 20
"""Steps of a process until its memory and its pace are those of all later ones."""

PAUSE = 100
"""Steps between two lines about slow steps."""
WINDOW = 20
"""Steps before one that are compared with it."""

MAY_BE = {
    "slow": "another program may be using the GPU or the disk, or the machine was asleep",
    "grown": "please report it",
}
"""Warning -> what to say if nothing is known to have changed."""


class Health:
    """Watches the records of a run (those of log.jsonl, in order), from its first step even if it is resumed; pace and
    memory are those of this process. watch: tells what changed, and this machine's last runs.
    """

    def __init__(self, records: Sequence[Mapping], watch: Watch | None = None) -> None:
        self.records, self.watch = records, watch
        self._first = len(records)
        self._said: dict[str, int] = {}  # name of a warning -> the step at which it was last given

    @property
    def is_bad(self) -> bool:
        """Whether the last step had a gradient that is not finite, and so no update."""
        return bool(self.records) and not _is_finite(self.records[-1])

    @property
    def is_hopeless(self) -> bool:
        """Whether too many of the last steps had no finite gradient for training to go on."""
        recent = self.records[-LAST:]
        in_a_row = len(recent) >= BAD_IN_A_ROW and not any(map(_is_finite, recent[-BAD_IN_A_ROW:]))
        return in_a_row or sum(not _is_finite(r) for r in recent) >= BAD_OF_LAST

    @property
    def is_worthless(self) -> bool:
        """Whether the weights may be what is wrong: training cannot go on, or more than the last step was bad."""
        return self.is_hopeless or not any(map(_is_finite, self.records[-2:]))

    def check(self) -> Iterator[str]:
        """What is new since the last step, a line each. Raises WrongRequest if training cannot go on."""
        if self.is_bad and self.is_hopeless:
            raise WrongRequest(self.refusal(self.records[-1]["step"]))
        done = len(self.records) - self._first
        if self.watch and done == SETTLED:
            self.watch.settle()
        for name, line in self._warnings(done):
            last = self._said.get(name)
            if line and (last is None or name == "slow" and done > last + PAUSE):
                self._said[name] = done
                yield f"warning: {line}{self._why(name)}"

    def refusal(self, step: int) -> str:
        bad = sum(not _is_finite(r) for r in self.records[-LAST:])
        return (
            f"{bad} of the last {min(LAST, len(self.records))} steps, up to step {step}, had no finite gradient; the "
            "last save is intact; lower --lr, or take out the images named above"
        )

    def _why(self, name: str) -> str:
        """What changed, if the warning `name` is about that, or what may have."""
        if name not in MAY_BE:
            return ""
        changes = self.watch.changes(self.records[-1]["step"]) if self.watch else []
        return f"; what changed: {', '.join(changes)}" if changes else f"; {MAY_BE[name]}"

    def ended(self) -> str | None:
        """At the end, keep the pace and memory of this process for later runs. If only now they are worse than those of
        the last runs, the line about it.
        """
        if self.watch is None:
            return None
        own = self.records[self._first :]
        line = None if "regression" in self._said else self.watch.regression(own)
        self.watch.remember(own)
        return line and f"warning: {line}"

    def _warnings(self, done: int) -> Iterator[tuple[str, str | None]]:
        """Warning -> its line, if there is reason for one. done: the steps of this process."""
        settled = self.records[self._first : self._first + SETTLED]
        yield "climbing", climbing_loss(self.records)
        yield "dead", dead_gradient(self.records)
        yield "slow", slow_step(self.records[-min(done, WINDOW + 1) :])
        yield "grown", grown_memory([*settled, self.records[-1]]) if done > SETTLED else None
        if self.watch and done == STEPS:
            yield "regression", self.watch.regression(self.records[self._first :])


def _is_finite(record: Mapping) -> bool:
    return math.isfinite(record["grad"])


def climbing_loss(records: Sequence[Mapping], window: int = 100) -> str | None:
    """A loss above three times that of the first `window` steps, for as many steps."""
    first, last = ([r["loss"] for r in part if _is_finite(r)] for part in (records[:window], records[-window:]))
    if len(records) < 2 * window or not (first and last) or min(last) <= 3 * (start := fmean(first)):
        return None
    return f"the loss has been above {3 * start:.3g}, three times its start, for {window} steps; a lower --lr may help"


def dead_gradient(records: Sequence[Mapping], window: int = 20) -> str | None:
    """Gradients of exactly zero."""
    if len(records) < window or any(r["grad"] for r in records[-window:]):
        return None
    return f"the gradient has been zero for {window} steps, so nothing is learned; check --targets and --lr"


def slow_step(records: Sequence[Mapping], window: int = WINDOW) -> str | None:
    """A step of over a second, and five times the median of those before it."""
    if len(records) <= window or not (before := [r.get("seconds", 0.0) for r in records[-window - 1 : -1]]):
        return None
    now, usual = records[-1].get("seconds", 0.0), median(before)
    if now <= max(5 * usual, 1.0):
        return None
    return f"step {records[-1]['step']} took {now:.1f} s, the {window} before it {usual:.1f} s each"


def grown_memory(records: Sequence[Mapping], settled: int = SETTLED) -> str | None:
    """A peak 10 % above that of step `settled`."""
    if len(records) <= settled:
        return None
    at, now = (r.get("peak_bytes") for r in (records[settled - 1], records[-1]))
    if not at or not now or now <= 1.1 * at:
        return None
    return f"peak memory grew from {at / 2**30:.1f} GiB at step {records[settled - 1]['step']} to {now / 2**30:.1f} GiB"


def high_learning_rate(learning_rate: float, optimizer: str = "adamw") -> list[str]:
    if learning_rate <= HIGHEST_LEARNING_RATE or not (optimizer in OPTIMIZERS and optimizer != "prodigy"):
        return []
    return [
        f"warning: a learning rate of {learning_rate:g} is very high for {optimizer}, which usually takes 1e-5 to 1e-3"
    ]
