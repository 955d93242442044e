"""Fills a store: encodes images and captions once, so that training needs no autoencoder and no text encoders.

Every record's key is computed first, from file hashes alone. Then only missing records are encoded, and an encoder is
loaded only if it has something to encode. Finished records are kept, so the next run continues an interrupted one. If
fluxq has no record of its own, it uses an imported one (fluxq/caching/import_foreign.py); an encoder whose records
are all imported may be missing.
"""

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

from fluxq.console import Notify, plural, silent
from fluxq.data.buckets import Size
from fluxq.data.dataset import Dataset, Entry
from fluxq.data.examples import Example, Scan
from fluxq.data.images import PLAIN, View
from fluxq.errors import WrongRequest

from .encoding import Progress, TextEncoder, encode_captions, encode_images, encode_masks, truncation_notes
from .looks import LOOKS, Looks
from .store import (
    KINDS,
    Store,
    Text,
    imported_latents_key,
    imported_note,
    imported_text_key,
    is_imported,
    latents_key,
    mask_key,
    text_key,
)

MIRRORED = View(mirrored=True)


@dataclass(frozen=True)
class EncoderFiles:
    """Each encoder's files. Their hashes identify what was encoded."""

    ae: tuple[Path, ...]
    clip_l: tuple[Path, ...]
    t5xxl: tuple[Path, ...]
    tokenizers: tuple[Path, ...]

    def text(self) -> tuple[Path, ...]:
        return (*self.t5xxl, *self.clip_l, *self.tokenizers)


def build_cache(
    scanned: Scan,
    store_dir: str | Path,
    encoders: EncoderFiles,
    load_autoencoder: Callable[[], Any],
    load_text: Callable[[], TextEncoder],
    *,
    request: object = (),
    t5_length: int = 512,
    text_mask: bool = False,
    prompts: Sequence[str] = (),
    skip_bad: bool = False,
    progress: Progress | None = None,
    notify: Notify = silent,
    before: Callable[[Collection[Size], Collection[str], Collection[Size]], None] = lambda *missing: None,
) -> Dataset:
    """The dataset of `scanned`, with all its records in the store; its file is saved in `<store_dir>/datasets`.

    load_autoencoder returns a module with `.moments(x (B, 3, H, W) in [-1, 1])` -> moments (B, 32, H/8, W/8) and
    `.config.scale_factor` and `.shift_factor`; load_text returns a `TextEncoder` of `t5_length` tokens, which masks
    padding if `text_mask`. Each is called at most once, and the autoencoder is freed before load_text is called. In
    addition to the examples' captions, `prompts` are encoded, and the empty caption if the text encoders are there.
    `progress` gets (stage, done, total); the stages are "hashing", "looking", "masks", "images" and "captions".
    `notify` gets a line if the autoencoder has to work on fewer rows at a time than it was loaded with. The same
    `request` (whatever `scanned` was made of) replaces its dataset's file. `before` is called with what has to be
    encoded: each image's size, each caption and each mask's size; if it raises, nothing is.
    Raises WrongRequest for an undecodable image (unless `skip_bad`), and if something needs encoding but a file of its
    encoder is missing.
    """
    store, progress, examples = Store(store_dir), progress or _no_progress, scanned.examples
    looks = Looks(store.root / LOOKS)
    wanted = dict.fromkeys((*(text for example in examples for text in example.texts), *prompts))
    captions = list(wanted | {"": None})
    files = dict.fromkeys([*(e.path for e in examples), *(e.mask for e in examples if e.mask)])
    hashes = _hashes(store, encoders, len(captions), list(files), progress)
    drops = any(e.folder.caption_dropout or e.folder.caption_dropout_epochs for e in examples)
    if not hashes.keys() >= set(encoders.text()) and "" not in wanted and not drops:
        captions.remove("")

    images = {example.path: hashes[example.path] for example in examples}
    try:
        scanned.found.look_at_images(looks.of(images, partial(progress, "looking")))
    finally:
        looks.save()
    text_keys = _text_keys(store, captions, encoders, hashes, t5_length, text_mask)
    # first, so that an error comes before any encoding
    missing_captions = _missing_captions(store, encoders, text_keys)
    latents_keys = {example.name: _latents_keys(store, example, encoders, hashes) for example in examples}
    missing_images = {
        key: (example, view)
        for example in examples
        for key, view in zip(latents_keys[example.name], example.views, strict=False)  # an imported one has no views
        if not store.has("latents", key)
    }
    masked = [_as_encoded(store, example, latents_keys[example.name]) for example in examples if example.mask]
    mask_keys = {example.name: _mask_keys(example, hashes, latents_keys[example.name]) for example in masked}
    missing_masks = {
        key: (example, view)
        for example in masked
        for key, view in zip(mask_keys[example.name], _views(example, latents_keys[example.name]), strict=False)
        if not store.has("masks", key)
    }
    if missing_images:
        _require_files([path for path in encoders.ae if path not in hashes], f"{len(missing_images)} images")
    sizes, mask_sizes = ([example.bucket for example, _ in p.values()] for p in (missing_images, missing_masks))
    before(sizes, missing_captions.values(), mask_sizes)
    bad_masks = encode_masks(store, missing_masks, skip_bad, progress)

    def checked_autoencoder() -> Any:
        _require_files(encoders.ae, f"{len(missing_images)} images")
        return load_autoencoder()

    bad = encode_images(store, missing_images, checked_autoencoder, skip_bad, progress, notify)
    if missing_captions:
        encode_captions(store, missing_captions, load_text(), t5_length, text_mask, progress)

    truncated = {caption: store.truncated(key) for caption, key in text_keys.items()}
    names = {text: e.name for e in reversed(examples) for text in e.texts}  # for equal captions, the first
    dataset = Dataset(
        examples=tuple(
            _entry(
                store,
                example,
                latents_keys[example.name],
                mask_keys.get(example.name, ()),
                [text_keys[t] for t in example.texts],
            )
            for example in examples
            if example.name not in bad_masks and not bad.keys() & {*latents_keys[example.name]}
        ),
        prompts={prompt: text_keys[prompt] for prompt in ("", *prompts) if prompt in text_keys},
        t5_length=t5_length,
        skipped=(*scanned.skipped, *bad_masks.values(), *dict.fromkeys(bad.values())),
        notes=(*scanned.notes, *truncation_notes(truncated, names, t5_length), *_variants_note(examples, latents_keys)),
    )
    if imported := imported_note(store, dataset.records()):
        dataset = replace(dataset, notes=(*dataset.notes, imported))
    if not dataset.examples:
        raise WrongRequest(f"no usable image is left ({len(dataset.skipped)} skipped); the first: {dataset.skipped[0]}")
    request = ([os.path.abspath(e.folder.path) for e in examples[:1]], request, t5_length, text_mask)
    request = (*request, [os.path.abspath(path) for path in (*encoders.ae, *encoders.text())])
    dataset.save(store.root / "datasets" / f"{_dataset_name(request)}.json")  # the same request replaces it
    return dataset


