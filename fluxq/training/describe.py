"""What a LoRA says about how it was trained, in sd-scripts' keys and in those of modelspec."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import cast

from fluxq.caching.folders import folders_of
from fluxq.config import TrainConfig
from fluxq.data.captions import Captions
from fluxq.data.dataset import Dataset
from fluxq.errors import WrongRequest
from fluxq.formats.lora.metadata import lora_metadata
from fluxq.models.parts import Models

Metadata = Callable[[int, float, float], dict[str, str]]
"""(step, started, finished) -> the LoRA's metadata at that step; times in seconds since 1970."""


def metadata_of(config: TrainConfig, models: Models, dataset: Dataset, batches: int) -> Metadata:
    """A function (step, started, finished) -> the LoRA's metadata at that step. batches: micro-batches per epoch."""
    folders = config.data.folders
    read = folders_of(config.data)[: len(folders)]
    files: defaultdict[Path, list[Path]] = defaultdict(list)
    for example in dataset.examples:
        files[Path(example.path).parent].append(Path(example.path))
    tags: dict[str | Path, Mapping[str, int]] = {f.path: _tag_frequency(f.captions(), files[f.path]) for f in read}
    buckets = Counter({e.bucket: 0 for e in dataset.examples})
    for example in dataset.examples:
        buckets[example.bucket] += example.repeats

    def at(step: int, started: float, finished: float) -> dict[str, str]:
        training, size = config.training, cast(int, config.data.resolution)
        return lora_metadata(
            name=cast(str, config.output.name),
            rank=cast(int, config.lora.rank),
            alpha=cast(float, config.lora.alpha),
            steps=step,
            last_step=cast(int, training.steps),
            epochs=-(-step * training.accumulate // batches),
            learning_rate=training.learning_rate,
            text_learning_rate=training.text_learning_rate,
            seed=training.seed,
            resolution=(size, size),
            variant=models.variant,
            base_model=models.flux_file,
            optimizer=training.optimizer,
            datasets={f.path: (f.repeats, len(files[f.path])) for f in folders},
            tag_frequency=tags,
            buckets=buckets,
            trigger=next((f.trigger for f in folders if f.trigger), None),
            title=cast(str, config.output.name),
            started=started,
            finished=finished,
            timestep_sampling=training.timesteps,
            shift=training.shift,
            guidance=training.guidance,
            precision="bf16",
            text_mask=config.model.text_mask,
        )

    return at


def _tag_frequency(captions: Captions, images: Sequence[Path]) -> dict[str, int]:
    """How often each comma-separated part of the captions occurs, most frequent first."""
    frequency: Counter[str] = Counter()
    for image in images:
        with suppress(WrongRequest):  # a bad caption, left out by --skip-bad
            frequency.update(part for part in map(str.strip, captions.of(image).text.split(",")) if part)
    return dict(frequency.most_common())
