"""`fluxq cache --import`: what sd-scripts or ai-toolkit encoded becomes records of the store.

Every file is read and checked before the first record is written, so that a bad one leaves the store as it was. A
record is found by the image's bytes or by the caption, as fluxq's own are: what has changed since is encoded anew.
Whether an image or caption changed before the import is known only where the other program kept a hash of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from fluxq.data.examples import Example, Folder, read_caption, scan
from fluxq.data.images import image_size
from fluxq.errors import WrongRequest

from .encoding import Progress
from .foreign import FILES, SD_SCRIPTS, Caches, Found, Wanted
from .store import Origin, Store, Text, imported_latents_key, imported_line, imported_text_key

Item = tuple[Example, Found]


def import_caches(
    folders: Sequence[Folder],
    store_dir: str | Path,
    wanted: Wanted,
    *,
    resolution: int,
    min_side: int,
    max_side: int,
    step: int = 16,
    upscale: bool = True,
    skip_bad: bool = False,
    progress: Progress = lambda stage, done, total: None,
    notify: Callable[[str], None] = lambda line: None,
) -> tuple[int, int]:
    """How many (images, captions) of `folders` were imported; `notify` is told from where, and what was left.

    Raises WrongRequest for what `scan` refuses, where no cache is there, and for one that does not fit or is damaged,
    unless `skip_bad`; nothing is written then.
    """
    store = Store(store_dir)
    found = scan(folders, resolution, min_side, max_side, step, upscale, skip_bad)
    caches = {path: Caches(path, wanted) for path in {example.path.parent: None for example in found.examples}}
    _require_any(caches)
    latents: list[Item] = []
    texts: dict[str, Item] = {}  # of equal captions the first
    for done, example in enumerate(found.examples, 1):
        near = caches[example.path.parent]
        look = partial(_latents, near, example, found.examples, resolution**2)
        if one := _checked(look, skip_bad, notify):
            latents.append((example, one))
        look = partial(_text, near, example)
        if example.caption not in texts and (one := _checked(look, skip_bad, notify)):
            texts[example.caption] = example, one
        progress("checking", done, len(found.examples))
    _write(store, latents, list(texts.values()), wanted, progress)
    captions = len({example.caption for example in found.examples})
    _tell(latents, list(texts.values()), len(found.examples), captions, notify)
    return len(latents), len(texts)


def imported(store: Store, examples: Sequence[Example], t5_length: int) -> str | None:
    """What to say of the imported records that fit these examples; None without any. No image is read."""
    records = {("text", imported_text_key(example.caption, t5_length)) for example in examples}
    for example in examples:
        if hashed := store.hashes.remembered(example.path):
            records.add(("latents", imported_latents_key(hashed, example.resized, example.bucket, 0)))
    return imported_line(store, [record for record in records if store.has(*record)])


def _checked(look: Callable[[], Found | None], skip_bad: bool, notify: Callable[[str], None]) -> Found | None:
    """What `look` finds, once its tensors were read and found sound; what is not is said under `skip_bad`."""
    try:
        if found := look():
            found.read()
        return found
    except WrongRequest as error:
        if not skip_bad:
            raise
        notify(f"not imported: {error}")
        return None


def _latents(near: Caches, example: Example, examples: Sequence[Example], most: int) -> Found | None:
    found = near.latents(example, image_size(example.path), most)
    if found and found.program == SD_SCRIPTS:
        others = [e.path.name for e in examples if e.path.with_suffix("") == example.path.with_suffix("")]
        if len(others) > 1:
            what = f"may be of any of {', '.join(others)}"
            raise WrongRequest(f"{found.path} {what}; give the images different names, and delete it")
    return found


def _text(near: Caches, example: Example) -> Found | None:
    return near.text(example, read_caption(example.path))


def _require_any(caches: dict[Path, Caches]) -> None:
    kinds = Counter({kind: sum(near.count(kind) for near in caches.values()) for kind in FILES})
    if kinds.total() == kinds["musubi"]:
        where = ", ".join(map(str, caches))
        if kinds["musubi"]:
            what = f"musubi-tuner's caches (_fk.safetensors) in {where} are for FLUX.1 Kontext, with a control image"
            raise WrongRequest(f"{what} to each; fluxq has no use for those: leave out --import, and it encodes anew")
        what = "no *_flux.npz, *_flux_te.npz, _latent_cache or _t_e_cache of sd-scripts or ai-toolkit"
        raise WrongRequest(f"{where}: there is {what}; leave out --import, and fluxq encodes")


def _write(store: Store, latents: list[Item], texts: list[Item], wanted: Wanted, progress: Progress) -> None:
    try:
        for done, (example, one) in enumerate(latents, 1):
            hashed = store.hashes.of(example.path)
            for variant, values in reversed([*enumerate(one.read())]):  # the mirror image first: it is optional
                key = imported_latents_key(hashed, example.resized, example.bucket, variant)
                origin = Origin(one.program, one.verified)
                store.put_latents(key, values, torch.zeros_like(values), example.name, origin)
            progress("images", done, len(latents))
    finally:
        store.hashes.save()
    for done, (example, one) in enumerate(texts, 1):
        t5, pooled, seen = one.read()
        tokens = int(seen.sum())
        text = Text(t5, pooled, example.caption, tokens, one.program == SD_SCRIPTS and tokens == len(seen))
        key = imported_text_key(example.caption, wanted.t5_length)
        store.put_text(key, text, Origin(one.program, one.verified))
        progress("captions", done, len(texts))


def _tell(latents: list[Item], texts: list[Item], images: int, captions: int, notify: Callable[[str], None]) -> None:
    of = {"images": Counter(one.program for _, one in latents), "captions": Counter(one.program for _, one in texts)}
    for program in {**of["images"], **of["captions"]}:
        notify(f"{of['images'][program]} images and {of['captions'][program]} captions imported from {program}")
    if latents:
        notify("imported latents are one draw from the autoencoder each: every step sees the same, fluxq's own vary")
    if masked := sum(one.has_mask for _, one in latents):
        notify(f"the alpha masks of {masked} images are ignored: fluxq trains on whole images")
    if len(latents) < images or len(texts) < captions:
        notify(f"{images - len(latents)} images and {captions - len(texts)} captions have none; fluxq encodes those")
