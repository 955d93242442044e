"""Fills a store: encodes images and captions once, so that training needs no autoencoder and no text encoders.

Every record's key is worked out first, from file hashes alone; then only what the store lacks is encoded, and an
encoder is loaded only if there is something for it to do. What is done stays done: an interrupted run is continued by
the next. Where fluxq has no record of its own, one that was imported (fluxq/caching/imports.py) serves, and an encoder
whose records are all imported need not be there.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from fluxq.data.buckets import Size
from fluxq.data.dataset import Dataset, Entry
from fluxq.data.examples import Example, Folder, scan
from fluxq.errors import WrongRequest

from .encoding import Progress, TextEncoder, cut_notes, encode_captions, encode_images
from .store import (
    KINDS,
    Store,
    Text,
    imported_latents_key,
    imported_line,
    imported_text_key,
    is_imported,
    latents_key,
    text_key,
)


@dataclass(frozen=True)
class EncoderFiles:
    """The files that each encoder is made of: what was encoded is identified by their hashes."""

    ae: tuple[Path, ...]
    clip_l: tuple[Path, ...]
    t5xxl: tuple[Path, ...]
    tokenizers: tuple[Path, ...]

    def text(self) -> tuple[Path, ...]:
        return (*self.t5xxl, *self.clip_l, *self.tokenizers)


def build_cache(
    folders: Sequence[Folder],
    store_dir: str | Path,
    encoders: EncoderFiles,
    load_autoencoder: Callable[[], Any],
    load_text: Callable[[], TextEncoder],
    *,
    resolution: int | Size,
    min_side: int,
    max_side: int,
    step: int = 16,
    upscale: bool = True,
    t5_length: int = 512,
    prompts: Sequence[str] = (),
    skip_bad: bool = False,
    progress: Progress | None = None,
    notify: Callable[[str], None] = lambda line: None,
) -> Dataset:
    """The dataset of `folders`, with every record that it names in the store; its file lies in `<store_dir>/datasets`.

    load_autoencoder gives a module with `.moments(x (B, 3, H, W) in [-1, 1])` -> moments (B, 32, H/8, W/8) and
    `.config.scale_factor` and `.shift_factor`; load_text a `TextEncoder` of `t5_length` tokens. Each is called at most
    once, and the first is let go before the second is called. `prompts` are encoded beside the examples' captions, and
    the empty caption too where the text encoders are there. `progress` is told (stage, done, total); the stages are
    "hashing", "images" and "captions". `notify` is told where the autoencoder has to work on fewer rows at a time than
    it was loaded with.
    Raises WrongRequest for what `scan` refuses, for an undecodable image (unless `skip_bad`), and if something needs
    encoding while a file of its encoder is missing.
    """
    store, progress = Store(store_dir), progress or _silent
    found = scan(folders, resolution, min_side, max_side, step, upscale, skip_bad)
    captions = list(dict.fromkeys((*(example.caption for example in found.examples), "", *prompts)))
    hashes = _hashes(store, encoders, len(captions), [example.path for example in found.examples], progress)
    if not hashes.keys() >= set(encoders.text()) and "" not in prompts:
        captions.remove("")

    text_keys = _text_keys(store, captions, encoders, hashes, t5_length)
    missing_captions = _missing_captions(store, encoders, text_keys)  # asked first, so that nothing is encoded in vain
    latents_keys = {example.name: _latents_keys(store, example, encoders, hashes) for example in found.examples}
    missing_images = {
        latents_keys[example.name][0]: example
        for example in found.examples
        if not store.has("latents", latents_keys[example.name][0])
    }
    if missing_images:
        _require([path for path in encoders.ae if path not in hashes], f"{len(missing_images)} images")

    def checked_autoencoder() -> Any:
        _require(encoders.ae, f"{len(missing_images)} images")
        return load_autoencoder()

    bad = encode_images(store, missing_images, checked_autoencoder, skip_bad, progress, notify)
    if missing_captions:
        encode_captions(store, missing_captions, load_text(), t5_length, progress)

    cuts = {caption: store.text_cuts(key) for caption, key in text_keys.items()}
    names = {example.caption: example.name for example in reversed(found.examples)}  # of equal captions the first
    dataset = Dataset(
        examples=tuple(
            _entry(store, example, latents_keys[example.name], text_keys[example.caption])
            for example in found.examples
            if latents_keys[example.name][0] not in bad
        ),
        prompts={prompt: text_keys[prompt] for prompt in ("", *prompts) if prompt in text_keys},
        t5_length=t5_length,
        skipped=(*found.skipped, *bad.values()),
        notes=(*found.notes, *cut_notes(cuts, names, t5_length)),
    )
    if imported := imported_line(store, dataset.records()):
        dataset = replace(dataset, notes=(*dataset.notes, imported))
    if not dataset.examples:
        raise WrongRequest(f"no usable image is left, all were skipped; the first: {dataset.skipped[0]}")
    request = (
        [(os.path.abspath(folder.path), folder.repeats, folder.trigger) for folder in folders],
        (resolution, min_side, max_side, step, upscale, t5_length),
        [os.path.abspath(path) for path in (*encoders.ae, *encoders.text())],
    )
    dataset.save(store.root / "datasets" / f"{_name(request)}.json")  # the same request again replaces it
    return dataset


def cache_prompts(
    prompts: Sequence[str],
    store_dir: str | Path,
    encoders: EncoderFiles,
    load_text: Callable[[], TextEncoder],
    *,
    t5_length: int = 512,
    progress: Progress | None = None,
) -> dict[str, Text]:
    """Each prompt, encoded: out of the store, or by `load_text` where it is not there yet.

    No dataset lists them, so that a prune deletes them.
    Raises WrongRequest if something needs encoding while an encoder's file is missing.
    """
    store, progress = Store(store_dir), progress or _silent
    hashes = _hashes(store, encoders, len(prompts), None, progress)
    keys = _text_keys(store, prompts, encoders, hashes, t5_length)
    missing = _missing_captions(store, encoders, keys)
    if missing:
        encode_captions(store, missing, load_text(), t5_length, progress)
    return {prompt: store.text(key) for prompt, key in keys.items()}


@dataclass(frozen=True)
class CacheReport:
    """What `verify_cache` found."""

    records: int  # how many were read
    bad: dict[Path, str]  # record -> what is wrong with it
    missing: dict[Path, int]  # dataset file -> how many of its records are not there (any more)
    imported: str | None = None  # what to say of records that other programs encoded


def verify_cache(store_dir: str | Path, remove: bool = True) -> CacheReport:
    """Reads every record whole. With `remove` bad ones are deleted, and the next `build_cache` encodes them anew."""
    store = _existing(store_dir)
    records = sum(len(store.records(kind)) for kind in KINDS)
    bad = store.verify(remove)
    missing = {}
    for path in store.datasets():
        lacking = sum(not store.has(kind, key) for kind, key in Dataset.load(path).records())
        if lacking:
            missing[path] = lacking
    sound = [(kind, path.stem) for kind in KINDS for path in store.records(kind) if path not in bad]
    return CacheReport(records, bad, missing, imported_line(store, sound))


def prune_cache(store_dir: str | Path, keep: Sequence[Path] = ()) -> tuple[int, int]:
    """Deletes the records that no dataset of the store, nor any dataset file of `keep`, uses.

    Returns (files, bytes) deleted. Not to be run while another command fills the same store.
    Raises WrongRequest, deleting nothing, if a dataset cannot be read.
    """
    store = _existing(store_dir)
    return store.prune([Dataset.load(path) for path in (*store.datasets(), *keep)])


def _hashes(
    store: Store, encoders: EncoderFiles, captions: int, images: Sequence[Path] | None, progress: Progress
) -> dict[Path, str]:
    """The hashes of `images` and of the encoders' files, the autoencoder's only where there are any images.

    An encoder that is neither there nor remembered is left out where the store has imported records of its kind, else
    WrongRequest is raised before anything is read. What is newly read is saved, even if interrupted.
    """
    paths = list(images or ())
    kinds = [] if images is None else [("latents", encoders.ae, f"{len(images)} images")]
    for kind, files, what in (*kinds, ("text", encoders.text(), f"{captions} captions")):
        absent = [path for path in files if not store.hashes.knows(path) and not path.is_file()]
        if absent and not any(is_imported(record.stem) for record in store.records(kind)):
            _require(absent, what)
        paths += [] if absent else files
    hashes: dict[Path, str] = {}
    try:
        for done, path in enumerate(paths, start=1):
            hashes[path] = store.hashes.of(path)
            progress("hashing", done, len(paths))
    finally:
        store.hashes.save()
    return hashes


def _text_keys(
    store: Store, captions: Sequence[str], encoders: EncoderFiles, hashes: dict[Path, str], t5_length: int
) -> dict[str, str]:
    """caption -> key of fluxq's own record, or of an imported one where only that is there or can be"""
    imported = {caption: imported_text_key(caption, t5_length) for caption in captions}
    if not hashes.keys() >= set(encoders.text()):
        return imported
    t5, clip, tokenizers = (_joined(hashes, f) for f in (encoders.t5xxl, encoders.clip_l, encoders.tokenizers))
    own = {caption: text_key(caption, t5, clip, tokenizers, t5_length) for caption in captions}
    return {c: imported[c] if _serves(store, "text", own[c], imported[c]) else own[c] for c in captions}


