"""`fluxq train`: folders of images to a LoRA. Read it top to bottom.

Every step draws what it needs by its own number, so stopping and going on changes nothing (fluxq/data/randomness.py).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from fluxq.caching.batches import Batch, Batches, held_out_batches
from fluxq.caching.folders import cache_folders
from fluxq.caching.store import Store
from fluxq.config import TrainConfig
from fluxq.console import Notify, console, progress_bar
from fluxq.data.randomness import generator
from fluxq.errors import WrongRequest
from fluxq.flow import conditioning, flow_loss, sample_noise, sample_timesteps, validation_loss
from fluxq.formats.stream import expect_training
from fluxq.memory.peak import peak_bytes, reset_peak
from fluxq.memory.phases import gpu_budget
from fluxq.memory.placement import place
from fluxq.memory.retry import OutOfMemoryRetry
from fluxq.model.calibration import calibrate, set_rotations
from fluxq.model.clip import CLIP_TARGETS
from fluxq.model.lora import add_lora
from fluxq.model.modulation import Conditioning, Lookahead, is_known_ahead
from fluxq.models.parts import Models
from fluxq.sampling.denoising import encode_pooled
from fluxq.training.defaults import resolve
from fluxq.training.from_lora import read_start, start_from
from fluxq.training.optim import build_optimizer, learning_rate_factor, optimizer_step, parameters_of
from fluxq.training.previews import preview_prompts, save_previews
from fluxq.training.report import Report, stop_request
from fluxq.training.run import Result, Run, metadata_of
from fluxq.training.state import load_state, save_state

CALIBRATION_BATCHES = 2


def train(config: TrainConfig, resume: bool = False, overwrite: bool = False, notify: Notify = console.print) -> Result:
    """Train a LoRA as `config` says, in a new run directory or going on in the one that is there.

    Raises WrongRequest, before anything of an earlier run is touched, where that cannot be done.
    """
    models = Models(config.model, notify=notify)
    models.check()
    start_lora = None
    if config.lora.from_lora and not resume:
        clip_shapes = models.open("clip_l").shapes if config.lora.text_encoder else None
        start_lora = read_start(config.lora, models.flux_config, clip_shapes, notify)
    config = resolve(config, models, (lambda line: None) if resume else notify, start_lora)
    run = Run(config)
    run.check(resume, overwrite)
    placement = place(config, models, notify)
    training, steps, data = config.training, config.training.steps, config.data
    lora = config.lora
    assert steps and data.resolution and lora.rank and lora.alpha and lora.targets is not None, "resolve fills these in"

    # what is trained on: encoded images and captions
    prompts = preview_prompts(config, models)
    with progress_bar() as progress:
        texts, free = (*prompts, config.samples.negative) if prompts else (), gpu_budget(config.memory, models.device)
        everything = cache_folders(data, models, texts, progress, free)
    for line in (*everything.notes, *everything.skipped):
        notify(line)
    dataset = everything.part([f.path for f in data.folders])
    held_out = {name: everything.part([f.path]) for name, f in labeled(data.validation).items()}
    store = Store(data.cache)
    batches = Batches(dataset, store, training.batch, training.seed)
    metadata = metadata_of(config, models, dataset, len(batches))

    # what is trained: LoRA on the frozen model, and on CLIP-L where it is asked for
    reset_peak()
    ahead = is_known_ahead(models.flux_config, lora.targets) and not lora.text_encoder
    flux = models.load_flux(placement.resident, placement.slots, ahead)
    init = torch.Generator().manual_seed(int(generator(training.seed, "lora").integers(2**62)))
    layers = add_lora(flux, lora.rank, lora.alpha, lora.targets, init)
    groups = [{"params": [*flux.parameters()], "lr": training.learning_rate}]
    clip = models.load_clip() if lora.text_encoder else None
    if clip is not None:
        of_clip = add_lora(clip, lora.rank, lora.alpha, CLIP_TARGETS, init)
        layers |= {f"clip.{path}": layer for path, layer in of_clip.items()}
        groups.append({"params": [*clip.parameters()], "lr": training.text_learning_rate})
        flux.trains_y = True
    if start_lora is not None:
        start_from(start_lora, layers, notify)
    expect_training(flux)
    retry = OutOfMemoryRetry(placement, models, flux, ahead, notify)
    optimizer = build_optimizer(training.optimizer, groups, training.learning_rate, training.weight_decay)
    trainable = sum(p.numel() for p in parameters_of(optimizer))
    notify(
        f"FLUX.1 {models.variant} in {config.model.format}: {trainable:,} trainable weights in {len(layers)} layers; "
        f"{len(dataset.examples)} images, {len(batches)} batches an epoch, {steps} steps"
    )

    def with_pooled(batch: Batch) -> Batch:
        """With the pooled vectors that CLIP-L gives as it is now, where it is trained."""
        return batch if clip is None else replace(batch, pooled=clip.pooled(batch.captions))

    def validate() -> dict[str, float]:
        sets = {
            n: map(with_pooled, held_out_batches(examples, store, training.batch)) for n, examples in held_out.items()
        }
        return {name: validation_loss(flux, some, training.shift, training.guidance) for name, some in sets.items()}

    def times_of(index: int) -> Tensor:
        """The timesteps of batch `index`, counted over the whole run."""
        (width, height), examples = batches.bucket_of(index), batches.examples_of(index)
        tokens = width // 16 * (height // 16)
        return sample_timesteps(training.timesteps, training.seed, index, examples, tokens, training.shift)

    def conditioning_of(index: int) -> Conditioning:
        return conditioning(flux, times_of(index), batches.pooled_of(index), training.guidance)

    def loss_of(index: int, modulation: Sequence[Tensor] | None = None) -> Tensor:
        """The mean loss of batch `index` at its own noise and timesteps."""
        batch, t = with_pooled(batches.batch(index)), times_of(index)
        noise = sample_noise(batch.latents.shape[1:], training.seed, index, batch.examples)
        latents, noise, txt, pooled = (x.to(flux.device) for x in (batch.latents, noise, batch.txt, batch.pooled))
        return flow_loss(flux, latents, noise, t, txt, pooled, training.guidance, modulation).mean()

    # where it starts
    start, spent, before, rotated = 0, 0.0, None, []
    identity = {"data": dataset.digest(), "model": models.fingerprint()}
    if resume:
        start, facts = load_state(run.state_file, layers, optimizer)
        refuse_other_inputs(run, identity, facts, start, steps)
        spent, before, rotated = facts["seconds"], facts["validation"], facts["rotated"]
        notify(f"resumed after step {start}")
    elif config.model.compute.startswith("int8"):
        look = partial(calibrate, flux, lambda: [loss_of(index) for index in range(CALIBRATION_BATCHES)])
        rotated = retry.run("the look for outliers", look, training=False)
        notify(f"int8: {len(rotated)} layers have outlying inputs, and rotate them before they are rounded")
    set_rotations(flux, rotated)
    lookahead = Lookahead(flux, conditioning_of, training.batch)

    def step_loss(index: int) -> Tensor:
        return loss_of(index, lookahead.rows(index))

    if held_out and not resume:
        before = retry.run("validation", validate, training=False)
        notify("validation before: " + described(before))
    began = time.time() - spent
    run.begin(resume)
    retry.placement.save(run.folder)

    # the loop
    with Report(run.folder, start, steps, config.output.plot_seconds) as report, stop_request(notify) as asked_to_stop:
        for step in range(start, steps):
            clock, done = time.perf_counter(), step + 1
            factor = learning_rate_factor(training.schedule, step, steps, training.warmup)
            work = partial(optimizer_step, optimizer, step_loss, step, training.accumulate, factor, training.clip)
            loss, norm = retry.run(f"step {done}", work)
            report.step(done, loss, training.learning_rate * factor, norm, time.perf_counter() - clock)

            # now and then
            stop, save_every, every = asked_to_stop(), config.output.save_every, config.samples.every
            if every and (done % every == 0 or done == steps):
                texts = {prompt: store.text(key) for prompt, key in everything.prompts.items()}
                texts = texts if clip is None else encode_pooled(clip, texts)
                save_previews(run, models, flux, retry, texts, prompts, done, notify)
            if stop or done == steps or (save_every and done % save_every == 0):
                report.sync()
                run.save_lora(flux, clip, done, metadata(done, began, time.time()))
                facts = {"seconds": time.time() - began, "validation": before, "rotated": rotated, **identity}
                save_state(run.state_file, done, layers, optimizer, facts)
                retry.placement.save(run.folder)
            if stop:
                raise KeyboardInterrupt(f"after step {done}; go on with: fluxq train --resume {run.folder}")

    # what came of it
    peak = peak_bytes()
    after = retry.run("validation", validate, training=False) if held_out else None
    if after:
        notify("validation after:  " + described(after))
    losses = [record["loss"] for record in report.records] or [math.nan]
    lora = str(run.lora_file(steps))
    result = Result(steps, round(time.time() - began, 2), losses[0], losses[-1], peak, lora, before, after)
    result.save(run.folder)
    notify(f"LoRA: {lora}")
    return result


def refuse_other_inputs(run: Run, identity: dict[str, str], saved: dict, start: int, steps: int) -> None:
    """Raise WrongRequest where a resumed run would see other images, captions or weights than before."""
    for what, remedy in (("data", "images, captions or encoders"), ("model", "the transformer's file")):
        if saved[what] != identity[what]:
            raise WrongRequest(f"{remedy} changed since {run.folder} was begun; put them back, or begin another run")
    if start > steps:
        raise WrongRequest(f"{run.folder} has done {start} steps already, more than {steps}; ask for more")


def labeled(folders: Sequence) -> dict:
    """Folder's last name -> folder, with more of the path where two end alike."""
    names = [f.path.name for f in folders]
    return {f.path.name if names.count(f.path.name) == 1 else str(f.path): f for f in folders}


def described(losses: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
