"""Unset settings, filled in from the images and the GPU, and printed with the reasons."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

from fluxq.config import DEFAULT_RANK, DEFAULT_TARGETS, DataConfig, FolderConfig, TrainConfig
from fluxq.console import Notify, plural
from fluxq.data.buckets import multiple_of_16
from fluxq.data.examples import Folder, expand
from fluxq.data.images import image_files
from fluxq.errors import WrongRequest
from fluxq.formats.lora.read import Lora
from fluxq.memory.placement import choose_format
from fluxq.models.check_file import is_kontext
from fluxq.models.parts import Models

from .from_lora import settings_of


def resolve(config: TrainConfig, models: Models, notify: Notify, start: Lora | None = None) -> TrainConfig:
    """`config` with every setting filled in. start: the LoRA that training starts from, if any.

    Raises WrongRequest for settings that contradict each other.
    """
    defaults, lora, training = TrainConfig(), config.lora, config.training
    check_text_encoder(config, models)
    data = resolve_data(config.data, models, notify)
    if start is not None:
        lora = settings_of(start, lora, models.flux_config, notify)
    if lora.rank is None:
        lora = replace(lora, rank=DEFAULT_RANK)
        notify(f"rank {lora.rank}: the default; a higher rank can learn more, in a larger file")
    lora = replace(lora, targets=DEFAULT_TARGETS if lora.targets is None else lora.targets)
    if lora.alpha is None:
        lora = replace(lora, alpha=float(cast(int, lora.rank)))
        notify(f"alpha {lora.alpha:g}: equal to rank, so the LoRA is not scaled and is the same in every program")
    if training.steps is None:
        images = sum(len(image_files(f.path)) for f in data.folders if f.path.is_dir())
        seen, at_once = min(3000, max(1000, 100 * images)), training.batch * training.accumulate
        training = replace(training, steps=-(-seen // at_once))
        times = round(seen / max(images, 1), 1)
        why = f"each of {plural(images, 'image')} is seen {times:g} times on average"
        notify(f"steps {training.steps}: {why}{f', {at_once} a step' if at_once > 1 else ''}")
    if training.learning_rate == defaults.training.learning_rate:
        notify(f"learning rate {training.learning_rate:g}: the usual one if alpha equals rank")
    if lora.text_encoder and training.text_learning_rate is None:
        training = replace(training, text_learning_rate=training.learning_rate / 2)
        notify(
            f"text learning rate {training.text_learning_rate:g}: half of the learning rate; sd-scripts also advises a "
            "lower one for text encoders"
        )
    if training.timesteps == "shift" and training.shift == defaults.training.shift:
        notify(f"shift {training.shift:g}: trains more at high noise, where the layout of an image is decided")
    if training.warmup >= cast(int, training.steps):
        raise WrongRequest(
            f"a warm-up of {training.warmup} steps does not fit into {training.steps}; lower --warmup or raise --steps"
        )
    name = config.output.name or next((f.trigger for f in data.folders if f.trigger), None) or data.folders[0].path.name
    name = _file_name(name)
    output = replace(config.output, name=name, out=config.output.out or Path("runs") / name)
    if any(cast(Path, output.out).resolve() == f.path for f in (*data.folders, *data.validation)):
        raise WrongRequest(f"{output.out} is a folder of images; choose another folder for the run with --out")
    config = replace(config, data=data, lora=lora, training=training, output=output)
    resolve_format(config, models, notify)
    for line in caveats(models):
        notify(line)
    return replace(config, model=replace(models.resolved(), t5_length=models.t5_length))


def caveats(models: Models) -> list[str]:
    """What a LoRA for this kind of checkpoint needs that this run does not give it."""
    found, source = [], models.quantized.source if models.quantized else {}
    names = [*models.flux_file.parts[-5:], *map(str, source.get("files", []))]  # in the hub's cache, down from its id
    if is_kontext(*names):
        found.append(
            "the transformer is FLUX.1 Kontext by its name, which edits a reference image: from images alone it learns "
            "to generate, as dev does, and may edit worse"
        )
    if models.variant == "schnell" and not models.base_loras:
        found.append(
            "FLUX.1 schnell needs only 4 steps because it was distilled, and training undoes that: unless this "
            "transformer is de-distilled, merge a training adapter for schnell with --base-lora FILE, or train on dev"
        )
    return found


def check_text_encoder(config: TrainConfig, models: Models) -> None:
    """Raise WrongRequest for a text encoder that cannot be trained, does not exist or does not go into the file format,
    and for a text learning rate without a text encoder.
    """
    if config.lora.text_encoder == "t5xxl":
        raise WrongRequest(
            "T5-XXL cannot be trained: its 4.7 billion weights would pass through the GPU in every step, forward and "
            "backward, instead of encoding captions once; train CLIP-L with --text-encoder clip_l"
        )
    if config.lora.text_encoder and config.lora.file_format == "peft":
        raise WrongRequest("a PEFT folder is for one model, and --text-encoder trains two; choose --lora-format kohya")
    if config.lora.text_encoder:
        _ = models.open("clip_l")  # needed even if the cache is complete
    elif config.training.text_learning_rate is not None:
        raise WrongRequest("--text-lr needs a text encoder to train; add --text-encoder clip_l, or leave it out")


def resolve_format(config: TrainConfig, models: Models, notify: Notify) -> None:
    """Choose the format of `models` for this GPU, if the user has not set it."""
    _ = models.quantized  # a quantized file sets the format
    if models.format_is_open and models.device.type == "cuda" and not models.is_nano:
        chosen = choose_format(config, models)
        models.use_format(chosen.format)
        notify(f"format {chosen.format}: the most accurate of those predicted to train fastest on this GPU")


def resolve_data(data: DataConfig, models: Models, notify: Notify) -> DataConfig:
    """`data` with resolution, sides of buckets and absolute paths filled in. Raises WrongRequest without folders."""
    if not data.folders:
        raise WrongRequest("no folder of images was given; name at least one")
    if data.resolution is None:
        resolution, reason = models.default_resolution
        data = replace(data, resolution=resolution)
        notify(f"resolution {resolution}: {reason}")
    resolution = multiple_of_16("resolution", cast(int, data.resolution))
    return replace(
        data,
        folders=tuple(_expanded(data.folders, data)),
        validation=tuple(_expanded(data.validation, data)),
        cache=data.cache.resolve(),
        min_side=data.min_side or max(data.step, resolution // 2 // data.step * data.step),
        max_side=data.max_side or resolution * 2,
    )


def _expanded(folders: Sequence[FolderConfig], data: DataConfig) -> Iterator[FolderConfig]:
    """The folders that hold the images of `folders`, with absolute paths. A folder's own trigger, even an empty one,
    overrides that of `data`.
    """
    for folder in folders:
        trigger = folder.trigger if folder.trigger is not None else data.trigger
        for found in expand(
            Folder(folder.path.resolve(), folder.repeats, trigger, folder.class_tokens), data.recursive
        ):
            yield FolderConfig(found.path, found.repeats, found.trigger, found.class_tokens)


def _file_name(text: str) -> str:
    """`text` as a file name that is valid on every system. Raises WrongRequest if nothing of it is."""
    name = re.sub(r'[<>:"/\\|?*\x00-\x1f\x7f]', "_", text).strip(". ")[:100]
    if not name:
        raise WrongRequest(f"{text!r} is not a file name; choose one with --name")
    return name