def _latents_keys(store: Store, example: Example, encoders: EncoderFiles, hashes: dict[Path, str]) -> tuple[str, ...]:
    """The key of fluxq's own record; or, where only those are there or can be, the imported ones: of the image, and
    of its mirror image where there is one.
    """
    request = hashes[example.path], example.resized, example.bucket
    imported, mirrored = (imported_latents_key(*request, variant) for variant in (0, 1))
    if hashes.keys() >= set(encoders.ae):
        own = latents_key(*request, _joined(hashes, encoders.ae))
        if not _serves(store, "latents", own, imported):
            return (own,)
    return (imported, mirrored) if store.has("latents", mirrored) else (imported,)


def _serves(store: Store, kind: str, own: str, imported: str) -> bool:
    """Whether the imported record is there, and fluxq's own is not."""
    return not store.has(kind, own) and store.has(kind, imported)


def _joined(hashes: dict[Path, str], files: Sequence[Path]) -> str:
    return " ".join(hashes[path] for path in files)


def _missing_captions(store: Store, encoders: EncoderFiles, keys: dict[str, str]) -> dict[str, str]:
    """key -> caption, of those that the store lacks. Raises WrongRequest if there are any but no encoder."""
    missing = {key: caption for caption, key in keys.items() if not store.has("text", key)}
    if missing:
        _require(encoders.text(), f"{len(missing)} captions")
    return missing


