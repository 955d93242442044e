"""What a run saves while it trains: first the state, which --resume needs, then the LoRA.

A disk that is full or gone does not end a run that can go on: the save is tried again, after pauses that grow. If the
run has to end without it, the state goes to another folder, and the message says where.

If the GPU fails, the last finished step is saved if it can still be read. A kernel's illegal access takes all of the
GPU's memory with it: then the last save is what remains.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from fluxq.console import Notify
from fluxq.errors import GPUFailure, WrongRequest, first_line, is_gpu_failure
from fluxq.memory.retry import OutOfMemoryRetry
from fluxq.model.linear import Linear

from .optim import FlatOptimizer
from .report import Report
from .run import Run
from .state import Progress, save_state

PAUSES = (30.0, 60.0, 120.0, 300.0, 600.0)
"""Seconds between two attempts to save."""


class Saves:
    """The saves of `run`. `progress.step` is the last finished step; began: now less the seconds of
    training, in seconds since 1970; `write_lora(step, best=False)` writes the LoRA.
    """

    def __init__(
        self,
        run: Run,
        report: Report,
        progress: Progress,
        began: float,
        layers: Mapping[str, Linear],
        optimizer: FlatOptimizer,
        retry: OutOfMemoryRetry,
        write_lora: Callable[..., object],
        notify: Notify,
    ) -> None:
        self.run, self.report, self.progress, self.layers, self.optimizer = run, report, progress, layers, optimizer
        self.began, self.retry, self.write_lora, self.notify = began, retry, write_lora, notify
        self._saved = progress.step  # the step of the state on the disk
        self._failures, self._again_at = 0, math.inf

    @property
    def is_overdue(self) -> bool:
        """Whether a save failed or was left out, and its pause is over."""
        return time.monotonic() >= self._again_at

    def __enter__(self) -> Saves:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """If the GPU failed, raise GPUFailure, with what is saved and how to go on."""
        if error is not None and is_gpu_failure(error):
            raise GPUFailure(
                f"the GPU failed after step {self.progress.step} ({first_line(error)}); {self._kept()}; if it fails "
                "again, look for Xid in the system's log, update the driver, and undo overclocking"
            ) from error

    def save(self, required: bool) -> None:
        """Save state and LoRA of the last finished step. If that fails: notify, or if it is `required`, put the state
        elsewhere and raise WrongRequest.

        After a step that had no finite gradient only what is required is saved, and after several nothing: the weights
        may be what is wrong.
        """
        if self.report.health.is_bad:
            if required and self.report.health.is_worthless:
                raise WrongRequest(self.report.health.refusal(self.progress.step))
            if not required:
                self._again_at = time.monotonic()  # with the next step
                return
        try:
            self._all()
            self._failures, self._again_at = 0, math.inf
        except (WrongRequest, OSError) as error:
            if required:
                raise WrongRequest(f"{error}; {self._elsewhere()}") from error
            pause = PAUSES[min(self._failures, len(PAUSES) - 1)]
            self._failures, self._again_at = self._failures + 1, time.monotonic() + pause
            self.notify(
                f"step {self.progress.step} could not be saved: {error}; training goes on, next try in {pause:.0f} s"
            )

    def best(self) -> bool:
        """Save the state and, as the best, the LoRA of the last finished step. Whether that succeeded: otherwise, which
        is notified, the best LoRA is the one before.

        A run is resumed from a state no older than its best LoRA, which is thus never of steps that are repeated.
        """
        if self.report.health.is_bad:
            return False
        try:
            self._all(best=True)
        except (WrongRequest, OSError) as error:
            self.notify(f"the LoRA of step {self.progress.step}, the best so far, could not be saved: {error}")
            return False
        return True

    def complete(self) -> None:
        """Write the LoRAs that are missing because what ended a run came between its state and them."""
        step, best = self.progress.step, self.progress.validation.best
        if best and best.step == step:
            self.write_lora(step, best=True)
        due = is_due(self.run.config.output.save_every, step, self.run.last_step)
        if (due or not best or best.step < step) and not self.run.lora_file(step).exists():
            self.write_lora(step)

    def last_step(self) -> None:
        """Save the state of the last finished step from another thread, while the next one is on its way."""
        try:
            with self.optimizer.changing:  # neither an update nor another save is on its way
                step = self.progress.step
                if self.optimizer.done != step or self._saved == step or self.report.health.is_bad:
                    return
                self.report.sync()
                self._state(self.run.state_file)
            self.notify(f"saved step {step} meanwhile; --resume continues from there")
        except (WrongRequest, OSError, RuntimeError) as error:
            why = str(error) if isinstance(error, WrongRequest) else first_line(error)
            self.notify(f"step {self.progress.step} could not be saved: {why}")

    def _all(self, best: bool = False) -> None:
        self.report.sync()
        self._state(self.run.state_file)
        self.retry.placement.save(self.run.folder)
        self.write_lora(self.progress.step, best=best)

    def _state(self, path: Path) -> None:
        with self.optimizer.changing:
            self.progress.seconds = time.time() - self.began
            save_state(path, self.progress, self.layers, self.optimizer)
            if path == self.run.state_file:
                self._saved = self.progress.step

    def _kept(self) -> str:
        """Save the last finished step after the GPU failed, if that is possible. What is saved, in words."""
        step, again = self.progress.step, f"continue with: fluxq train --resume {self.run.folder}"
        if self.optimizer.done == step and self._saved != step and not self.report.health.is_bad:
            try:
                self.report.sync()
                self._state(self.run.state_file)
            except (WrongRequest, OSError):
                return self._elsewhere()
            except RuntimeError:  # the GPU does not answer
                pass
        if self._saved == step and step:
            return f"that step is saved; {again}"
        if self._saved:
            return f"everything since is lost: the last save is that of step {self._saved}; {again}"
        return "what it held is lost, and nothing was saved yet; start again with --overwrite"

    def _elsewhere(self) -> str:
        """Where the state is now, in words."""
        if self._saved == self.progress.step:
            return f"the state of step {self._saved} is saved; continue with: fluxq train --resume {self.run.folder}"
        name = f"{self.run.name}-state-step{self.progress.step:08}.safetensors"
        for folder in (lambda: self.run.folder.parent, tempfile.gettempdir):
            try:
                self._state(path := Path(folder(), name))
            except (WrongRequest, OSError):
                continue
            return (
                f"the state of step {self.progress.step} is in {path}: move it to {self.run.state_file} and "
                f"continue with: fluxq train --resume {self.run.folder}"
            )
        return f"the last save is that of step {self._saved}; continue from it with --resume {self.run.folder}"


def is_due(every: int, done: int, steps: int) -> bool:
    """Whether `done` is the last step or a multiple of `every` (0: only the last)."""
    return done == steps or bool(every and done % every == 0)