def missing_records(
    scanned: Scan,
    store_dir: str | Path,
    encoders: EncoderFiles,
    t5_length: int,
    text_mask: bool,
    prompts: Sequence[str],
) -> tuple[list[Size], list[str], list[Size]]:
    """What `build_cache` would encode for `scanned` and `prompts`: images by their sizes, captions, masks by their
    sizes. Reads no file: one that was never hashed has no record.
    """
    store = Store(store_dir)
    files = (*(path for e in scanned.examples for path in (e.path, e.mask) if path), *encoders.ae, *encoders.text())
    hashes = {path: hashed for path in files if (hashed := store.hashes.remembered(path))}
    sizes, mask_sizes = [], []
    for example in scanned.examples:
        keys = _latents_keys(store, example, encoders, hashes) if example.path in hashes else ("",) * len(example.views)
        sizes += [example.bucket for key in keys if not store.has("latents", key)]
        if example.mask:
            masks = _mask_keys(example, hashes, keys) if {example.path, example.mask} <= hashes.keys() else keys
            mask_sizes += [example.bucket for key in masks if not store.has("masks", key)]
    captions = list(dict.fromkeys((*(text for example in scanned.examples for text in example.texts), *prompts, "")))
    keys = _text_keys(store, captions, encoders, hashes, t5_length, text_mask)
    return sizes, [caption for caption, key in keys.items() if not store.has("text", key)], mask_sizes


def cache_prompts(
    prompts: Sequence[str],
    store_dir: str | Path,
    encoders: EncoderFiles,
    load_text: Callable[[], TextEncoder],
    *,
    t5_length: int = 512,
    text_mask: bool = False,
    progress: Progress | None = None,
) -> dict[str, Text]:
    """Each prompt, encoded: read from the store, or encoded with `load_text` if it is not there yet.

    No dataset lists these records, so a prune deletes them.
    Raises WrongRequest if something needs encoding but an encoder's file is missing.
    """
    store, progress = Store(store_dir), progress or _no_progress
    hashes = _hashes(store, encoders, len(prompts), None, progress)
    keys = _text_keys(store, prompts, encoders, hashes, t5_length, text_mask)
    missing = _missing_captions(store, encoders, keys)
    if missing:
        encode_captions(store, missing, load_text(), t5_length, text_mask, progress)
    return {prompt: store.text(key) for prompt, key in keys.items()}


