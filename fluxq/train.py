"""`fluxq train`: folders of pictures to a LoRA. Read it top to bottom.

Every step draws what it needs by its own number, so stopping and going on changes nothing (fluxq/data/randomness.py).
"""

from __future__ import annotations

from fluxq.training.previews import preview, preview_prompts

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from PIL.Image import Image
from torch import Tensor

from fluxq.caching.folders import cache_folders
from fluxq.config import TrainConfig
from fluxq.caching.batches import Batch, Batches, held_out_batches
from fluxq.data.examples import read_caption, with_trigger
from fluxq.data.images import picture_files
from fluxq.data.randomness import generator
from fluxq.caching.store import Store, Text
from fluxq.console import Say
from fluxq.training.defaults import resolve
from fluxq.data.buckets import side
from fluxq.errors import WrongRequest
from fluxq.flow import conditioning, flow_loss, sample_noise, sample_timesteps, validation_loss
from fluxq.formats.stream import expect_training
from fluxq.training.from_lora import read_start, start_from
from fluxq.memory.placement import place
from fluxq.model.calibration import calibrate, set_rotations
from fluxq.model.clip import CLIP_TARGETS
from fluxq.model.flux import Flux
from fluxq.model.lora import add_lora
from fluxq.model.modulation import Conditioning, Lookahead, is_known_ahead
from fluxq.models.parts import Models
from fluxq.training.optim import build_optimizer, optimizer_step, parameters_of, rate_factor
from fluxq.training.report import Report, stop_request
from fluxq.console import console, progress_bar
from fluxq.memory.peak import peak_bytes, reset_peak
from fluxq.memory.retry import Room
from fluxq.training.run import Result, Run, metadata_of
from fluxq.sampling.decoding import draw
from fluxq.sampling.sheets import save_picture
from fluxq.sampling.requests import shots
from fluxq.sampling.denoising import told_by
from fluxq.training.state import load_state, save_state
from fluxq.memory.phases import preview_turns, room_of

CALIBRATION_BATCHES = 2


