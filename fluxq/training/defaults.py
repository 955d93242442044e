"""Unset settings, filled in from the images and the GPU, and printed with the reasons."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from fluxq.caching.folders import scan_data
from fluxq.config import (
    DEFAULT_RANK,
    DEFAULT_TARGETS,
    DataConfig,
    LoraConfig,
    OutputConfig,
    TrainConfig,
    TrainingConfig,
)
from fluxq.console import Notify, plural
from fluxq.data.buckets import Size, multiple_of_16
from fluxq.data.dataset import Dataset
from fluxq.data.examples import Scan, check_folder
from fluxq.data.folders import expand
from fluxq.data.masks import ALPHA, BESIDE
from fluxq.errors import WrongRequest
from fluxq.flow import VALIDATION_TIMES
from fluxq.formats.lora.keys import matrices
from fluxq.formats.lora.read import Lora
from fluxq.memory.placement import choose_format
from fluxq.models.check_file import is_kontext
from fluxq.models.parts import Models
from fluxq.settings import Folder, sizes_of

from .from_lora import settings_of
from .initial import check_init
from .libraries import library_of, parse_arguments
from .objective import class_captions
from .presets import LEARNING_RATE, LEARNING_RATE_REASON, lines, preset_of
from .state import MOST_TRAINED_ON

VALIDATIONS, VALIDATING = 12, 0.1
"""So many validations a run has by default, or fewer, which take about that share of the time of its steps."""
FORWARD = 0.43
"""The share of a step's time that a forward pass takes: measured on nano. Frozen weights have no gradients, so that of
FLUX.1 is predicted at a third if everything is recomputed, and at a half if nothing is.
"""


def resolve(
    config: TrainConfig, models: Models, notify: Notify, start: Lora | None = None, scanned: Scan | None = None
) -> tuple[TrainConfig, Scan]:
    """`config` with every setting filled in, and its images, which may be `scanned` already.

    start: the LoRA that training starts from, if any.

    Raises WrongRequest for settings that contradict each other, and for images and captions that cannot be used.
    """
    defaults, lora, training = TrainConfig(), config.lora, config.training
    check_text_encoder(config, models)
    check_init(config, models)
    data = resolve_data(config.data, models, notify)
    scanned = scanned or scan_data(data)
    epoch = epoch_of(data, scanned, training.batch)
    for line in lines(config, epoch.images):
        notify(line)
    if start is not None:
        lora = settings_of(start, lora, models.flux_config, notify)
    if lora.rank is None:
        lora = replace(lora, rank=DEFAULT_RANK)
        notify(f"rank {lora.rank}: the default; a higher rank can learn more, in a larger file")
    lora = replace(lora, targets=DEFAULT_TARGETS if lora.targets is None else lora.targets)
    if lora.alpha is None:
        lora = replace(lora, alpha=float(cast(int, lora.rank)))
        why = "scaled by the root of rank" if lora.rank_stabilized else "not scaled"
        notify(f"alpha {lora.alpha:g}: equal to rank, so the LoRA is {why} and is the same in every program")
    sizes = Counter(lora.adapted().layers(matrices(models.flux_config)).values())
    if len(sizes) > 1:
        each = (f"{plural(n, 'layer')} of rank {s.rank}, alpha {s.alpha:g}" for s, n in sizes.items())
        notify(f"LoRA: {', '.join(each)}")
    check_variants(lora, training)
    if (epochs := config.samples.every_epochs) is not None:
        every = max(1, round(epochs * epoch.batches / training.accumulate))
        config = replace(config, samples=replace(config.samples, every=every, every_epochs=None))
    training, output = resolve_steps(training, config.output, epoch, notify)
    training = resolve_validation(training, data, scanned, notify)
    training = resolve_optimizer(training, notify)
    if lora.text_encoder and training.text_learning_rate is None:
        training = replace(training, text_learning_rate=cast(float, training.learning_rate) / 2)
        notify(
            f"text learning rate {training.text_learning_rate:g}: half of the learning rate; sd-scripts also advises a "
            "lower one for text encoders"
        )
    if training.timesteps == "shift" and training.shift == defaults.training.shift:
        notify(f"shift {training.shift:g}: trains more at high noise, where the layout of an image is decided")
    if training.min_timestep >= training.max_timestep:
        raise WrongRequest(
            f"training.min_timestep {training.min_timestep:g} must be below max_timestep {training.max_timestep:g}"
        )
    if training.loss != "l2" or training.weighting != "none":
        notify(f"loss {training.loss}, weighting {training.weighting}: validation is the squared error all the same")
    training = resolve_schedule(training)
    check_preservation(training, data, lora)
    name = output.name or next((f.trigger for f in data.folders if f.trigger), None) or data.folders[0].path.name
    name = _file_name(name)
    output = replace(output, name=name, out=output.out or Path("runs") / name)
    if any(cast(Path, output.out).resolve() == f.path for f in (*data.folders, *data.validation)):
        raise WrongRequest(f"{output.out} is a folder of images; choose another folder for the run with --out")
    config = replace(config, data=data, lora=lora, training=training, output=output)
    captions = {text for example in scanned.examples for text in example.texts}
    if longest := models.use_captions(captions | {*class_captions(config, scanned).values()}):
        notify(f"text mask: captions have up to {longest} of {models.t5_length} T5 tokens; their padding is masked")
    resolve_format(config, models, notify)
    for line in caveats(models):
        notify(line)
    return replace(config, model=replace(models.resolved(), t5_length=models.t5_length)), scanned


@dataclass(frozen=True)
class Epoch:
    """What an epoch of training has: distinct images and how often they are seen, both without regularization; its
    micro-batches, those that are full, and the most images of a bucket.
    """

    images: int
    seen: int
    batches: int
    full: int
    largest: int


def epoch_of(data: DataConfig, scanned: Scan, batch: int, encoded: Dataset | None = None) -> Epoch:
    """encoded: lacks images of `scanned` that could not be encoded, which then do not count."""
    trained = {folder.path for folder in data.folders}
    names = {entry.name for entry in encoded.examples} if encoded else set()
    examples = [
        e
        for e in scanned.examples
        if e.folder.path in trained and not e.held_out and (encoded is None or e.name in names)
    ]
    own = [example for example in examples if not example.folder.regularization]
    groups: Counter[tuple[Size, int]] = Counter()
    for example in examples:
        groups[example.bucket, example.folder.batch or batch] += example.repeats
    batches = sum(-(-count // size) for (_, size), count in groups.items())
    full = sum(count // size for (_, size), count in groups.items())
    images, seen = len({example.path for example in own}), sum(example.repeats for example in own)
    return Epoch(images, seen, batches, full, max(groups.values(), default=0))


def not_full(epoch: Epoch) -> list[str]:
    """A line if batches have fewer images than asked, since a batch is of one bucket."""
    if not epoch.full:
        largest = f"the largest has {plural(epoch.largest, 'image')}"
        return [f"warning: no batch is full: a batch is of one bucket, and {largest}"]
    short = epoch.batches - epoch.full
    if not short:
        return []
    are = "is" if short == 1 else "are"
    return [f"{short} of {plural(epoch.batches, 'batch')} per epoch {are} not full: a batch is of one bucket"]


def resolve_steps(
    training: TrainingConfig, output: OutputConfig, epoch: Epoch, notify: Notify
) -> tuple[TrainingConfig, OutputConfig]:
    """Both with steps in place of epochs, and with default steps: so many that images are seen often enough."""
    per_epoch = epoch.batches / training.accumulate
    if training.epochs is not None:
        training = replace(training, steps=math.ceil(training.epochs * per_epoch), epochs=None)
        notify(f"steps {training.steps}: {per_epoch:g} an epoch")
    if output.save_every_epochs is not None:
        every = max(1, round(output.save_every_epochs * per_epoch))
        exact = every == output.save_every_epochs * per_epoch
        if output.numbering == "epoch" and not exact:
            notify("LoRAs are numbered by step, as an epoch is not a whole number of steps")
        keeps = output.save_every_epochs if output.numbering == "epoch" and exact else None
        output = replace(output, save_every=every, save_every_epochs=keeps)
        notify(f"saves every {plural(every, 'step')}: {per_epoch:g} an epoch")
    if training.steps is None:
        images, at_once = max(1, epoch.images), epoch.seen / max(1, epoch.batches) * training.accumulate
        preset = preset_of(training)
        seen = preset.seen if preset else min(3000, max(1000, 100 * images))
        training = replace(training, steps=math.ceil(seen / at_once))
        times = cast(int, training.steps) * at_once / images
        why = f"each of {plural(images, 'image')} is seen {times:.4g} times on average"
        why += f", {at_once:.3g} a step" if at_once != 1 else ""
        notify(f"steps {training.steps}: {f'{preset.why}; ' if preset else ''}{why}")
    return training, output


def resolve_validation(training: TrainingConfig, data: DataConfig, scanned: Scan, notify: Notify) -> TrainingConfig:
    """`training` with the steps between validations, if images are held out. Raises WrongRequest if it would never
    stop early.
    """
    folders = {folder.path for folder in data.validation}
    held_out = len([e for e in scanned.examples if e.held_out or e.folder.path in folders])
    patience, steps = training.early_stopping, cast(int, training.steps)
    if not held_out:
        if patience:
            raise WrongRequest("--early-stopping needs held-out images: --validation-split 0.1, or data.validation")
        return training
    passes = sum(math.ceil(images / training.batch) for images in (held_out, min(held_out, MOST_TRAINED_ON)))
    takes = VALIDATION_TIMES * passes * FORWARD / training.accumulate
    every = training.validate_every
    if every is None:
        every = max(math.ceil(steps / VALIDATIONS), math.ceil(takes / VALIDATING))
        training = replace(training, validate_every=every)
    every = min(every or steps, steps)
    times = math.ceil(steps / every)
    notify(
        f"validation after every {plural(every, 'step')} and at the end, {plural(times, 'time')} in all, on "
        f"{plural(held_out, 'held-out image')}: each is predicted to take as long as {plural(math.ceil(takes), 'step')}"
        f", together {times * takes / (steps + times * takes):.0%} of the run's time (--validate-every)"
    )
    if patience and times <= patience:
        raise WrongRequest(
            f"--early-stopping {patience} cannot end a run of {plural(times, 'validation')}; lower it, or lower "
            "--validate-every"
        )
    return training


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


def resolve_optimizer(training: TrainingConfig, notify: Notify) -> TrainingConfig:
    """`training` with a learning rate. Raises WrongRequest for an optimizer that is not there, or wrong arguments."""
    library = library_of(training.optimizer)
    library.check(parse_arguments(training.optimizer_args))
    if not library.takes_decay():
        notify(f"weight decay: none, as {training.optimizer} takes none")
    if training.schedule != "constant" and library.averages():
        raise WrongRequest(
            f"{training.optimizer} averages weights in place of a schedule, which --schedule {training.schedule} would "
            "defeat; leave --schedule out"
        )
    if training.learning_rate is not None:
        return training
    learning_rate, reason = library.default_rate()
    if preset_of(training) and library.rate == LEARNING_RATE:  # other optimizers have learning rates of their own
        reason = LEARNING_RATE_REASON
    notify(f"learning rate {learning_rate:g}: {reason}")
    return replace(training, learning_rate=learning_rate)


def resolve_schedule(training: TrainingConfig) -> TrainingConfig:
    """`training` with the warm-up in steps. Raises WrongRequest for a schedule that does not fit into the run."""
    steps, warmup = cast(int, training.steps), training.warmup
    warmup = round(warmup * steps) if warmup < 1 else warmup
    if warmup % 1:
        raise WrongRequest(
            f"a warm-up of {warmup:g} steps is not a whole number; for a share of all steps, give a number below 1"
        )
    if warmup >= steps:
        raise WrongRequest(f"a warm-up of {warmup:g} steps does not fit into {steps}; lower --warmup or raise --steps")
    if training.schedule == "cosine" and training.schedule_cycles > steps - warmup:
        raise WrongRequest(
            f"{training.schedule_cycles} cycles of the schedule do not fit into {steps - warmup:g} steps; lower "
            "training.schedule_cycles or raise --steps"
        )
    if training.schedule == "wsd" and (falls := training.schedule_decay * (steps - warmup)) < 1:
        raise WrongRequest(
            f"the last {falls:.2g} steps are too few for a schedule to fall in; raise training.schedule_decay or "
            "--steps"
        )
    return replace(training, warmup=float(warmup))


def check_variants(lora: LoraConfig, training: TrainingConfig) -> None:
    """Raise WrongRequest for variants of LoRA that the optimizer contradicts."""
    if lora.plus_ratio != 1 and re.search("prodigy|dadapt", training.optimizer, re.IGNORECASE):
        raise WrongRequest(
            f"lora.plus_ratio sets two learning rates, and {training.optimizer} finds one of its own; leave plus_ratio "
            "out, or choose another --optimizer"
        )
    if (lora.ema or lora.max_norm) and library_of(training.optimizer).averages():
        raise WrongRequest(
            f"{training.optimizer} averages the weights itself; leave lora.{'ema' if lora.ema else 'max_norm'} out, or "
            "choose another --optimizer"
        )


def check_preservation(training: TrainingConfig, data: DataConfig, lora: LoraConfig) -> None:
    """Raise WrongRequest for a class to preserve that nothing can be put in place of."""
    if (name := training.preserve_class) is None:
        return
    triggers = [folder.trigger for folder in data.folders if folder.trigger]
    if not triggers:
        raise WrongRequest(f"--preserve-class {name} takes the place of the trigger in captions; give a --trigger")
    if not name.strip() or name.strip().casefold() in map(str.casefold, triggers):
        raise WrongRequest(f"--preserve-class {name!r} must name what the trigger is one of, like person")
    if lora.init == "loftq":
        raise WrongRequest(
            "--preserve-class compares with the base model as it is quantized, which --lora-init loftq corrects; leave "
            "one of them out"
        )
    if lora.text_encoder:
        raise WrongRequest(
            "--preserve-class compares with the base model, which needs its own CLIP-L beside the one that trains; "
            "leave out --text-encoder"
        )


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
    if data.resolution is None and not all(f.resolution for f in (*data.folders, *data.validation)):
        resolution, reason = models.default_resolution
        data = replace(data, resolution=resolution)
        notify(f"resolution {resolution}: {reason}")
    for resolution in (data.resolution, *(folder.resolution for folder in (*data.folders, *data.validation))):
        for size in sizes_of(resolution or ()):
            for side in size:
                multiple_of_16("resolution", side)
    masks = _masks_path(data.masks)
    data = replace(data, masks=masks, cache=data.cache.resolve())
    folders, validation = ([*_expanded(some, data)] for some in (data.folders, data.validation))
    for own in (*data.folders, *data.validation):
        check_folder(own, own.filled(data))
    weighted = [folder for folder in folders if folder.weight is not None]
    if weighted and (without := [f for f in folders if f.weight is None and not f.regularization]):
        raise WrongRequest(
            f"{weighted[0].path} has a weight and {without[0].path} has none; give each folder a weight, or none"
        )
    if all(folder.regularization for folder in folders):
        raise WrongRequest(f"{folders[0].path} is for regularization, and there is nothing else to train on; name it")
    trained = {folder.path for folder in folders}
    if both := [folder.path for folder in validation if folder.path in trained]:
        raise WrongRequest(
            f"{both[0]} is both trained on and held out, so its loss would say nothing; hold other images out"
        )
    return replace(data, folders=tuple(folders), validation=tuple(validation))


def _expanded(folders: Sequence[Folder], data: DataConfig) -> Iterator[Folder]:
    """The folders that hold the images of `folders`, with absolute paths. A folder's own trigger, even an empty one,
    overrides that of `data`, which regularization images never get. One inside another counts once.
    """
    seen = {folder.path.resolve() for folder in folders}
    for folder in folders:
        path, trigger = folder.path.resolve(), "" if folder.regularization else data.trigger
        trigger = trigger if folder.trigger is None else folder.trigger
        masks = _masks_path(folder.masks)
        for found in expand(replace(folder, path=path, trigger=trigger, masks=masks), data.recursive):
            if found.path == path or found.path not in seen:
                seen.add(found.path)
                yield found


def _masks_path(masks: str | None) -> str | None:
    """`masks` with an absolute path, if it is a folder."""
    return masks if masks in (None, "", BESIDE, ALPHA) else str(Path(masks).expanduser().resolve())


def _file_name(text: str) -> str:
    """`text` as a file name that is valid on every system. Raises WrongRequest if nothing of it is."""
    name = re.sub(r'[<>:"/\\|?*\x00-\x1f\x7f]', "_", text).strip(". ")[:100]
    if not name:
        raise WrongRequest(f"{text!r} is not a file name; choose one with --name")
    return name
