"""The room that a run needs on each disk: worked out and said before anything is encoded or trained.

What is certain is required: the state, which is there twice while it is saved, the LoRAs that are kept, records of the
cache, quantized weights. Previews and the log are estimated from above, and a run goes on without them, so there is
only a warning. What the run has written before, and replaces, does not count.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from fluxq.config import TrainConfig
from fluxq.console import Notify
from fluxq.errors import WrongRequest
from fluxq.formats.atomic import existing_folder, free_bytes
from fluxq.formats.checkpoint.shapes import flux_shapes
from fluxq.formats.lora.keys import split_rows
from fluxq.formats.quantized import cache_folder, stored_bytes
from fluxq.model.clip import CLIP_TARGETS
from fluxq.model.costs import optimizer_bytes
from fluxq.model.lora import targeted
from fluxq.model.start import saved_ranks
from fluxq.models import Models
from fluxq.models.check_file import size

from .libraries import MIN_8_BITS
from .run import Run

LOG_LINE, PLOT, HEADER, TABLES = 256, 1 << 18, 256, 2 << 10
"""Bytes of a step in log.jsonl, of loss.png, of a tensor in a LoRA's header, and of the tables of an 8-bit state."""


@dataclass(frozen=True)
class Need:
    """`nbytes` that `what` will take below `place`, in addition to what is there.

    way: how to do with less, or elsewhere.
    """

    what: str
    place: Path
    nbytes: int
    way: str
    certain: bool = True


def require_room_for_run(run: Run, models: Models, previews: int, notify: Notify, cache_bytes: int) -> None:
    """`require_room` for a run that still has `cache_bytes` to encode. previews: images at a time."""
    require_room([*needs_of(run, models, previews), need_of_cache(run.config.data.cache, cache_bytes)], notify)


def require_room(needs: Sequence[Need], notify: Notify) -> None:
    """Say what `needs` take, a line for each disk. Raises WrongRequest if what is certain does not fit."""
    for line, warning, problem in room_for(needs):
        notify(f"disk: {line}")
        if problem:
            raise WrongRequest(problem)
        if warning:
            notify(f"warning: {warning}")


def room_for(needs: Sequence[Need]) -> Iterator[tuple[str, str | None, str | None]]:
    """For each disk: what `needs` take of it and what it has, a warning if not all of that fits, and the problem if not
    even what is certain fits.
    """
    for folder, names in by_disk({need.what: need.place for need in needs}).items():
        own = [need for need in needs if need.what in names and need.nbytes]
        total, sure = sum(need.nbytes for need in own), sum(need.nbytes for need in own if need.certain)
        if not own:
            continue
        listed, free = ", ".join(f"{need.what} {size(need.nbytes)}" for need in own), free_bytes(folder)
        line, warning, problem = f"{folder} needs up to {size(total)} ({listed})", None, None
        if free is None:
            yield f"{line}; how much is free is not known", None, None
            continue
        if sure > free:
            listed = ", ".join(f"{need.what} {size(need.nbytes)}" for need in own if need.certain)
            largest = max((need for need in own if need.certain), key=lambda need: need.nbytes)
            problem = (
                f"the disk of {largest.place} has {size(free)} free, and {size(sure)} are needed ({listed}); "
                f"free some space, or use {largest.way}"
            )
        elif total > free:
            warning = f"previews and log may not fit on the disk of {own[0].place}; training goes on without them"
        yield f"{line} and has {size(free)} free", warning, problem


