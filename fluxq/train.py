"""`fluxq train`: folders of images to a LoRA. Read it top to bottom.

Every step draws what it needs by its own number, so stopping and resuming changes nothing (data/randomness.py).
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from fluxq.caching import Batches, Store, Text
from fluxq.caching.folders import cache_folders
from fluxq.config import TrainConfig
from fluxq.console import Notify, console, progress_bar, silent
from fluxq.data import Dataset, Scan, generator
from fluxq.errors import Stopped
from fluxq.formats.lora import Lora
from fluxq.formats.stream import expect_training
from fluxq.memory.peak import peak_bytes, reset_peak
from fluxq.memory.phases import gpu_budget
from fluxq.memory.placement import Placement, place
from fluxq.memory.retry import OutOfMemoryRetry, repeated_once
from fluxq.model import Flux
from fluxq.model.calibration import set_rotations
from fluxq.model.clip import CLIP_TARGETS, Clip
from fluxq.model.linear import Linear
from fluxq.model.lora import add_adapted, add_lora
from fluxq.model.modulation import is_known_ahead
from fluxq.models import Models
from fluxq.sampling.denoising import encode_pooled
from fluxq.training.asked import refuse_without_effect
from fluxq.training.defaults import Epoch, epoch_of, resolve
from fluxq.training.describe import Metadata, metadata_of
from fluxq.training.disk import require_room_for_run
from fluxq.training.dropout import Dropout
from fluxq.training.from_lora import read_start, start_from
from fluxq.training.initial import empty, prepare
from fluxq.training.libraries import parse_arguments
from fluxq.training.objective import Objective, class_captions
from fluxq.training.optim import FlatOptimizer, build_optimizer, lora_groups, optimizer_step, restart_rates
from fluxq.training.previews import preview_prompts, save_previews
from fluxq.training.report import Report
from fluxq.training.run import Result, Run
from fluxq.training.saves import Saves, is_due
from fluxq.training.schedules import learning_rate_factor
from fluxq.training.state import Progress, load_state
from fluxq.training.stopping import StopRequest
from fluxq.training.summary import slower, summary
from fluxq.training.validation import Sets, Validation, sets_of
from fluxq.training.watch import Watch


def train(
    config: TrainConfig,
    resume: bool = False,
    overwrite: bool = False,
    notify: Notify = console.print,
    accepts_data: bool = False,
    asked: Collection[str] = (),
) -> Result:
    """Train a LoRA as `config` says, in a new run directory or, with `resume`, in the one that is there.

    accepts_data: a run that resumes may go on with other images and captions than it was started with.
    asked: keys, like "output.keep", of settings that are refused if they have no effect.
    Raises WrongRequest for a request that cannot be met, before it touches anything of an earlier run; and Stopped,
    after a save, if a signal asks for the end.
    """
    models = Models(config.model, notify=notify)
    models.check()
    refuse_without_effect(config, models, asked, resume)
    start_lora = None if resume else read_start(config.lora, models, notify)
    config, scanned = resolve(config, models, silent if resume else notify, start_lora)
    run = Run(config)
    with run.locked():
        run.check(resume, overwrite, accepts_data)
        return train_in(run, models, scanned, start_lora, resume, notify, accepts_data)


def train_in(
    run: Run, models: Models, scanned: Scan, start_lora: Lora | None, resume: bool, notify: Notify, accepts_data: bool
) -> Result:
    """Train on the images of `scanned`, in the directory of `run`, which nobody else uses."""
    config = run.config
    placement = place(config, models, notify)
    training, output, steps, rate = config.training, config.output, config.training.steps, config.training.learning_rate
    assert steps is not None and rate is not None, "resolve fills these in"

    # what it is trained on, and what is trained
    data = repeated_once("encoding", notify, load_data, run, models, scanned, notify)
    metadata = metadata_of(config, models, scanned, data.trained_on, data.batches)
    reset_peak()
    trainable = repeated_once("loading", notify, load_trainable, config, models, placement, start_lora, notify)
    flux, layers, optimizer = trainable.flux, trainable.layers, trainable.optimizer
    retry = OutOfMemoryRetry(placement, models, flux, trainable.ahead, notify)
    objective = Objective(flux, data.batches, training, trainable.clip, trainable.dropout, data.in_class)
    for line in summary(config, models, flux, data.epoch, len(layers), optimizer):
        notify(line)

    # where it starts
    progress = Progress(run.identity(models, data.trained_on))
    if resume:
        saved = load_state(run.state_file, layers, optimizer)
        run.resume_from(saved, progress.identity, data.trained_on, accepts_data)
        progress = saved
        restart_rates(optimizer, rate, training.text_learning_rate)
        notify("; ".join([f"resumed after step {progress.step}", *run.changes]))
    else:
        progress.rotated = prepare(config, models, objective, retry, layers, notify)
    set_rotations(flux, progress.rotated)
    validation = Validation(run, progress, objective, optimizer, data.sets, retry, notify)
    validation.begin(resume)
    run.begin(resume)
    run.save_data(data.trained_on)
    retry.placement.save(run.folder)
    began = time.time() - progress.seconds
    watch = Watch(config, models, data.batches, retry)
    report = Report(
        run.folder, progress.step, steps, output.plot_seconds, run.changes, watch, progress.validation, optimizer.notes
    )
    write = partial(write_lora, run, trainable, metadata, progress, began)
    saves = Saves(run, report, progress, began, layers, optimizer, retry, write, notify)

    # the loop
    with report, saves, StopRequest(notify, saves.last_step) as stopping:
        if resume:
            validation.after(progress.step, report, saves)
            saves.complete()
        for step in range(progress.step, run.last_step):
            clock, done = time.perf_counter(), step + 1
            factor = learning_rate_factor(training, step)
            work = partial(optimizer_step, optimizer, objective, step, training.accumulate, factor, training.clip)
            loss, norm = retry.run(f"step {done}", work)
            if not math.isfinite(norm):
                notify(f"step {done} is skipped, its gradient is {norm}: {objective.described(step)}")
            report.step(done, loss, rate * factor, norm, time.perf_counter() - clock)
            progress.step = done

            # now and then
            stop = stopping()
            if not stop:
                validation.after(done, report, saves)
            if config.samples.every and is_due(config.samples.every, done, run.last_step):
                preview(run, models, retry, trainable, data, done, notify)
            if stop or saves.is_overdue or is_due(output.save_every, done, run.last_step):
                saves.save(required=bool(stop) or done == run.last_step)
            if stop:
                raise Stopped(stop, f"after step {done}; continue with: fluxq train --resume {run.folder}")
            if done == run.last_step:
                break

    # the result
    losses, seconds = [record["loss"] for record in report.records] or [math.nan], round(time.time() - began, 2)
    done, lora, reasons = run.last_step, str(run.lora_file(run.last_step)), slower(flux)
    result = Result(done, seconds, losses[0], losses[-1], peak_bytes(), lora, slower=reasons, **validation.results())
    result.save(run.folder)
    for line in result.summary():
        notify(line)
    return result


@dataclass(frozen=True)
class Data:
    """What a run sees, encoded: the images it is trained on, what is measured, and the prompts of previews."""

    trained_on: Dataset
    sets: Sets
    batches: Batches
    store: Store
    prompts: tuple[str, ...]
    keys: Mapping[str, str]  # prompt -> the key of its embeddings
    epoch: Epoch
    in_class: Batches | None  # the same with the name of a class in place of the trigger

    def preview_texts(self, clip: Clip | None) -> Mapping[str, Text]:
        """The embeddings of the previews' prompts; with `clip`, pooled vectors come from it as it is now."""
        texts = {prompt: self.store.text(key) for prompt, key in self.keys.items()}
        return texts if clip is None else encode_pooled(clip, texts)


