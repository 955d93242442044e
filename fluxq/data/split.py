"""Which images are held out for validation: a share of them, chosen by what is in them.

The hash of an image's file is its place between 0 and 1, and places below the share are held out, or the lowest if none
is. So the names of files and folders do not matter, and other images that are added hold out none that was trained on.
Images that look alike (looks.py) stay together: the highest of their places counts, so that neither does a copy.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from fluxq.errors import WrongRequest

from .examples import Example
from .looks import Look, alike
from .variants import caption_variants, image_views


def held_out_images(
    hashes: Mapping[Path, str], looks: Mapping[Path, Look], share: float, taught: Collection[Path]
) -> set[Path]:
    """Those of the images `taught` that are held out: at least one, and never all.

    hashes, looks: of all images; one that is not `taught`, and what looks like it, is never held out. Raises
    WrongRequest if there is nothing to divide.
    """
    groups: dict[Path, set[Path]] = {}
    equal: dict[str, set[Path]] = {}
    for path, hashed in hashes.items():
        groups[path] = equal.setdefault(hashed, set())
        groups[path].add(path)
    for path, others in alike(looks):
        for other in others:
            groups[other] |= groups[path]
            groups |= dict.fromkeys(groups[path], groups[other])
    distinct = {id(group): group for path, group in groups.items() if path in taught}.values()
    free = [(max(_place(hashes[path]) for path in group), group) for group in distinct if group <= {*taught}]
    free.sort(key=lambda item: item[0])
    if len(distinct) < 2 or not free:
        raise WrongRequest(
            f"--validation-split {share:g} leaves nothing: without copies there is only one image; add images, or name "
            "a folder of held-out images (data.validation)"
        )
    count = max(1, sum(place < share for place, _ in free))
    return set().union(*(group for _, group in free[: min(count, len(distinct) - 1)]))


def _place(hashed: str) -> float:
    return int(hashed[:13], 16) / 16**13


def divided(examples: Sequence[Example], held_out: Collection[Path]) -> list[Example]:
    """`examples` in which those of the images `held_out` are so, once each and plain."""
    return [_held_out(example) if example.path in held_out else example for example in examples]


def _held_out(example: Example) -> Example:
    folder = example.folder.plain()
    texts = caption_variants(example.found.texts, folder)
    views = image_views(example.path.name, example.resized, example.bucket, folder)
    return replace(example, folder=folder, texts=texts, views=views, repeats=1, held_out=True)
