"""Cache what a run needs: the records of its folders and its prompts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from fluxq.config import DataConfig
from fluxq.console import console, progress_bar
from fluxq.data.buckets import Size
from fluxq.data.dataset import Dataset
from fluxq.data.examples import Example, Scan, balanced, scan
from fluxq.data.split import divided, held_out_images
from fluxq.memory.phases import band_for
from fluxq.models.parts import Models

from .build import EncoderFiles, build_cache, cache_prompts, missing_records
from .encoding import PIXELS_PER_BATCH
from .foreign import ModelShapes
from .import_foreign import import_caches
from .looks import LOOKS, Looks
from .store import Store, Text

RECORD_HEADER = 1 << 9  # bytes of a record beside its tensors


def import_folders(data: DataConfig, models: Models) -> tuple[int, int]:
    """Import other programs' caches for all folders of `data` (resolved). Returns the (images, captions) imported.

    Raises WrongRequest if there are none, and for files that are damaged or do not fit.
    """
    flux = models.flux_config
    masked = models.config.text_mask
    expected = ModelShapes(flux.in_channels // 4, models.t5_length, flux.context_in_dim, flux.vec_in_dim, masked)
    with progress_bar() as progress:
        return import_caches(scan_data(data), data.cache, expected, data.skip_bad, progress, console.print)


def scan_data(data: DataConfig) -> Scan:
    """The images of all folders of `data` (resolved), those of held-out images last. Raises WrongRequest as `scan`, and
    for a split that leaves nothing. Writes nothing.
    """
    trained, held_out = data.filled()
    scanned = scan(
        [*trained, *held_out], data.resolution or 0, data.min_side, data.max_side, data.step, skip_bad=data.skip_bad
    )
    examples, paths = scanned.examples, {folder.path for folder in trained}
    if data.validation_split:
        images = [example for example in examples if example.folder.path in paths]
        held = _held_out(images, data)
        for name in dict.fromkeys(example.name for example in images if example.path in held):
            scanned.found.add("held out", name)
        examples = divided(examples, held)
    return replace(scanned, examples=balanced(examples, paths))


def _held_out(examples: Sequence[Example], data: DataConfig) -> set[Path]:
    """Those of the images that are held out."""
    store = Store(data.cache)
    with progress_bar() as progress:
        hashes = {example.path: "" for example in examples}
        for done, path in enumerate(hashes):
            progress("hashing", done, len(hashes))
            hashes[path] = store.hashes.of(path)
        looks = Looks(store.root / LOOKS).of(hashes, partial(progress, "looking"))
    taught = {example.path for example in examples if not example.folder.regularization}
    return held_out_images(hashes, looks, data.validation_split, taught)


def cache_folders(
    data: DataConfig,
    scanned: Scan,
    models: Models,
    prompts: Sequence[str],
    progress: Callable[[str, int, int], None],
    budget: int | None = None,
    require_room: Callable[[int], None] = lambda nbytes: None,
) -> Dataset:
    """The dataset of `scanned`, the images of all folders of `data` (resolved), including the validation folders.

    Missing records are encoded, one encoder after the other, each within `budget` bytes of GPU memory (None: no limit).
    Before, `require_room` is called with the bytes that they will take.
    """

    def before(images: Collection[Size], captions: Collection[str], masks: Collection[Size]) -> None:
        require_room(record_bytes(models, images, captions, masks))

    band = band_for(max(PIXELS_PER_BATCH, data.side**2), budget)
    return build_cache(
        scanned,
        data.cache,
        _encoder_files(models, data.cache),
        partial(models.load_autoencoder, band),
        partial(models.load_text_encoders, budget),
        request=asdict(replace(data, cache=Path())),
        t5_length=models.t5_length,
        text_mask=models.config.text_mask,
        prompts=prompts,
        skip_bad=data.skip_bad,
        progress=progress,
        notify=console.print,
        before=before,
    )


def record_bytes(models: Models, images: Collection[Size], captions: Collection[str], masks: Collection[Size]) -> int:
    """The bytes of the records of `images` and `masks`, given by their images' sizes, and of `captions`."""
    flux, masked = models.flux_config, models.config.text_mask
    latents = sum(width * height // 64 for width, height in images) * flux.in_channels // 4 * 2 * 4
    tokens = sum(models.tokens_of(captions)) if masked and captions else len(captions) * models.t5_length
    texts = tokens * flux.context_in_dim * 2 + len(captions) * flux.vec_in_dim * 4
    counts = sum(width * height // 64 for width, height in masks) * 4
    return latents + texts + counts + RECORD_HEADER * (len(images) + len(captions) + len(masks))


def missing_bytes(data: DataConfig, scanned: Scan, models: Models, prompts: Sequence[str] = ()) -> int:
    """The bytes of the records that the cache lacks for `scanned` and `prompts`."""
    encoders, masked = _encoder_files(models, data.cache), models.config.text_mask
    missing = missing_records(scanned, data.cache, encoders, models.t5_length, masked, prompts)
    return record_bytes(models, *missing)


def cache_texts(
    cache: Path,
    models: Models,
    prompts: Sequence[str],
    progress: Callable[[str, int, int], None],
    budget: int | None = None,
) -> dict[str, Text]:
    """Each prompt, encoded; `progress` and `budget` as in `cache_folders`."""
    files, load = _encoder_files(models, cache), partial(models.load_text_encoders, budget)
    how = {"t5_length": models.t5_length, "text_mask": models.config.text_mask}
    return cache_prompts(prompts, cache, files, load, **how, progress=progress)


def _encoder_files(models: Models, cache: Path) -> EncoderFiles:
    """Each encoder's files; without tokenizers if a text encoder is neither on disk nor in the hashes."""
    known = Store(cache).hashes.knows
    ae, clip_l, t5xxl = (models.files(part) for part in ("ae", "clip_l", "t5xxl"))
    have_encoders = all(path.is_file() or known(path) for path in (*clip_l, *t5xxl))
    clip, t5 = models.tokenizer_files(known) if have_encoders else ((), ())
    return EncoderFiles(ae, clip_l, t5xxl, (*clip, *t5))
