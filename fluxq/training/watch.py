"""What a run's steps are compared with: its own earlier ones, and this machine's last runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fluxq.config import TrainConfig
from fluxq.memory.conditions import differences, read_conditions
from fluxq.memory.retry import OutOfMemoryRetry
from fluxq.models.parts import Models

from .history import History, compared, kind_of, summary
from .objective import NumberedBatches


class Watch:
    """Of a run that trains on `batches` as `config` says, under the plan of `retry`."""

    def __init__(self, config: TrainConfig, models: Models, batches: NumberedBatches, retry: OutOfMemoryRetry) -> None:
        self.config, self.batches, self.retry = config, batches, retry
        self._first = self._placement = retry.placement
        self._history = History(kind_of(config, models, retry.placement))
        self._conditions, self._disturbed = {}, False

    def settle(self) -> None:
        """Compare with what is now, from now on."""
        self._conditions, self._placement = read_conditions(), self.retry.placement

    def changes(self, step: int, window: int = 20) -> list[str]:
        """What is other in step `step`, counted from 1, than when this was last asked, and than in the steps before."""
        found = []
        if self.retry.placement is not self._placement:
            found.append("its plan changed because memory ran out")
        before = {bucket for other in range(max(1, step - window), step) for bucket in self._buckets(other)}
        if new := self._buckets(step) - before:
            sizes = " and ".join(f"{width} x {height}" for width, height in sorted(new))
            found.append(f"none of the {window} steps before it had its bucket, {sizes}")
        samples, output, training = self.config.samples, self.config.output, self.config.training
        between = {"previews": samples.every, "a save": output.save_every, "a validation": training.validate_every}
        for what, every in between.items():
            if every and step > 1 and (step - 1) % every == 0:
                found.append(f"{what} came just before it")
        old = self._conditions
        self.settle()
        worse = differences(old, self._conditions)
        self._disturbed = self._disturbed or bool(worse)
        return found + worse

    def images_seen(self, steps: int) -> int:
        """How many images the first `steps` steps see, counting each time."""
        return self.batches.seen_before(steps * self.config.training.accumulate)

    def regression(self, records: Sequence[Mapping]) -> str | None:
        """A line if the steps of this process are slower or bigger than those of the last runs that can be compared."""
        now, runs = summary(records), self._history.runs()
        return compared(now, runs) if now and runs and self._is_comparable else None

    def remember(self, records: Sequence[Mapping]) -> None:
        """Keep the steps of this process for later runs, if they can be compared."""
        if self._is_comparable and (run := summary(records)):
            self._history.add(run)

    @property
    def _is_comparable(self) -> bool:
        """Whether its plan is still the same, and other programs or heat were never seen to slow a step."""
        return not self._disturbed and self.retry.placement is self._first

    def _buckets(self, step: int) -> set[tuple[int, int]]:
        accumulate = self.config.training.accumulate
        return {self.batches.bucket_of(index) for index in range((step - 1) * accumulate, step * accumulate)}