def load_data(run: Run, models: Models, scanned: Scan, notify: Notify) -> Data:
    """Encode what the cache lacks of `scanned`; the encoders are gone from the GPU when this returns.

    Raises WrongRequest, before anything is encoded, if a disk has no room for the run.
    """
    config, data, training = run.config, run.config.data, run.config.training
    prompts = preview_prompts(config, models, scanned)
    classes = class_captions(config, scanned)
    room = partial(require_room_for_run, run, models, len(prompts), notify)
    with progress_bar() as progress:
        texts = (*prompts, config.samples.negative) if prompts else ()
        budget = gpu_budget(config.memory, models.device)
        captions = (*texts, *classes, *classes.values())
        everything = cache_folders(data, scanned, models, captions, progress, budget, room)
    for line in (*everything.notes, *everything.skipped):
        notify(line)
    trained_on = everything.part([f.path for f in data.folders])
    store = Store(data.cache)
    keys, made_of = everything.prompts, (trained_on, store, training.batch, training.seed)
    in_place = {keys[caption]: keys[other] for caption, other in classes.items()}
    in_class = Batches(*made_of, in_place=in_place) if classes else None
    sets = sets_of(everything, trained_on, scanned, data, store)
    epoch = epoch_of(data, scanned, training.batch, trained_on)
    keys = {text: keys[text] for text in texts}
    return Data(trained_on, sets, Batches(*made_of), store, prompts, keys, epoch, in_class)