def needs_of(run: Run, models: Models, previews: int) -> list[Need]:
    """What a run writes, apart from the cache."""
    config, out = run.config, run.folder
    steps, every, output = config.training.steps or 0, config.samples.every, config.output
    tensors, init = lora_tensors(config, models), config.lora.init
    sizes, averaged = config.lora.adapted().layers(_matrices(flux_shapes(models.flux_config))), config.lora.ema > 0
    state = state_bytes(tensors, config.training.optimizer, min(size.rank for size in sizes.values()))
    state += (4 * sum(tensors) + HEADER * len(tensors)) * averaged + 2 * sum(tensors) * (init != "plain")
    before_the_end = (steps - 1) // output.save_every if output.save_every else 0
    best = 1 if config.data.validation or config.data.validation_split else 0
    before_the_end = min(before_the_end, output.keep) if output.keep else before_the_end
    loras = best + (1 + averaged) * (1 + before_the_end)
    twice = saved_ranks(init, config.lora.keep_correction)
    lora = twice * (2 * sum(tensors) + _split_bytes(config, models)) + HEADER * len(tensors)
    side = config.data.side
    image = 3 * (config.samples.width or side) * (config.samples.height or side)
    sheets = -(-steps // every) if every else 0
    samples, log = out / "samples", out / "log.jsonl"
    ways = "another --out, or save fewer LoRAs (--save-every, --keep)"
    needs = [
        Need("state twice", out, 2 * state - present(out / "state"), ways),
        Need("LoRAs", out, loras * lora - present(*run.loras(), *out.glob(".*.tmp-*")), ways),
        Need("previews", out, sheets * previews * image - present(samples), "another --out", certain=False),
        Need("log", out, steps * LOG_LINE + PLOT - present(log, out / "loss.png"), "another --out", certain=False),
    ]
    return [*(replace(need, nbytes=max(0, need.nbytes)) for need in needs), need_of_weights(models)]


def need_of_weights(models: Models) -> Need:
    """The transformer's weights in the format of training, if its file has another."""
    nbytes = 0 if models.is_quantized else stored_bytes(flux_shapes(models.flux_config), models.format)
    return Need("quantized weights", cache_folder(), nbytes, "another folder in FLUXQ_CACHE")


def need_of_cache(cache: Path, nbytes: int) -> Need:
    return Need("cache", cache, nbytes, "another --cache, or fewer data.variants")


def lora_tensors(config: TrainConfig, models: Models) -> list[int]:
    """How many numbers each tensor of the LoRA has."""
    layers = _matrices(flux_shapes(models.flux_config))
    tensors = [s.rank * side for path, s in config.lora.adapted().layers(layers).items() for side in layers[path]]
    if config.lora.text_encoder:
        layers = _matrices({k: s for k, s in models.open("clip_l").shapes.items() if k.startswith("encoder.")})
        tensors += [cast(int, config.lora.rank) * n for p in targeted(layers, CLIP_TARGETS) for n in layers[p]]
    return tensors


def _split_bytes(config: TrainConfig, models: Models) -> int:
    """What a LoRA takes in addition where fused layers are split, each part with a copy of lora_down."""
    if config.lora.file_format not in ("diffusers", "peft"):
        return 0
    flux, layers = models.flux_config, _matrices(flux_shapes(models.flux_config))
    sizes = config.lora.adapted().layers(layers)
    rank = max(size.rank for size in sizes.values())  # which all are padded to
    padded = sum(2 * (rank - size.rank) * sum(layers[path]) for path, size in sizes.items())
    return padded + sum((len(split_rows(p, flux)) - 1) * (2 * rank * layers[p][1] + 2 * HEADER) for p in sizes)


def state_bytes(tensors: Iterable[int], optimizer: str, rank: int) -> int:
    """The saved state: the LoRA in fp32 and the optimizer's state, where bitsandbytes keeps small tensors in fp32."""
    tables = TABLES if optimizer in ("adamw8bit", "lion8bit") else 0
    return sum(
        4 * n + 6 * HEADER + (8 * n if tables and n < MIN_8_BITS else optimizer_bytes(optimizer, n, rank) + tables)
        for n in tensors
    )


def by_disk(places: Mapping[str, Path]) -> dict[Path, list[str]]:
    """A folder on each disk -> the names of the `places` that are, or would be, on that disk."""
    disks: dict[int, tuple[Path, list[str]]] = {}
    for name, place in places.items():
        folder = existing_folder(place)
        disks.setdefault(folder.stat().st_dev, (folder, []))[1].append(name)
    return dict(disks.values())


def _matrices(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {name.removesuffix(".weight"): shape for name, shape in shapes.items() if len(shape) == 2}


def present(*paths: Path) -> int:
    """The bytes of these files, and of all files in these folders."""
    files = (file for path in paths for file in (path.rglob("*") if path.is_dir() else [path]))
    return sum(file.stat().st_size for file in files if file.is_file())
