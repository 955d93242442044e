"""How well a run does on images that it is not trained on, measured now and then: keeps the best LoRA, ends in time.

Each validation has the same images, captions, noise and noise levels, so its losses differ only by the weights. It also
measures as many images that are trained on: where their loss falls and that of held-out images does not, the LoRA
learns these images by heart.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from fluxq.caching.batches import held_out_batches
from fluxq.caching.store import Store
from fluxq.config import DataConfig
from fluxq.console import Notify, plural
from fluxq.data.dataset import Dataset
from fluxq.data.examples import Scan
from fluxq.data.folders import by_label
from fluxq.memory.retry import OutOfMemoryRetry
from fluxq.model.lora import lora_strength

from .objective import Objective
from .optim import FlatOptimizer
from .report import Report
from .run import Run
from .saves import Saves, is_due
from .state import MOST_TRAINED_ON, Measured, Progress, Validated

BANDS = ("low", "medium", "high")


@dataclass(frozen=True)
class Sets:
    """What is measured: the sets of held-out images by name, and images that are trained on."""

    held_out: Mapping[str, Dataset]
    training: Dataset
    store: Store

    def digest(self) -> str:
        """A hash of what is held out."""
        facts = [(name, dataset.digest()) for name, dataset in self.held_out.items()]
        return blake2b(repr(facts).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


def sets_of(everything: Dataset, trained_on: Dataset, scanned: Scan, data: DataConfig, store: Store) -> Sets:
    """everything: what `scanned` became. Which images that are trained on are measured depends on each alone, so that
    most of them stay when images are added.
    """
    held_out = {name: everything.part([folder.path]) for name, folder in by_label(data.validation).items()}
    if data.validation_split:
        name = "split" if "split" not in held_out else "--validation-split"
        held_out[name] = everything.part([folder.path for folder in data.folders], held_out=True)
    taught = {example.name for example in scanned.examples if not example.folder.regularization}
    count = min(MOST_TRAINED_ON, sum(len(dataset.examples) for dataset in held_out.values()))
    order = sorted((e for e in trained_on.examples if e.name in taught), key=lambda e: _place(e.name))
    return Sets(held_out, replace(trained_on, examples=tuple(order[:count])), store)


def _place(name: str) -> bytes:
    return blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8, person=b"fluxq.sample").digest()


class Validation:
    """Of `run`, whose `progress` holds what it finds."""

    def __init__(
        self,
        run: Run,
        progress: Progress,
        objective: Objective,
        optimizer: FlatOptimizer,
        sets: Sets,
        retry: OutOfMemoryRetry,
        notify: Notify,
    ) -> None:
        self.run, self.progress, self.objective, self.optimizer, self.sets = run, progress, objective, optimizer, sets
        self.retry, self.notify = retry, notify

    def begin(self, resume: bool) -> None:
        """Measure the base model and what training starts from. A run that resumes has both, unless what is held out
        changed: then former losses, the best among them, do not count.
        """
        so_far, images = self.progress.validation, self.sets.digest()
        if not self.sets.held_out or (resume and so_far.last and so_far.images in (None, images)):
            return
        if resume:
            base, first = self._base_model(), None
            self.notify(f"other images are held out than before, so validation starts anew; base model {base.loss:.4f}")
        else:
            first, _ = self._measure(0)
            lora = self.run.config.lora
            base = first if lora.from_lora is None and lora.init != "loftq" else self._base_model()
            own = "" if base is first else f"; base model {base.loss:.4f}"
            self.notify(f"validation before: {described(first)}{own}")
        self.progress.validation = Validated(base, first, first, images=images)

    def after(self, step: int, report: Report, saves: Saves) -> None:
        """Measure after `step` steps, if it is time for that and it was not done. The LoRA is kept if it is the best so
        far; without a better one for too long, `run.last_step` becomes this step.
        """
        training, so_far = self.run.config.training, self.progress.validation
        done = so_far.last is not None and so_far.last.step == step
        if done or not self.sets.held_out or not is_due(training.validate_every or 0, step, self.run.last_step):
            return
        now, seconds = self._measure(step)
        better = math.isfinite(now.loss) and (so_far.best is None or now.loss < so_far.best.loss)
        found = replace(so_far, last=now, waited=0 if better else so_far.waited + 1)
        report.validated(now, seconds)
        self.progress.validation = replace(found, best=now) if better else found  # before it is saved
        if better and not saves.best():
            self.progress.validation = found
        self.notify(f"validation after step {step}: {described(now)}{compared(now, self.progress.validation)}")
        if found.is_over(training.early_stopping):
            self.run.last_step = step

    def results(self) -> dict[str, Any]:
        """What result.json has of it."""
        found = self.progress.validation
        if found.last is None:
            return {"validation_before": None, "validation_after": None, "validation": None}
        first, best = found.before, found.best
        about = {
            "base_model": found.base and asdict(found.base),
            "before": first and asdict(first),
            "after": asdict(found.last),
            "best": best and {"step": best.step, "loss": best.loss, "lora": str(self.run.best_file)},
            "stopped_early": self._why_early(),
        }
        losses = [one and {name: losses["loss"] for name, losses in one.sets.items()} for one in (first, found.last)]
        return {"validation_before": losses[0], "validation_after": losses[1], "validation": about}

    def _why_early(self) -> str | None:
        found, steps = self.progress.validation, self.run.config.training.steps
        if self.run.last_step == steps:
            return None
        since = f", since step {found.best.step}" if found.best else ""
        return (
            f"stopped after step {self.run.last_step} of {steps}: {plural(found.waited, 'validation')} in a row had no "
            f"lower loss of held-out images{since} (--early-stopping)"
        )

    def _base_model(self) -> Measured:
        """The losses without the LoRA."""
        with ExitStack() as off:
            for model in (self.objective.flux, self.objective.clip):
                if model is not None:
                    off.enter_context(lora_strength(model, 0.0))
            return self._measure(0)[0]

    def _measure(self, step: int) -> tuple[Measured, float]:
        """The losses with the weights that would be saved now, and the seconds that it took."""
        began = time.perf_counter()
        work = partial(measured, self.objective, self.sets, step)
        with self.optimizer.evaluating():
            found = self.retry.run("validation", work, training=False)
        return found, time.perf_counter() - began


def measured(objective: Objective, sets: Sets, step: int) -> Measured:
    """The losses of `sets`, for a validation after `step` steps."""
    size = objective.training.batch

    def errors(dataset: Dataset) -> Tensor:
        return objective.validation(held_out_batches(dataset, sets.store, size))

    held_out = {name: errors(dataset) for name, dataset in sets.held_out.items()}
    training = by_band(errors(sets.training)) if sets.training.examples else {}
    together = by_band(torch.cat([*held_out.values()], dim=1))
    return Measured(step, together, {name: by_band(found) for name, found in held_out.items()}, training)


def by_band(errors: Tensor) -> dict[str, float]:
    """The mean of errors (times, images) at all times, from low noise to high, and in each third of them."""
    bands = zip(BANDS, errors.tensor_split(len(BANDS)), strict=True)
    return {"loss": float(errors.mean())} | {name: float(part.mean()) for name, part in bands}


def described(found: Measured) -> str:
    losses = {name: losses["loss"] for name, losses in found.sets.items()} if len(found.sets) > 1 else {}
    losses["held-out images"] = found.loss
    bands = ", ".join(f"{name} {found.held_out[name]:.4f}" for name in BANDS)
    training = f"; training images {found.training['loss']:.4f}" if found.training else ""
    return f"{', '.join(f'{name} {loss:.4f}' for name, loss in losses.items())} (noise: {bands}){training}"


def compared(now: Measured, found: Validated) -> str:
    """How `now` compares with the base model and with the best."""
    change = f"; {now.loss / found.base.loss - 1:+.1%} from the base model" if found.base else ""
    if found.best and found.best.step != now.step:
        return f"{change}; the best is {found.best.loss:.4f} of step {found.best.step}"
    return change + ("; the best so far" if found.best else "")