@dataclass(frozen=True)
class Trainable:
    """The frozen transformer with its LoRA, CLIP-L with its own if that trains, and the optimizer of both."""

    flux: Flux
    clip: Clip | None
    layers: dict[str, Linear]  # those with LoRA, by name
    optimizer: FlatOptimizer
    dropout: Dropout
    ahead: bool  # nothing upstream of modulation trains, so it is computed ahead


def write_lora(
    run: Run, trainable: Trainable, metadata: Metadata, progress: Progress, began: float, step: int, best: bool = False
) -> None:
    about = metadata(step, began, time.time()) | progress.validation.metadata(step)
    with trainable.optimizer.evaluating():
        run.save_loras(trainable.flux, trainable.clip, step, about, trainable.optimizer, best)


def preview(
    run: Run, models: Models, retry: OutOfMemoryRetry, trainable: Trainable, data: Data, step: int, notify: Notify
) -> None:
    with trainable.optimizer.evaluating():
        texts = data.preview_texts(trainable.clip)
        save_previews(run, models, trainable.flux, retry, texts, data.prompts, step, notify)


def load_trainable(
    config: TrainConfig, models: Models, placement: Placement, start_lora: Lora | None, notify: Notify
) -> Trainable:
    """Load the models that train, add their LoRA, drawn by the seed or from `start_lora`, and make its optimizer."""
    lora, training = config.lora, config.training
    learning_rate, arguments = training.learning_rate, parse_arguments(training.optimizer_args)
    assert learning_rate is not None, "resolve fills this in"
    adapted = lora.adapted()
    ahead = is_known_ahead(models.flux_config, adapted) and not lora.text_encoder
    flux = models.load_flux(placement.resident, placement.slots, ahead)
    init = torch.Generator().manual_seed(int(generator(training.seed, "lora").integers(2**62)))
    layers = add_adapted(flux, adapted, init)
    empty(layers, lora.init)
    groups = lora_groups(flux, learning_rate, lora.plus_ratio)
    clip = models.load_clip() if lora.text_encoder else None
    if clip is not None:
        in_clip = add_lora(clip, *adapted.size(adapted.rank), CLIP_TARGETS, init)
        layers |= {f"clip.{path}": layer for path, layer in in_clip.items()}
        groups += lora_groups(clip, training.text_learning_rate or 0.0, lora.plus_ratio)
        flux.trains_y = True
    if start_lora is not None:
        start_from(start_lora, layers, notify)
    expect_training(flux)
    optimizer = build_optimizer(training.optimizer, groups, learning_rate, training.weight_decay, arguments)
    optimizer.follow(layers.values(), lora.max_norm, lora.ema)
    return Trainable(flux, clip, layers, optimizer, Dropout(layers, lora, training.seed), ahead)