@dataclass(frozen=True)
class CacheReport:
    """The result of `verify_cache`."""

    records: int  # number read
    bad: dict[Path, str]  # record -> its fault
    missing: dict[Path, int]  # dataset file -> number of its records that are missing
    imported: str | None = None  # a note on records that other programs encoded


def verify_cache(store_dir: str | Path, remove: bool = True) -> CacheReport:
    """Read every record completely. With `remove`, delete bad ones; the next `build_cache` encodes them again."""
    store = _existing_store(store_dir)
    records = sum(len(store.records(kind)) for kind in KINDS)
    bad = store.verify(remove)
    missing = {}
    for path in store.datasets():
        absent = sum(not store.has(kind, key) for kind, key in Dataset.load(path).records())
        if absent:
            missing[path] = absent
    sound = [(kind, path.stem) for kind in KINDS for path in store.records(kind) if path not in bad]
    return CacheReport(records, bad, missing, imported_note(store, sound))


def prune_cache(store_dir: str | Path, keep: Sequence[Path] = ()) -> tuple[int, int]:
    """Delete the records that no dataset in the store and no dataset file in `keep` uses.

    Returns (files, bytes) deleted. Do not run it while another command fills the same store.
    Raises WrongRequest, and deletes nothing, if a dataset cannot be read.
    """
    store = _existing_store(store_dir)
    return store.prune([Dataset.load(path) for path in (*store.datasets(), *keep)])


def _hashes(
    store: Store, encoders: EncoderFiles, captions: int, images: Sequence[Path] | None, progress: Progress
) -> dict[Path, str]:
    """The hashes of `images` and of the encoders' files; of the autoencoder's only if `images` is not None.

    An encoder whose files are gone and were never hashed is left out if the store has imported records of its kind;
    otherwise WrongRequest is raised before any file is read. New hashes are saved even if this is interrupted.
    """
    paths = list(images or ())
    kinds = [] if images is None else [("latents", encoders.ae, f"{len(images)} images")]
    for kind, files, what in (*kinds, ("text", encoders.text(), f"{captions} captions")):
        absent = [path for path in files if not store.hashes.knows(path) and not path.is_file()]
        if absent and not any(is_imported(record.stem) for record in store.records(kind)):
            _require_files(absent, what)
        paths += [] if absent else files
    hashes: dict[Path, str] = {}
    try:
        for done, path in enumerate(paths):
            progress("hashing", done, len(paths))
            hashes[path] = store.hashes.of(path)
        progress("hashing", len(paths), len(paths))
    finally:
        store.hashes.save()
    return hashes


def _text_keys(
    store: Store, captions: Sequence[str], encoders: EncoderFiles, hashes: dict[Path, str], length: int, masked: bool
) -> dict[str, str]:
    """caption -> key of fluxq's own record, or of an imported one if only that exists or can exist."""
    imported = {caption: imported_text_key(caption, length, masked) for caption in captions}
    if not hashes.keys() >= set(encoders.text()):
        return imported
    t5, clip, tokenizers = (_joined(hashes, f) for f in (encoders.t5xxl, encoders.clip_l, encoders.tokenizers))
    own = {caption: text_key(caption, t5, clip, tokenizers, length, masked) for caption in captions}
    return {c: imported[c] if _use_imported(store, "text", own[c], imported[c]) else own[c] for c in captions}


def _latents_keys(store: Store, example: Example, encoders: EncoderFiles, hashes: dict[Path, str]) -> tuple[str, ...]:
    """The keys of fluxq's own records, one a view. If only imported ones exist or can exist, their keys: the image and,
    if there is one, its mirror image.
    """
    request = hashes[example.path], example.resized, example.bucket
    imported, mirrored = (imported_latents_key(*request, variant) for variant in (0, 1))
    if hashes.keys() >= set(encoders.ae):
        encoder = _joined(hashes, encoders.ae)
        own = tuple(latents_key(*request, encoder, example.recolored, view) for view in example.views)
        if len(example.views) > 1 or not _use_imported(store, "latents", own[0], imported):
            return own
    elif example.views != (PLAIN,) and not (example.views == (PLAIN, MIRRORED) and store.has("latents", mirrored)):
        return tuple(imported_latents_key(*request, variant) for variant in range(2, 2 + len(example.views)))  # missed
    return (imported, mirrored) if store.has("latents", mirrored) else (imported,)


