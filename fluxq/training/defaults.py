"""Settings that were left open, filled in from the images and the GPU, and said with their reasons."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import cast

from fluxq.config import DEFAULT_RANK, DEFAULT_TARGETS, DataConfig, FolderConfig, TrainConfig
from fluxq.console import Notify
from fluxq.data.buckets import multiple_of_16
from fluxq.data.images import image_files
from fluxq.errors import WrongRequest
from fluxq.formats.lora.read import Lora
from fluxq.memory.placement import choose_format
from fluxq.models.parts import Models

from .from_lora import settings_of


def resolve(config: TrainConfig, models: Models, notify: Notify, start: Lora | None = None) -> TrainConfig:
    """`config` with nothing left open; `start` is the LoRA that is trained on, if any. Raises WrongRequest for settings
    that cannot be met together.
    """
    defaults, lora, training = TrainConfig(), config.lora, config.training
    check_text_encoder(config, models)
    data = resolve_data(config.data, models, notify)
    if start is not None:
        lora = settings_of(start, lora, models.flux_config, notify)
    if lora.rank is None:
        lora = replace(lora, rank=DEFAULT_RANK)
        notify(f"rank {lora.rank}: enough for a person or a product; a style can do with less")
    lora = replace(lora, targets=DEFAULT_TARGETS if lora.targets is None else lora.targets)
    if lora.alpha is None:
        lora = replace(lora, alpha=float(cast(int, lora.rank)))
        notify(f"alpha {lora.alpha:g}: equal to rank, which leaves the LoRA unscaled and exact in every program")
    if training.steps is None:
        images = sum(len(image_files(f.path)) for f in data.folders if f.path.is_dir())
        training = replace(training, steps=min(3000, max(1000, 100 * images)))
        notify(f"steps {training.steps}: about 100 an image ({images} images), within 1,000 to 3,000")
    if training.learning_rate == defaults.training.learning_rate:
        notify(f"learning rate {training.learning_rate:g}: the usual one where alpha equals rank")
    if lora.text_encoder and training.text_learning_rate is None:
        training = replace(training, text_learning_rate=training.learning_rate / 2)
        notify(
            f"text learning rate {training.text_learning_rate:g}: half of the other; sd-scripts too advises less for a text encoder"
        )
    if training.timesteps == "shift" and training.shift == defaults.training.shift:
        notify(f"shift {training.shift:g}: more of the timesteps near noise, where the layout of an image is decided")
    if training.warmup >= cast(int, training.steps):
        raise WrongRequest(f"a warm-up of {training.warmup} steps never ends in {training.steps}; make it shorter")
    name = config.output.name or next((f.trigger for f in data.folders if f.trigger), None) or data.folders[0].path.name
    name = _file_name(name)
    output = replace(config.output, name=name, out=config.output.out or Path("runs") / name)
    if any(cast(Path, output.out).resolve() == f.path for f in (*data.folders, *data.validation)):
        raise WrongRequest(f"{output.out} holds the images; choose another folder for the run by --out")
    config = replace(config, data=data, lora=lora, training=training, output=output)
    resolve_format(config, models, notify)
    return replace(config, model=replace(models.resolved(), t5_length=models.t5_length))


def check_text_encoder(config: TrainConfig, models: Models) -> None:
    """Raise WrongRequest for a text encoder that is not trained, is not there, or has no room in the file, and for a
    rate of none.
    """
    if config.lora.text_encoder == "t5xxl":
        raise WrongRequest(
            "T5-XXL is not trained: its 4.7 billion weights would have to pass through the GPU in every step, forward "
            "and backward, in place of states that are encoded once; CLIP-L can be, by --text-encoder clip_l"
        )
    if config.lora.text_encoder and config.lora.file_format == "peft":
        raise WrongRequest(
            "a PEFT folder holds one model's LoRA, and --text-encoder trains two; choose --lora-format kohya"
        )
    if config.lora.text_encoder:
        _ = models.open("clip_l")  # a complete cache does not do without it
    elif config.training.text_learning_rate is not None:
        raise WrongRequest("--text-lr is of a text encoder that is trained; add --text-encoder clip_l, or leave it out")


def resolve_format(config: TrainConfig, models: Models, notify: Notify) -> None:
    """Have `models` store weights in the best format for this GPU, where that was left open and matters."""
    _ = models.quantized  # a quantized file has a format
    if models.format_is_open and models.device.type == "cuda" and not models.is_nano:
        found = choose_format(config, models)
        models.use_format(found.format)
        notify(f"format {found.format}: the most faithful of those that train as fast as any on this GPU, as predicted")


def resolve_data(data: DataConfig, models: Models, notify: Notify) -> DataConfig:
    """`data` with its resolution, the sides of buckets and absolute paths filled in."""
    if not data.folders:
        raise WrongRequest("no folder of images was given; name at least one")
    if data.resolution is None:
        resolution, reason = models.default_resolution
        data = replace(data, resolution=resolution)
        notify(f"resolution {resolution}: {reason}")
    resolution = multiple_of_16("resolution", cast(int, data.resolution))
    return replace(
        data,
        folders=tuple(_absolute(f, data.trigger) for f in data.folders),
        validation=tuple(_absolute(f, data.trigger) for f in data.validation),
        cache=data.cache.resolve(),
        min_side=data.min_side or max(data.step, resolution // 2 // data.step * data.step),
        max_side=data.max_side or resolution * 2,
    )


def _absolute(folder: FolderConfig, trigger: str | None) -> FolderConfig:
    """`folder` by its whole path; its own trigger counts, also an empty one."""
    return replace(
        folder, path=folder.path.resolve(), trigger=folder.trigger if folder.trigger is not None else trigger
    )


def _file_name(text: str) -> str:
    """`text` as a file name that every system takes."""
    name = re.sub(r'[<>:"/\\|?*\x00-\x1f\x7f]', "_", text).strip(". ")[:100]
    if not name:
        raise WrongRequest(f"{text!r} is no name for a file; give one by --name")
    return name
