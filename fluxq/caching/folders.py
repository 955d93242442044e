"""Cache what a run needs: the records of its folders and its prompts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from fluxq.config import DataConfig
from fluxq.console import console, progress_bar
from fluxq.data.buckets import Size
from fluxq.data.dataset import Dataset
from fluxq.data.examples import Folder
from fluxq.memory.phases import band_for
from fluxq.models.parts import Models

from .build import EncoderFiles, build_cache, cache_prompts
from .encoding import PIXELS_PER_BATCH
from .foreign import ModelShapes
from .import_foreign import import_caches
from .store import Store, Text

RECORD_HEADER = 1 << 9  # bytes of a record beside its tensors


def import_folders(data: DataConfig, models: Models) -> tuple[int, int]:
    """Import other programs' caches for all folders of `data` (resolved). Returns the (images, captions) imported.

    Raises WrongRequest if there are none, and for files that are damaged or do not fit.
    """
    flux = models.flux_config
    expected = ModelShapes(flux.in_channels // 4, models.t5_length, flux.context_in_dim, flux.vec_in_dim)
    with progress_bar() as progress:
        return import_caches(
            folders_of(data),
            data.cache,
            expected,
            **_shapes(data),
            skip_bad=data.skip_bad,
            progress=progress,
            notify=console.print,
        )


def cache_folders(
    data: DataConfig,
    models: Models,
    prompts: Sequence[str],
    progress: Callable[[str, int, int], None],
    budget: int | None = None,
    require_room: Callable[[int], None] = lambda nbytes: None,
) -> Dataset:
    """The dataset of all folders of `data` (resolved), including the validation folders.

    Missing records are encoded, one encoder after the other, each within `budget` bytes of GPU memory (None: no limit).
    Before, `require_room` is called with the bytes that they will take.
    """

    def before(images: Collection[Size], captions: int) -> None:
        require_room(record_bytes(models, images, captions))

    band = band_for(max(PIXELS_PER_BATCH, cast(int, data.resolution) ** 2), budget)
    return build_cache(
        folders_of(data),
        data.cache,
        _encoder_files(models, data.cache),
        partial(models.load_autoencoder, band),
        partial(models.load_text_encoders, budget),
        **_shapes(data),
        t5_length=models.t5_length,
        prompts=prompts,
        skip_bad=data.skip_bad,
        progress=progress,
        notify=console.print,
        before=before,
    )


def record_bytes(models: Models, images: Collection[Size], captions: int) -> int:
    """The bytes of the records of `images`, given by their sizes, and of so many captions."""
    flux = models.flux_config
    latents = sum(width * height // 64 for width, height in images) * flux.in_channels // 4 * 2 * 4
    texts = captions * (models.t5_length * flux.context_in_dim * 2 + flux.vec_in_dim * 4)
    return latents + texts + RECORD_HEADER * (len(images) + captions)


def cache_texts(
    cache: Path,
    models: Models,
    prompts: Sequence[str],
    progress: Callable[[str, int, int], None],
    budget: int | None = None,
) -> dict[str, Text]:
    """Each prompt, encoded; `progress` and `budget` as in `cache_folders`."""
    files, load = _encoder_files(models, cache), partial(models.load_text_encoders, budget)
    return cache_prompts(prompts, cache, files, load, t5_length=models.t5_length, progress=progress)


def folders_of(data: DataConfig) -> list[Folder]:
    """The folders of `data`, those of held-out images last."""
    return [
        Folder(f.path, f.repeats, f.trigger, f.class_tokens, data.caption_line, data.caption_from_name)
        for f in (*data.folders, *data.validation)
    ]


def _shapes(data: DataConfig) -> dict[str, Any]:
    """The settings that decide the shapes of training images."""
    sides = {"resolution": data.resolution, "min_side": data.min_side, "max_side": data.max_side}
    return {**sides, "step": data.step, "upscale": data.upscale}


def _encoder_files(models: Models, cache: Path) -> EncoderFiles:
    """Each encoder's files; without tokenizers if a text encoder is neither on disk nor in the hashes."""
    known = Store(cache).hashes.knows
    ae, clip_l, t5xxl = (models.files(part) for part in ("ae", "clip_l", "t5xxl"))
    have_encoders = all(path.is_file() or known(path) for path in (*clip_l, *t5xxl))
    clip, t5 = models.tokenizer_files(known) if have_encoders else ((), ())
    return EncoderFiles(ae, clip_l, t5xxl, (*clip, *t5))
