"""The variants of an example: what is random about its caption and its image, drawn once to be encoded ahead.

A variant is drawn by address: a caption's by its text, an image's by its name. So every run has the same, the cache has
each once, and a step only chooses among them. Tags are handled as in sd-scripts: shuffled and left out between those
that are kept. A trigger that is put in front is the first that is kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fluxq.settings import Folder

from .buckets import Size
from .captions import CHOICE, with_trigger
from .images import View
from .randomness import generator

ATTEMPTS = 8
"""So many times as many variants are drawn as are wanted, if equal ones come out."""
COLORS = 0.1
"""Brightness, contrast and saturation change by up to this share."""


def caption_variants(texts: Sequence[str], folder: Folder) -> tuple[str, ...]:
    """Every caption that an image with the captions `texts` is trained on, at least one. folder: filled.

    One that is drawn more often is there more often: of a tag that is dropped by a chance of 0.1, nine tenths have it.
    At most `folder.variants` differ, or as many as there are `texts`.
    """
    texts = list(dict.fromkeys(texts)) or [folder.class_tokens or ""]
    if not draws_captions(folder):
        return tuple(dict.fromkeys(_finished(text, folder) for text in texts))
    most, found, distinct = max(folder.variants or 1, len(texts)), [], set()
    for attempt in range(ATTEMPTS * most):
        text = texts[attempt % len(texts)]
        found.append(_finished(text, folder, generator(0, "caption variant", text, attempt)))
        distinct.add(found[-1])
        if len(distinct) == most:
            break
    is_uniform = len(distinct) == 1 or not (folder.tag_dropout or folder.wildcards)
    return tuple(dict.fromkeys(found)) if is_uniform else tuple(found)


def image_views(name: str, resized: Size, bucket: Size, folder: Folder) -> tuple[View, ...]:
    """Every view of the image called `name` that is trained on, the plain one first. folder: filled."""
    room = resized[0] - bucket[0], resized[1] - bucket[1]
    moves = folder.random_crop and any(room)
    if not moves and not folder.color_augment:
        return (View(), View(mirrored=True)) if folder.flip else (View(),)
    found = {View(): None}
    for attempt in range(ATTEMPTS * (folder.variants or 1)):
        if len(found) == folder.variants:
            break
        random = generator(0, "image variant", name, attempt)
        mirrored, offset = random.random() < 0.5, tuple(int(random.integers(side + 1)) for side in room)
        factors = tuple(round(float(f), 3) for f in random.uniform(1 - COLORS, 1 + COLORS, 3))
        drawn = (offset[0], offset[1]), (factors[0], factors[1], factors[2])
        found[
            View(
                bool(folder.flip and mirrored), drawn[0] if moves else None, drawn[1] if folder.color_augment else None
            )
        ] = None
    return tuple(found)


def draws_captions(folder: Folder) -> bool:
    """Whether a caption has variants that are drawn."""
    return bool(folder.shuffle_tags or folder.tag_dropout or folder.wildcards)


def _finished(text: str, folder: Folder, random: np.random.Generator | None = None) -> str:
    """What `text` is trained as. random: of the variant; None if nothing is drawn."""
    text = " ".join(filter(None, (folder.caption_prefix, text or folder.class_tokens, folder.caption_suffix)))
    if random is not None and folder.wildcards:
        while match := CHOICE.search(text):
            options = match[1].split("|")
            text = text[: match.start()] + options[int(random.integers(len(options)))] + text[match.end() :]
    if folder.shuffle_tags or folder.tag_dropout or folder.keep_tokens_separator:
        filled = with_trigger(text, folder.trigger)
        put_in_front = filled != text and filled.endswith(text)
        text = _with_tags(text, folder, max(0, (folder.keep_tokens or 0) - put_in_front), random)
    return with_trigger(" ".join(text.split()), folder.trigger)


def _with_tags(text: str, folder: Folder, kept: int, random: np.random.Generator | None) -> str:
    separator, mark = folder.caption_separator or ",", folder.keep_tokens_separator

    def tags(part: str) -> list[str]:
        return [tag.strip() for tag in part.split(separator) if tag.strip()]

    if mark and mark in text:
        front, _, rest = text.partition(mark)
        middle, _, end = rest.partition(mark)
        first, free, last = tags(front), tags(middle), tags(end)
    else:
        first, free, last = tags(text)[:kept], tags(text)[kept:], []
    if random is not None:
        trigger = (folder.trigger or "").casefold()
        free = [tag for tag in free if random.random() >= (folder.tag_dropout or 0) or tag.casefold() == trigger]
        if folder.shuffle_tags:
            free = [free[i] for i in random.permutation(len(free))]
    return f"{separator} ".join([*first, *free, *last])
