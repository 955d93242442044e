"""What a run says about itself at its start and at its end: what trains, and why it is slower than it could be."""

from __future__ import annotations

from collections import Counter

from fluxq.allocator import has_expandable_segments
from fluxq.config import TrainConfig
from fluxq.console import plural
from fluxq.data import Dataset
from fluxq.memory.machine import notes, read_machine
from fluxq.model.flux import Flux
from fluxq.models import Models
from fluxq.offload import StreamingRing
from fluxq.offload.arena import Arena

from .health import high_learning_rate
from .optim import FlatOptimizer, parameters_of


def summary(
    config: TrainConfig,
    models: Models,
    flux: Flux,
    dataset: Dataset,
    batches: int,
    layers: int,
    optimizer: FlatOptimizer,
) -> list[str]:
    """A line on the model, what trains, and the images; then one for each thing that makes the run slow or risky.

    batches: per epoch; layers: those with LoRA.
    """
    images, weights = len({e.path for e in dataset.examples}), sum(p.numel() for p in parameters_of(optimizer))
    name = "nano" if models.is_nano else f"FLUX.1 {models.variant}"
    first = (
        f"{name} in {config.model.format}: {weights:,} trainable parameters in {plural(layers, 'layer')}; "
        f"{plural(images, 'image')}, {plural(batches, 'batch')} per epoch, {plural(config.training.steps or 0, 'step')}"
    )
    return [
        first,
        *short_batches(config.training.batch, dataset),
        *slow_lines(slower(flux)),
        *high_learning_rate(config.training.learning_rate),
    ]


def short_batches(batch: int, dataset: Dataset) -> list[str]:
    """A line if no batch can have as many images as asked, since a batch is of one bucket."""
    buckets: Counter[tuple[int, int]] = Counter()
    for example in dataset.examples:
        buckets[example.bucket] += example.repeats
    largest = max(buckets.values())
    if batch <= largest:
        return []
    return [f"warning: no batch has {batch} images: a batch is of one bucket, and the largest has {largest}"]


def slow_lines(reasons: list[str]) -> list[str]:
    return [f"slower than it could be: {reason}" for reason in reasons]


def slower(flux: Flux) -> list[str]:
    """Why training `flux` here is slower than it could be, a line each."""
    on_gpu = next(flux.buffers()).device.type == "cuda"
    reasons = notes(read_machine())
    if on_gpu and not has_expandable_segments():
        reasons.append(
            "torch's allocator has no expandable segments (they are for Linux, and PYTORCH_ALLOC_CONF may turn them "
            "off), so the plan leaves more GPU memory unused"
        )
    if isinstance(flux.ring, StreamingRing) and isinstance(flux.ring.host, Arena) and (why := flux.ring.host.refused):
        reasons.append(
            f"weights are copied to the GPU from pageable memory: {why}; close other programs, or raise the "
            "limit of locked memory (ulimit -l)"
        )
    if flux.inputs is not None and (why := flux.inputs.refused):
        reasons.append(f"block inputs are copied from and to pageable memory: {why}")
    return reasons