def _require(files: Sequence[Path], what: str) -> None:
    """Raises WrongRequest if a file of the encoder that `what` needs is missing."""
    for path in files:
        if not path.is_file():
            raise WrongRequest(f"{what} must be encoded, but {path} does not exist; put it back, or check the path")


def _entry(store: Store, example: Example, latents: tuple[str, ...], text: str) -> Entry:
    status = example.path.stat()
    return Entry(
        name=example.name,
        path=os.path.abspath(example.path),
        size=status.st_size,
        mtime_ns=status.st_mtime_ns,
        repeats=example.repeats,
        bucket=store.latents_size(latents[0]) if is_imported(latents[0]) else example.bucket,
        latents=latents,
        text=(text,),
    )


def _name(request: tuple) -> str:
    """A dataset's file name: the first folder's name for people, and a hash of the request."""
    digest = blake2b(repr(request).encode("utf-8", "surrogateescape"), digest_size=6).hexdigest()
    return f"{os.path.basename(request[0][0][0])[:40]}-{digest}"


def _existing(store_dir: str | Path) -> Store:
    store = Store(store_dir)
    if not any((store.root / name).is_dir() for name in (*KINDS, "datasets")):
        raise WrongRequest(f"{store_dir} holds no cache; run `fluxq cache` first, or check the path")
    return store


def _silent(stage: str, done: int, total: int) -> None:
    pass
