"""What was asked is done or refused: settings that have no effect in a run are refused by name.

A setting whose effect is already there, such as --ae-band once all images are encoded, is not refused: the same command
may be given twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator

from fluxq.config import DataConfig, TrainConfig, TrainingConfig
from fluxq.data.variants import draws_captions
from fluxq.errors import WrongRequest
from fluxq.models.parts import PARTS, Models
from fluxq.settings import ImageSettings

from .libraries import library_of
from .losses import HUBER
from .timesteps import USED_BY

SAMPLES = ("prompts", "width", "height", "steps", "guidance", "cfg", "negative", "seed")


def refuse_without_effect(
    config: TrainConfig, models: Models, asked: Collection[str], resume: bool = False, samples_only: bool = False
) -> None:
    """Raise WrongRequest for what is `asked` and would have no effect.

    asked: keys like "output.keep" that the user has set; samples_only: for `fluxq sample`.
    """
    found = dict(_of_models(config, models))
    found |= dict(_of_samples(config, models, samples_only))
    if not samples_only:
        found |= dict(_of_training(config, models, resume))
    refused = [f"{_option(key)} has no effect here: {why}" for key, why in found.items() if key in asked]
    if refused:
        raise WrongRequest(f"{'; '.join(refused)}; leave {'it' if len(refused) == 1 else 'them'} out")


Found = Iterator[tuple[str, str]]
"""(key, why it has no effect)"""


def _of_models(config: TrainConfig, models: Models) -> Found:
    model, memory = config.model, config.memory
    if models.is_nano:
        yield "model.models", "--model nano brings its own files"
    elif all(getattr(model, part) for part in PARTS):
        yield "model.models", "each of the four model files is named"
    if model.format == "bf16":
        yield "memory.slots", "weights in bf16 are not streamed"
    elif models.device.type != "cuda" and memory.resident_units is None and not memory.blocks_to_swap:
        yield "memory.slots", "nothing is streamed on a CPU unless --blocks-to-swap or --resident-units asks for it"


def _of_samples(config: TrainConfig, models: Models, samples_only: bool) -> Found:
    samples = config.samples
    if not samples_only and not samples.every and samples.every_epochs is None:
        for name in SAMPLES:
            yield f"samples.{name}", "this run makes no previews (--sample-every makes them)"
        return
    if samples.cfg <= 1:
        yield "samples.negative", "a negative prompt needs --cfg above 1"
    if models.variant == "schnell":
        yield "samples.guidance", "FLUX.1 schnell has no guidance input"


def _of_training(config: TrainConfig, models: Models, resume: bool) -> Found:
    training, output = config.training, config.output
    yield from _of_data(config.data)
    yield from _of_objective(training)
    if config.lora.init != "lora_ga":
        yield "lora.init_batches", "only --lora-init lora_ga measures gradients"
    if config.lora.init != "loftq":
        yield "lora.keep_correction", "only --lora-init loftq corrects anything"
    if training.epochs is not None:
        yield "training.steps", "--epochs says how many"
    if output.save_every_epochs is not None:
        yield "output.save_every", "save_every_epochs says when"
    elif output.numbering == "epoch":
        yield "output.numbering", "epochs are numbered only with save_every_epochs"
    for schedule, name in (("cosine", "cycles"), ("polynomial", "power"), ("wsd", "decay")):
        if training.schedule != schedule:
            yield f"training.schedule_{name}", f"--schedule {training.schedule} does not use it"
    if not library_of(training.optimizer).takes_decay():
        yield "training.weight_decay", f"{training.optimizer} has none"
    if training.schedule == "constant":
        yield "training.schedule_floor", "--schedule constant does not fall"
    if not config.data.validation and not config.data.validation_split:
        yield "training.validate_every", "no images are held out (--validation-split, or data.validation)"
    if models.variant == "schnell":
        yield "training.guidance", "FLUX.1 schnell has no guidance input"
    if not output.save_every and output.save_every_epochs is None:
        yield "output.keep", "no LoRA is saved before the end without --save-every"
    if resume:
        yield (
            "lora.from_lora",
            "a resumed run goes on from its own state; to start from another LoRA, start another run",
        )


def _of_data(data: DataConfig) -> Found:
    own, (trained, held_out) = (*data.folders, *data.validation), data.filled()
    if not own:
        return
    for name in (f.name for f in dataclasses.fields(ImageSettings)):
        if all(getattr(f, name) is not None or (name == "trigger" and f.regularization) for f in own):
            yield f"data.{name}", f"each folder has its own {name}"
    drawn = [draws_captions(f) or f.random_crop or f.color_augment for f in (*trained, *held_out)]
    if not any(drawn):
        yield "data.variants", "nothing about images or captions is drawn at random"
    tags = [f.shuffle_tags or f.tag_dropout or f.keep_tokens_separator for f in (*trained, *held_out)]
    if not any(tags):
        yield "data.caption_separator", "tags are neither shuffled nor dropped"
    if not any(f.shuffle_tags or f.tag_dropout for f in trained):
        yield "data.keep_tokens", "tags are neither shuffled nor dropped"
    if not any(f.masks for f in (*trained, *held_out)):
        for name in ("mask_outside", "mask_normalize"):
            yield f"data.{name}", "there are no masks (--masks)"
    if not any(f.upscale for f in (*trained, *held_out)):
        for name in ("min_side", "max_side"):
            yield f"data.{name}", "buckets have limits only if images may be enlarged (data.upscale)"


def _of_objective(training: TrainingConfig) -> Found:
    for name, modes in USED_BY.items():
        if training.timesteps not in modes:
            yield f"training.{name}", f"--timesteps {training.timesteps} does not use it"
    if training.preserve_class is None:
        yield "training.preserve_weight", "there is no --preserve-class"
    if not training.input_noise:
        yield "training.input_noise_random", "there is no input_noise"
    if training.loss not in HUBER:
        for name in ("huber_c", "huber_schedule", "huber_scale"):
            yield f"training.{name}", f"only training.loss huber and smooth_l1 use it, and it is {training.loss}"


def _option(key: str) -> str:
    """How a user sets `key`."""
    section, name = key.split(".")
    fields = {f.name: f for f in dataclasses.fields(getattr(TrainConfig(), section))}
    special = {"samples.prompts": "--prompt"}
    return special.get(key) or fields[name].metadata["flag"] or key
