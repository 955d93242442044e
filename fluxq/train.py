"""`fluxq train`: folders of pictures to a LoRA. Read it top to bottom.

Every step draws what it needs by its own number, so stopping and going on changes nothing (fluxq/data/randomness.py).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch

from fluxq.cache import cache_folders
from fluxq.config import TrainConfig
from fluxq.data.batches import Batches
from fluxq.data.randomness import generator
from fluxq.data.store import Store, Text
from fluxq.flow import flow_loss, sample_noise, sample_timesteps, validation_loss
from fluxq.model.flux import Flux
from fluxq.model.lora import add_lora
from fluxq.models import Models
from fluxq.optim import build_optimizer, rate_factor
from fluxq.report import Report, console, peak_bytes, progress_bar, stop_request
from fluxq.run import Result, Run, Say, metadata_of, resolve
from fluxq.sample import draw, save_picture, shots
from fluxq.state import load_state, save_state


def train(config: TrainConfig, resume: bool = False, overwrite: bool = False, say: Say = console.print) -> Result:
    """Train a LoRA as `config` says, in a new run directory, or going on with the one that is there. Raises
    WrongRequest.
    """
    models = Models(config.model, say=say)
    models.check()
    config = resolve(config, models, say)
    run = Run.open(config, resume, overwrite)
    training, steps, data = config.training, config.training.steps, config.data
    assert steps and data.size and config.lora.alpha, "resolve fills these in"

    # what is trained on: encoded pictures and captions
    prompts = preview_prompts(config)
    with progress_bar() as progress:
        dataset = cache_folders(data, data.folders, models, (*prompts, config.samples.negative), progress)
        held_out = {f.path.name: cache_folders(data, (f,), models, (), progress) for f in data.validation}
    for line in (*dataset.notes, *dataset.skipped):
        say(line)
    store = Store(data.cache)
    batches = Batches(dataset, store, training.batch, training.seed)
    metadata = metadata_of(config, models, dataset, len(batches))

    # what is trained: LoRA on the frozen model
    flux = models.load_flux()
    init = torch.Generator().manual_seed(int(generator(training.seed, "lora").integers(2**62)))
    layers = add_lora(flux, config.lora.rank, config.lora.alpha, config.lora.targets, init)
    parameters = list(flux.parameters())
    optimizer = build_optimizer(training.optimizer, parameters, training.rate, training.weight_decay)
    say(
        f"FLUX.1 {models.variant} in {config.model.format}: {sum(p.numel() for p in parameters):,} trainable weights "
        f"in {len(layers)} layers; {len(dataset.examples)} pictures, {len(batches)} batches an epoch, {steps} steps"
    )

    def validate() -> dict[str, float]:
        sets = {name: Batches(examples, store, training.batch, 0) for name, examples in held_out.items()}
        return {
            name: validation_loss(flux, examples, training.shift, training.guidance) for name, examples in sets.items()
        }

    # where it starts
    start, spent, before = 0, 0.0, None
    if resume:
        start, facts = load_state(run.state_file, layers, optimizer)
        spent, before = facts["seconds"], facts["validation"]
        say(f"resumed after step {start}")
    elif held_out:
        before = validate()
        say("validation before: " + described(before))
    began = time.time() - spent

    # the loop
    with Report(run.folder, start, steps, config.output.plot_seconds) as report, stop_request(say) as asked_to_stop:
        for step in range(start, steps):
            clock, losses = time.perf_counter(), []
            for index in range(step * training.accumulate, (step + 1) * training.accumulate):
                batch = batches.batch(index)
                noise = sample_noise(batch.latents.shape[1:], training.seed, index, batch.examples)
                tokens = batch.latents.shape[2] * batch.latents.shape[3] // 4
                t = sample_timesteps(training.timesteps, training.seed, index, batch.examples, tokens, training.shift)
                latents, noise, txt, pooled = (
                    x.to(flux.device) for x in (batch.latents, noise, batch.txt, batch.pooled)
                )
                loss = flow_loss(flux, latents, noise, t, txt, pooled, training.guidance).mean()
                (loss / training.accumulate).backward()
                losses.append(loss.detach())
            norm = torch.nn.utils.clip_grad_norm_(parameters, training.clip or torch.inf)
            rate = training.rate * rate_factor(training.schedule, step, steps, training.warmup)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
            done, mean = step + 1, float(torch.stack(losses).mean())
            report.step(done, mean, rate, float(norm), time.perf_counter() - clock)

            # now and then
            stop, save_every = asked_to_stop(), config.output.save_every
            if stop or done == steps or (save_every and done % save_every == 0):
                run.save_lora(flux, done, metadata(done, began, time.time()))
                save_state(
                    run.state_file, done, layers, optimizer, {"seconds": time.time() - began, "validation": before}
                )
            if config.samples.every and (done % config.samples.every == 0 or done == steps):
                texts = {prompt: store.text(key) for prompt, key in dataset.prompts.items()}
                preview(run, models, flux, texts, prompts, done)
            if stop:
                raise KeyboardInterrupt(f"after step {done}; go on with: fluxq train --resume {run.folder}")

    # what came of it
    after = validate() if held_out else None
    if after:
        say("validation after:  " + described(after))
    losses = [record["loss"] for record in report.records]
    lora = run.lora_file(steps)
    result = Result(steps, round(time.time() - began, 2), losses[0], losses[-1], peak_bytes(), str(lora), before, after)
    result.save(run.folder)
    say(f"LoRA: {lora}")
    return result


def preview_prompts(config: TrainConfig) -> tuple[str, ...]:
    """What previews draw: the prompts asked for, else the triggers; none where no previews are made."""
    triggers = dict.fromkeys(f.trigger for f in config.data.folders if f.trigger)
    return (config.samples.prompts or tuple(triggers)) if config.samples.every else ()


def preview(run: Run, models: Models, flux: Flux, texts: Mapping[str, Text], prompts: Sequence[str], step: int) -> None:
    """Draw `prompts` into samples/, with the LoRA as it is after `step` steps."""
    wanted = shots(run.config.samples, prompts, run.config.data.size or 0)
    for i, picture in enumerate(draw(flux, models.load_autoencoder(), texts, wanted)):
        save_picture(picture, run.folder / "samples" / f"{step:06}_{i:02}.png", wanted[i], Step=str(step))


def described(losses: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
