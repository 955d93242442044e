"""What a LoRA says about how it was trained, in sd-scripts' keys and in those of modelspec."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import cast

from fluxq.caching import Batches
from fluxq.config import LoraConfig, TrainConfig, TrainingConfig
from fluxq.console import plural
from fluxq.data.dataset import Dataset
from fluxq.data.examples import Scan
from fluxq.formats.checkpoint.shapes import flux_shapes
from fluxq.formats.lora.keys import matrices
from fluxq.formats.lora.metadata import lora_metadata
from fluxq.model.start import saved_ranks, takes_start
from fluxq.models.parts import Models

from .losses import HUBER
from .timesteps import USED_BY

Metadata = Callable[[int, float, float], dict[str, str]]
"""(step, started, finished) -> the LoRA's metadata at that step; times in seconds since 1970."""


def metadata_of(config: TrainConfig, models: Models, scanned: Scan, dataset: Dataset, batches: Batches) -> Metadata:
    """A function (step, started, finished) -> the LoRA's metadata at that step. scanned: what `dataset` was made of."""
    folders = config.data.folders
    used = {example.name for example in dataset.examples}
    captions = {e.path: e.found.text for e in scanned.examples if e.name in used}
    files = {folder.path: [path for path in captions if path.parent == folder.path] for folder in folders}
    tags: dict[str | Path, Mapping[str, int]] = {
        folder: _tag_frequency(captions[path] for path in paths) for folder, paths in files.items()
    }
    repeats = {example.folder.path: example.repeats for example in scanned.examples if not example.held_out}
    held_out = len({example.path for example in scanned.examples if example.held_out})
    buckets = Counter({e.bucket: 0 for e in dataset.examples})
    for example in dataset.examples:
        buckets[example.bucket] += example.repeats

    init, shapes, ranks, alphas = config.lora.init, flux_shapes(models.flux_config), set[int](), set[float]()
    for path, size in config.lora.adapted().layers(matrices(models.flux_config)).items():
        starts = takes_start(init, path, shapes[f"{path}.weight"], size.rank)
        times = saved_ranks(init, config.lora.keep_correction) if starts else 1
        ranks.add(size.rank * times)
        alphas.add(size.alpha * times)

    def at(step: int, started: float, finished: float) -> dict[str, str]:
        training, size = config.training, config.data.side
        seen = {"fluxq_images_seen": str(batches.seen_before(step * training.accumulate))}
        seen |= objective_metadata(training)
        if config.data.validation_split:
            seen |= {"fluxq_validation_split": f"{config.data.validation_split:g}: {plural(held_out, 'image')}"}
        about = lora_metadata(
            name=cast(str, config.output.name),
            rank=next(iter(ranks)) if len(ranks) == 1 else "Dynamic",
            alpha=next(iter(alphas)) if len(alphas) == 1 else "Dynamic",
            steps=step,
            last_step=cast(int, training.steps),
            epochs=-(-step * training.accumulate // len(batches)),
            learning_rate=cast(float, training.learning_rate),
            text_learning_rate=training.text_learning_rate,
            seed=training.seed,
            resolution=(size, size),
            variant=models.variant,
            base_model=models.flux_file,
            optimizer=training.optimizer,
            datasets={f.path: (repeats.get(f.path, f.repeats), len(files[f.path])) for f in folders},
            tag_frequency=tags,
            buckets=buckets,
            trigger=next((f.trigger for f in folders if f.trigger), None),
            title=cast(str, config.output.name),
            started=started,
            finished=finished,
            timestep_sampling="sigma" if training.timesteps in ("logit_normal", "mode") else training.timesteps,
            shift=training.shift,
            guidance=training.guidance,
            precision="bf16",
            text_mask=config.model.text_mask,
        )
        given = {name: value for name, _, value in (text.partition("=") for text in config.output.metadata)}
        return about | seen | variant_metadata(config.lora) | given

    return at


def objective_metadata(training: TrainingConfig) -> dict[str, str]:
    """Loss and timesteps in sd-scripts' keys, and in fluxq's those that it does not have.

    sd-scripts has one key for both what logit_normal and mode draw and how timesteps are weighted.
    """
    density = training.timesteps if training.timesteps in ("logit_normal", "mode") else "none"
    values: dict[str, object] = {
        "ss_loss_type": training.loss,
        "ss_model_prediction_type": training.prediction,
        "ss_weighting_scheme": density if training.weighting == "none" else training.weighting,
    }
    if training.loss in HUBER:
        values |= {"ss_huber_c": training.huber_c, "ss_huber_schedule": training.huber_schedule}
        values |= {"ss_huber_scale": training.huber_scale}
    values |= {
        f"ss_{name}": getattr(training, name)
        for name, modes in USED_BY.items()
        if training.timesteps in modes and name != "shift"  # which lora_metadata writes
    }
    if training.input_noise:
        values |= {"ss_ip_noise_gamma": training.input_noise}
        values |= {"ss_ip_noise_gamma_random_strength": training.input_noise_random}
    if (training.min_timestep, training.max_timestep) != (0, 1):
        values |= {"fluxq_timestep_range": f"{training.min_timestep:g} to {training.max_timestep:g}"}
    if training.preserve_class is not None:
        values |= {f"fluxq_preserve_{name}": getattr(training, f"preserve_{name}") for name in ("class", "weight")}
    return {key: str(value) for key, value in values.items()}


def variant_metadata(lora: LoraConfig) -> dict[str, str]:
    """What the LoRA has beyond rank and alpha, as sd-scripts writes its --network_args and options, and in fluxq's keys
    what sd-scripts does not have.
    """
    arguments = {
        "train_double_block_indices": lora.double_blocks,
        "train_single_block_indices": lora.single_blocks,
        "rank_dropout": lora.rank_dropout,
        "module_dropout": lora.module_dropout,
        "loraplus_lr_ratio": lora.plus_ratio if lora.plus_ratio != 1 else None,
    }
    own = {
        "fluxq_ranks": ",".join(lora.ranks),
        "fluxq_alphas": ",".join(lora.alphas),
        "fluxq_rank_stabilized": lora.rank_stabilized,
        "fluxq_input_dropout": lora.dropout,
        "ss_network_dropout": lora.inner_dropout,
        "fluxq_lora_init": lora.init if lora.init != "plain" else None,
        "ss_scale_weight_norms": lora.max_norm,
    }
    return {
        "ss_network_args": json.dumps({key: str(value) for key, value in arguments.items() if value}),
        **{key: str(value) for key, value in own.items() if value},
    }


def _tag_frequency(captions: Iterable[str]) -> dict[str, int]:
    """How often each comma-separated part of the captions occurs, most frequent first."""
    frequency: Counter[str] = Counter()
    for caption in captions:
        frequency.update(part for part in map(str.strip, caption.split(",")) if part)
    return dict(frequency.most_common())