def train(config: TrainConfig, resume: bool = False, overwrite: bool = False, say: Say = console.print) -> Result:
    """Train a LoRA as `config` says, in a new run directory or going on in the one that is there.

    Raises WrongRequest, before anything of an earlier run is touched, where that cannot be done.
    """
    models = Models(config.model, say=say)
    models.check()
    start_lora = None
    if config.lora.from_lora and not resume:
        clip_shapes = models.open("clip_l").shapes if config.lora.text_encoder else None
        start_lora = read_start(config.lora, models.flux_config, clip_shapes, say)
    config = resolve(config, models, (lambda line: None) if resume else say, start_lora)
    run = Run(config)
    run.check(resume, overwrite)
    placement = place(config, models, say)
    training, steps, data = config.training, config.training.steps, config.data
    lora = config.lora
    assert steps and data.size and lora.rank and lora.alpha and lora.targets is not None, "resolve fills these in"

    # what is trained on: encoded pictures and captions
    prompts = preview_prompts(config, models)
    with progress_bar() as progress:
        texts, free = (*prompts, config.samples.negative) if prompts else (), room_of(config.memory, models.device)
        everything = cache_folders(data, models, texts, progress, free)
    for line in (*everything.notes, *everything.skipped):
        say(line)
    dataset = everything.part([f.path for f in data.folders])
    held_out = {name: everything.part([f.path]) for name, f in labelled(data.validation).items()}
    store = Store(data.cache)
    batches = Batches(dataset, store, training.batch, training.seed)
    metadata = metadata_of(config, models, dataset, len(batches))

    # what is trained: LoRA on the frozen model, and on CLIP-L where it is asked for
    reset_peak()
    ahead = is_known_ahead(models.flux_config, lora.targets) and not lora.text_encoder
    flux = models.load_flux(placement.resident, placement.slots, ahead)
    init = torch.Generator().manual_seed(int(generator(training.seed, "lora").integers(2**62)))
    layers = add_lora(flux, lora.rank, lora.alpha, lora.targets, init)
    groups = [{"params": [*flux.parameters()], "lr": training.rate}]
    clip = models.load_clip() if lora.text_encoder else None
    if clip is not None:
        of_clip = add_lora(clip, lora.rank, lora.alpha, CLIP_TARGETS, init)
        layers |= {f"clip.{path}": layer for path, layer in of_clip.items()}
        groups.append({"params": [*clip.parameters()], "lr": training.text_rate})
        flux.trains_y = True
    if start_lora is not None:
        start_from(start_lora, layers, say)
    expect_training(flux)
    room = Room(placement, models, flux, ahead, say)
    optimizer = build_optimizer(training.optimizer, groups, training.rate, training.weight_decay)
    trainable = sum(p.numel() for p in parameters_of(optimizer))
    say(
        f"FLUX.1 {models.variant} in {config.model.format}: {trainable:,} trainable weights in {len(layers)} layers; "
        f"{len(dataset.examples)} pictures, {len(batches)} batches an epoch, {steps} steps"
    )

    def told(batch: Batch) -> Batch:
        """With the pooled vectors that CLIP-L gives as it is now, where it is trained."""
        return batch if clip is None else replace(batch, pooled=clip.pooled(batch.captions))

    def validate() -> dict[str, float]:
        sets = {n: map(told, held_out_batches(examples, store, training.batch)) for n, examples in held_out.items()}
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
        batch, t = told(batches.batch(index)), times_of(index)
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
        say(f"resumed after step {start}")
    elif config.model.compute.startswith("int8"):
        look = partial(calibrate, flux, lambda: [loss_of(index) for index in range(CALIBRATION_BATCHES)])
        rotated = room.repeat("the look for outliers", look, training=False)
        say(f"int8: {len(rotated)} layers have outlying inputs, and rotate them before they are rounded")
    set_rotations(flux, rotated)
    lookahead = Lookahead(flux, conditioning_of, training.batch)

    def step_loss(index: int) -> Tensor:
        return loss_of(index, lookahead.rows(index))

    if held_out and not resume:
        before = room.repeat("validation", validate, training=False)
        say("validation before: " + described(before))
    began = time.time() - spent
    run.begin(resume)
    room.placement.save(run.folder)

    # the loop
    with Report(run.folder, start, steps, config.output.plot_seconds) as report, stop_request(say) as asked_to_stop:
        for step in range(start, steps):
            clock, done = time.perf_counter(), step + 1
            factor = rate_factor(training.schedule, step, steps, training.warmup)
            work = partial(optimizer_step, optimizer, step_loss, step, training.accumulate, factor, training.clip)
            loss, norm = room.repeat(f"step {done}", work)
            report.step(done, loss, training.rate * factor, norm, time.perf_counter() - clock)

            # now and then
            stop, save_every, every = asked_to_stop(), config.output.save_every, config.samples.every
            if every and (done % every == 0 or done == steps):
                texts = {prompt: store.text(key) for prompt, key in everything.prompts.items()}
                texts = texts if clip is None else told_by(clip, texts)
                preview(run, models, flux, room, texts, prompts, done, say)
            if stop or done == steps or (save_every and done % save_every == 0):
                report.sync()
                run.save_lora(flux, clip, done, metadata(done, began, time.time()))
                facts = {"seconds": time.time() - began, "validation": before, "rotated": rotated, **identity}
                save_state(run.state_file, done, layers, optimizer, facts)
                room.placement.save(run.folder)
            if stop:
                raise KeyboardInterrupt(f"after step {done}; go on with: fluxq train --resume {run.folder}")

    # what came of it
    peak = peak_bytes()
    after = room.repeat("validation", validate, training=False) if held_out else None
    if after:
        say("validation after:  " + described(after))
    losses = [record["loss"] for record in report.records] or [math.nan]
    lora = str(run.lora_file(steps))
    result = Result(steps, round(time.time() - began, 2), losses[0], losses[-1], peak, lora, before, after)
    result.save(run.folder)
    say(f"LoRA: {lora}")
    return result






def refuse_other_inputs(run: Run, identity: dict[str, str], saved: dict, start: int, steps: int) -> None:
    """Raise WrongRequest where a resumed run would see other pictures, captions or weights than before."""
    for what, remedy in (("data", "pictures, captions or encoders"), ("model", "the transformer's file")):
        if saved[what] != identity[what]:
            raise WrongRequest(f"{remedy} changed since {run.folder} was begun; put them back, or begin another run")
    if start > steps:
        raise WrongRequest(f"{run.folder} has done {start} steps already, more than {steps}; ask for more")


def labelled(folders: Sequence) -> dict:
    """Folder's last name -> folder, with more of the path where two end alike."""
    names = [f.path.name for f in folders]
    return {f.path.name if names.count(f.path.name) == 1 else str(f.path): f for f in folders}


def described(losses: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