def _as_encoded(store: Store, example: Example, latents: Sequence[str]) -> Example:
    """`example` at the size of its `latents`: those of other programs may be of another bucket."""
    if not is_imported(latents[0]) or not store.has("latents", latents[0]):
        return example
    bucket = store.latents_size(latents[0])
    scale = max(side / own for side, own in zip(bucket, example.resized, strict=True))
    width, height = (max(side, round(own * scale)) for side, own in zip(bucket, example.resized, strict=True))
    return replace(example, bucket=bucket, resized=(width, height))


def _mask_keys(example: Example, hashes: dict[Path, str], latents: Sequence[str]) -> tuple[str, ...]:
    """The keys of an example's masks, one for each of its `latents`."""
    assert example.mask is not None
    alpha, shape = example.mask == example.path, (example.resized, example.bucket)
    return tuple(mask_key(hashes[example.mask], alpha, *shape, view) for view in _views(example, latents))


def _views(example: Example, latents: Sequence[str]) -> Sequence[View]:
    """The view of each of an example's `latents`; other programs have the image and perhaps its mirror image."""
    return (PLAIN, MIRRORED)[: len(latents)] if is_imported(latents[0]) else example.views


def _use_imported(store: Store, kind: str, own: str, imported: str) -> bool:
    """Whether the store has the imported record but not fluxq's own."""
    return not store.has(kind, own) and store.has(kind, imported)


def _joined(hashes: dict[Path, str], files: Sequence[Path]) -> str:
    return " ".join(hashes[path] for path in files)


def _missing_captions(store: Store, encoders: EncoderFiles, keys: dict[str, str]) -> dict[str, str]:
    """key -> caption of the records missing from the store. Raises WrongRequest if an encoder for them is missing."""
    missing = {key: caption for caption, key in keys.items() if not store.has("text", key)}
    if missing:
        dropped = list(missing.values()) == [""]
        _require_files(encoders.text(), "the empty caption" if dropped else f"{len(missing)} captions")
    return missing


def _require_files(files: Sequence[Path], what: str) -> None:
    """Raise WrongRequest if a file of the encoder that `what` needs is missing."""
    for path in files:
        if not path.is_file():
            raise WrongRequest(f"{what} must be encoded, but {path} does not exist; put it back, or check the path")


def _entry(
    store: Store, example: Example, latents: tuple[str, ...], masks: tuple[str, ...], text: Sequence[str]
) -> Entry:
    status, folder = example.path.stat(), example.folder
    return Entry(
        name=example.name,
        path=os.path.abspath(example.path),
        size=status.st_size,
        mtime_ns=status.st_mtime_ns,
        repeats=example.repeats,
        bucket=store.latents_size(latents[0]) if is_imported(latents[0]) else example.bucket,
        latents=latents,
        text=tuple(text),
        masks=masks,
        mask_outside=(folder.mask_outside or 0.0) if masks else 0.0,
        mask_normalize=bool(folder.mask_normalize and masks),
        weight=example.weight,
        caption_dropout=folder.caption_dropout or 0.0,
        caption_dropout_epochs=folder.caption_dropout_epochs or 0,
        batch=folder.batch or 0,
        held_out=example.held_out,
    )


def _variants_note(examples: Sequence[Example], latents: Mapping[str, Sequence[str]]) -> list[str]:
    """A line on how many records stand for how many images, if images or captions have variants."""
    images, encoded = len({e.path for e in examples}), len({key for e in examples for key in latents[e.name]})
    captions = len({text for example in examples for text in example.texts})
    if encoded <= images and all(len(example.texts) == 1 for example in examples):
        return []
    return [f"variants: {plural(images, 'image')} are {encoded} latents and {plural(captions, 'caption')} in the cache"]


def _dataset_name(request: tuple) -> str:
    """A dataset's file name: the first folder's name (for humans) and a hash of the request."""
    digest = blake2b(repr(request).encode("utf-8", "surrogateescape"), digest_size=6).hexdigest()
    return f"{os.path.basename(request[0][0])[:40]}-{digest}"


def _existing_store(store_dir: str | Path) -> Store:
    store = Store(store_dir)
    if not any((store.root / name).is_dir() for name in (*KINDS, "datasets")):
        raise WrongRequest(f"{store_dir} holds no cache; run `fluxq cache` first, or check the path")
    return store


def _no_progress(stage: str, done: int, total: int) -> None:
    pass
