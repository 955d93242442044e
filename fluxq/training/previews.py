"""Previews: images that a run samples with its own LoRA while it trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from PIL.Image import Image

from fluxq.caching.store import Text
from fluxq.config import TrainConfig
from fluxq.console import Notify
from fluxq.data.buckets import multiple_of_16
from fluxq.data.examples import Scan
from fluxq.errors import WrongRequest
from fluxq.memory.phases import preview_limits
from fluxq.memory.retry import OutOfMemoryRetry
from fluxq.model.flux import Flux
from fluxq.models import Models
from fluxq.sampling import requests_for, sample_images
from fluxq.sampling.sheets import save_image

from .run import Run


def preview_prompts(config: TrainConfig, models: Models, scanned: Scan) -> tuple[str, ...]:
    """The configured prompts, else the triggers, else the first three captions; () if the run has no previews."""
    samples, folders = config.samples, config.data.folders
    if not samples.every:
        return ()
    for name, pixels in (("width", samples.width), ("height", samples.height)):
        multiple_of_16(name, pixels or 16)
    if not (autoencoder := models.served("ae").path).exists():
        raise WrongRequest(f"previews need {autoencoder}, which does not exist; put it back, or pass --sample-every 0")
    triggers = dict.fromkeys(f.trigger for f in folders if f.trigger)
    taught = {folder.path for folder in folders if not folder.regularization}
    captions = dict.fromkeys(e.caption for e in scanned.examples if e.folder.path in taught and not e.held_out)
    return samples.prompts or tuple(triggers) or tuple(captions)[:3]


def save_previews(
    run: Run,
    models: Models,
    flux: Flux,
    retry: OutOfMemoryRetry,
    texts: Mapping[str, Text],
    prompts: Sequence[str],
    step: int,
    notify: Notify,
) -> None:
    """Sample `prompts` into samples/ with the LoRA after `step` steps, within the memory of a training step.

    If that fails, it notifies the user and training continues.
    """
    requests = requests_for(run.config.samples, prompts, run.config.data.side)

    def images() -> list[Image]:
        limits = preview_limits(run.config, models, retry.placement)
        return sample_images(flux, models.load_autoencoder, texts, requests, limits=limits, notify=notify)

    try:
        for i, image in enumerate(retry.run(f"the preview at step {step}", images, training=False)):
            save_image(image, run.folder / "samples" / f"{step:06}_{i:02}.png", requests[i], Step=str(step))
    except (WrongRequest, torch.OutOfMemoryError) as error:
        notify(f"no preview at step {step}: {error}")
