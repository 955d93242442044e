"""`fluxq cache --import`: the caches of sd-scripts and ai-toolkit become records of the store.

Every file is read and checked before the first record is written, so a bad one leaves the store unchanged. Records are
addressed by the image's bytes or the caption, like fluxq's own: anything that changes later is encoded again. Whether
an image or caption changed before the import is known only if the other program stored a hash of it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from fluxq.console import Notify, silent
from fluxq.data.captions import Captions
from fluxq.data.examples import Example, Scan
from fluxq.data.images import image_size
from fluxq.errors import WrongRequest
from fluxq.settings import sizes_of

from .encoding import Progress
from .foreign import FILES, SD_SCRIPTS, ForeignCache, ForeignCaches, ModelShapes
from .store import Origin, Store, Text, imported_latents_key, imported_note, imported_text_key

Item = tuple[Example, ForeignCache]


def import_caches(
    scanned: Scan,
    store_dir: str | Path,
    expected: ModelShapes,
    skip_bad: bool = False,
    progress: Progress = lambda stage, done, total: None,
    notify: Notify = silent,
) -> tuple[int, int]:
    """Import other programs' caches for the images of `scanned`. Returns the (images, captions) imported.

    `notify` gets lines on where they came from and what has no cache. Raises WrongRequest, and writes nothing, if
    there is no cache at all, and (unless `skip_bad`) for a cache that does not fit or is damaged.
    """
    store = Store(store_dir)
    caches = {path: ForeignCaches(path, expected) for path in {e.path.parent: None for e in scanned.examples}}
    first_lines = {path: Captions(path, "first") for path in caches}  # which are what sd-scripts encodes
    _require_any(caches)
    latents: list[Item] = []
    texts: dict[str, Item] = {}  # for equal captions, the first
    for done, example in enumerate(scanned.examples, 1):
        in_folder = caches[example.path.parent]
        find = partial(_latents, in_folder, example, scanned.examples)
        if cache := _checked(find, skip_bad, notify):
            latents.append((example, cache))
        find = partial(_text, in_folder, first_lines[example.path.parent], example)
        if example.caption not in texts and (cache := _checked(find, skip_bad, notify)):
            texts[example.caption] = example, cache
        progress("checking", done, len(scanned.examples))
    _write(store, latents, list(texts.values()), expected, progress)
    captions = len({example.caption for example in scanned.examples})
    _report(latents, list(texts.values()), len(scanned.examples), captions, notify)
    return len(latents), len(texts)


def imported_note_for(store: Store, examples: Sequence[Example], t5_length: int, masked: bool) -> str | None:
    """A note on the imported records for these examples; None if there are none. Reads no images."""
    records = {("text", imported_text_key(example.caption, t5_length, masked)) for example in examples}
    for example in examples:
        if hashed := store.hashes.remembered(example.path):
            records.add(("latents", imported_latents_key(hashed, example.resized, example.bucket, 0)))
    return imported_note(store, [record for record in records if store.has(*record)])


def _checked(find: Callable[[], ForeignCache | None], skip_bad: bool, notify: Notify) -> ForeignCache | None:
    """The cache from `find`, after reading its tensors to check them. With `skip_bad`, a bad one is only reported."""
    try:
        if cache := find():
            cache.read()
        return cache
    except WrongRequest as error:
        if not skip_bad:
            raise
        notify(f"not imported: {error}")
        return None


def _latents(caches: ForeignCaches, example: Example, examples: Sequence[Example]) -> ForeignCache | None:
    own, sizes = math.prod(example.bucket), sorted(map(math.prod, sizes_of(example.folder.resolution or ())))
    max_pixels = next((pixels for pixels in sizes if pixels >= own), sizes[-1])  # of the size that it is trained at
    cache = caches.latents(example, image_size(example.path), max_pixels)
    if cache and cache.program == SD_SCRIPTS:
        others = {e.path.name: None for e in examples if e.path.with_suffix("") == example.path.with_suffix("")}
        if len(others) > 1:
            what = f"may belong to any of {', '.join(others)}"
            raise WrongRequest(f"{cache.path} {what}; give the images different names and delete it")
    return cache


def _text(caches: ForeignCaches, captions: Captions, example: Example) -> ForeignCache | None:
    return caches.text(example, captions.of(example.path).text)


def _require_any(caches: dict[Path, ForeignCaches]) -> None:
    kinds = Counter({kind: sum(in_folder.count(kind) for in_folder in caches.values()) for kind in FILES})
    if kinds.total() == kinds["musubi"]:
        where = ", ".join(map(str, caches))
        if kinds["musubi"]:
            what = (
                f"musubi-tuner's caches (_fk.safetensors) in {where} are for FLUX.1 Kontext, each with a control image"
            )
            raise WrongRequest(f"{what}; fluxq cannot use them: leave out --import, and it encodes again")
        what = "no *_flux.npz, *_flux_te.npz, _latent_cache or _t_e_cache of sd-scripts or ai-toolkit"
        raise WrongRequest(f"{where}: there is {what}; leave out --import, and fluxq encodes the images itself")


def _write(store: Store, latents: list[Item], texts: list[Item], expected: ModelShapes, progress: Progress) -> None:
    try:
        for done, (example, cache) in enumerate(latents, 1):
            hashed = store.hashes.of(example.path)
            for variant, values in reversed([*enumerate(cache.read())]):  # the optional mirror image first
                key = imported_latents_key(hashed, example.resized, example.bucket, variant)
                origin = Origin(cache.program, cache.verified)
                store.put_latents(key, values, torch.zeros_like(values), example.name, origin)
            progress("images", done, len(latents))
    finally:
        store.hashes.save()
    for done, (example, cache) in enumerate(texts, 1):
        t5, pooled, seen = cache.read()
        tokens = int(seen.sum())
        text = Text(t5, pooled, example.caption, tokens, cache.program == SD_SCRIPTS and tokens == len(seen))
        key = imported_text_key(example.caption, expected.t5_length, expected.masked)
        store.put_text(key, text, Origin(cache.program, cache.verified))
        progress("captions", done, len(texts))


def _report(latents: list[Item], texts: list[Item], images: int, captions: int, notify: Notify) -> None:
    by_program = {
        "images": Counter(cache.program for _, cache in latents),
        "captions": Counter(cache.program for _, cache in texts),
    }
    for program in {**by_program["images"], **by_program["captions"]}:
        images_read, captions_read = by_program["images"][program], by_program["captions"][program]
        notify(f"{images_read} images and {captions_read} captions imported from {program}")
    if latents:
        notify(
            "each imported latent is one fixed sample from the autoencoder; fluxq's own latents vary from step to step"
        )
    if masked := sum(cache.has_mask for _, cache in latents):
        notify(f"the alpha masks of {masked} images are not imported: --masks alpha reads them from the images")
    if len(latents) < images or len(texts) < captions:
        notify(f"{images - len(latents)} images and {captions - len(texts)} captions have no cache; fluxq encodes them")
