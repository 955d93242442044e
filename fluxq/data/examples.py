"""From folders of images to examples: each image's name, its caption, and the shape that it is trained at.

An image without a caption is trained on the folder's class tokens, else on its trigger alone. If a caption does not
contain the trigger as a whole word (in any case), the trigger is put in front: "zqx, a dog on a beach". What is unusual
about images and captions becomes findings (findings.py).
"""

import math
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Protocol, TypeVar

from fluxq.errors import WrongRequest
from fluxq.settings import Folder, ImageSettings, Resolution, sizes_of

from .buckets import Size, choose_bucket
from .captions import Caption, Captions
from .findings import Findings
from .folders import subfolders
from .images import Header, Listing, View, image_size, listing, read_header
from .masks import Masks, check_mask
from .variants import caption_variants, image_views

T = TypeVar("T")
Shape = tuple[Size, Size]  # bucket, and the size that covers it
LISTED = 10
"""So many bad files are named in one refusal."""
CLOSE = 0.05
"""Repeats that are worked out from weights may miss them by this share."""


@dataclass(frozen=True)
class Example:
    """One image to train on, at one size. `name`, "<folder>/<file>", is unique in its scan and survives moving the
    folder; an image that is trained at several sizes has one a size, "<folder>/<file>@512x512".
    """

    name: str
    path: Path
    texts: tuple[str, ...]  # variants of its caption
    repeats: int
    bucket: Size  # (w, h) in pixels
    resized: Size  # (w, h), covers the bucket
    recolored: bool = False  # from the colors of its profile
    folder: Folder = Folder(Path())  # filled
    found: Caption = Caption("")
    views: tuple[View, ...] = (View(),)
    mask: Path | None = None  # the image itself, if its transparency is the mask
    held_out: bool = False  # by data.validation_split

    @property
    def caption(self) -> str:
        """The first variant."""
        return self.texts[0]

    @property
    def weight(self) -> float:
        """How much its loss counts."""
        prior = self.folder.prior_weight
        return prior if self.folder.regularization and prior is not None else 1.0


@dataclass(frozen=True)
class Scan:
    """The result of `scan`. skipped: a line for each image left out. found: what is unusual about the others."""

    examples: list[Example]
    skipped: list[str]
    found: Findings

    @property
    def notes(self) -> list[str]:
        """A line for each finding."""
        return [finding.line() for finding in self.found.all()]


class ChooseShape(Protocol):
    def __call__(self, width: int, height: int) -> Shape: ...


def scan(
    folders: Sequence[Folder],
    resolution: Resolution,
    min_side: int | None = None,
    max_side: int | None = None,
    step: int = 16,
    upscale: bool = True,
    skip_bad: bool = False,
) -> Scan:
    """Every image of `folders`, in order. Reads only the images' headers.

    resolution, upscale: of folders that have none of their own. min_side, max_side: of buckets, in pixels; by default
    half and twice the side of a square of their size.
    Bad images, captions and masks raise one WrongRequest that names them. With `skip_bad`, a bad image becomes a line
    of `skipped`, and a bad caption counts as none. Also raises WrongRequest for a folder that is missing or has no
    image, for settings that contradict each other, and if no usable image is left.
    """
    if not folders:
        raise WrongRequest("no folder of images was given; name at least one")
    scanned = _Scan(min_side, max_side, step, with_labels=len(folders) > 1)
    labels: set[str] = set()
    for folder in folders:
        name = os.path.basename(os.path.abspath(folder.path))
        label = next(label for label in chain([name], (f"{name}#{n}" for n in count(2))) if label not in labels)
        labels.add(label)
        scanned.add(folder.filled(ImageSettings(resolution=resolution, upscale=upscale)), label)
    bad = [*scanned.bad_images, *scanned.bad_captions]
    if bad and not skip_bad:
        raise WrongRequest(_refusal(bad))
    if not scanned.examples:
        raise WrongRequest(f"no usable image is left ({len(bad)} skipped); the first: {bad[0]}")
    masked = [folder for folder in folders if folder.masks]
    if masked and not any(example.mask for example in scanned.examples):
        where = ", ".join(str(folder.path) for folder in masked)
        raise WrongRequest(f"no image of {where} has a mask ({masked[0].masks}); add some, or leave out --masks")
    scanned.look_for_subfolders([folder.path for folder in folders])
    return Scan(scanned.examples, scanned.bad_images, scanned.findings)


def balanced(examples: Sequence[Example], trained: Collection[Path]) -> list[Example]:
    """`examples` with the repeats that the weights of the folders `trained` ask for, and with regularization images
    repeated until there are as many of them in an epoch as others.
    """
    own = [e for e in examples if e.folder.path in trained and not e.folder.regularization and not e.held_out]
    weights = {e.folder: e.folder.weight for e in own if e.folder.weight is not None}
    counts = Counter(e.folder for e in own)
    repeats = whole_repeats({folder: weight / counts[folder] for folder, weight in weights.items()})
    others = sum(repeats.get(e.folder, e.repeats) for e in own)
    regularizing = sum(e.repeats for e in examples if e.folder.path in trained and e.folder.regularization)
    times = max(1, round(others / max(1, regularizing)))

    def repeated(example: Example) -> Example:
        if example.folder.path not in trained or example.held_out:
            return example
        if example.folder.regularization:
            return replace(example, repeats=example.repeats * times)
        return replace(example, repeats=repeats.get(example.folder, example.repeats))

    return [repeated(example) for example in examples]


def whole_repeats(shares: Mapping[T, float]) -> dict[T, int]:
    """Small whole numbers in the ratios of `shares`, within CLOSE wherever numbers up to 12 times the smallest do."""
    if not shares:
        return {}
    least = min(shares.values())

    def error(times: int) -> float:
        return max(abs(round(times * s / least) / (times * s / least) - 1) for s in shares.values())

    tried = range(1, 13)
    times = next((n for n in tried if error(n) <= CLOSE), min(tried, key=error))
    return {of: round(times * share / least) for of, share in shares.items()}


class _Scan:
    """What `scan` has found so far. with_labels: a file's name alone would not tell which folder it is in."""

    def __init__(self, min_side: int | None, max_side: int | None, step: int, with_labels: bool) -> None:
        self.min_side, self.max_side, self.step, self.with_labels = min_side, max_side, step, with_labels
        self.examples: list[Example] = []
        self.bad_images: list[str] = []
        self.bad_captions: list[str] = []
        self.findings = Findings()
        self._seen: dict[Path, Example] = {}  # the first of each image
        self._shapes: set[tuple[Path, Size]] = set()

    def add(self, folder: Folder, label: str) -> None:
        """folder: filled."""
        images, named_masks, unread = _checked_listing(folder)
        captions, masks, prefix = folder_captions(folder), Masks(folder), f"{label}/" if self.with_labels else ""
        shapes, largest = self._choices(folder), 0
        self.findings.unread.update(unread)
        for path in images:
            name = prefix + path.name
            try:
                header = read_header(path)
                mask = self._mask(path, header, masks, name)
                found = [(size, *_shape_of(path, header, shape)) for size, shape in shapes.items()]
            except WrongRequest as error:
                self.bad_images.append(str(error))
                continue
            largest = max(largest, header.width * header.height)
            if (first := self._seen.get(path.resolve())) is None:
                caption, texts = self._caption(path, name, folder, captions)
            else:  # of a folder that is named twice
                caption, texts = first.found, first.texts
            new = {one[1]: one for one in reversed(found) if (path.resolve(), one[1]) not in self._shapes}
            if not new:
                self.findings.add("twice", name)
            if first is not None and first.folder is not folder:
                _require_same_captions(first, path, captions, folder)
            for (width, height), bucket, resized in reversed(new.values()):
                self._shapes.add((path.resolve(), bucket))
                self.findings.look_at_shape(name, header, bucket, resized)
                full = f"{label}/{path.name}" + (f"@{width}x{height}" if len(shapes) > 1 else "")
                views, recolored = image_views(path.name, resized, bucket, folder), header.recolored
                example = Example(
                    full, path, texts, folder.repeats, bucket, resized, recolored, folder, caption, views, mask
                )
                self._seen.setdefault(path.resolve(), example)
                self.examples.append(example)
        for path in named_masks if not folder.masks else ():
            self.findings.add("mask", prefix + path.name)
        for path in masks.second:
            self.findings.add("second mask", prefix + path.name)
        for path in sorted(masks.unused):
            self.findings.add("unused mask", prefix + path.name)
        for name in captions.unused([*images, *named_masks]):
            self.findings.add("no image", prefix + name)
        if len(shapes) > 1 and largest:
            _require_large_images(folder, shapes, largest)

    def look_for_subfolders(self, scanned: Sequence[Path]) -> None:
        known = {path.resolve() for path in scanned}
        for path in dict.fromkeys(inside for folder in scanned for inside in subfolders(folder)):
            if path.resolve() not in known:
                self.findings.add("unread folder", str(path))

    def _choices(self, folder: Folder) -> dict[Size, ChooseShape]:
        """For each size that the images of `folder` are trained at, what chooses an image's bucket."""
        choices = {}
        for size in sizes_of(folder.resolution or 0):
            side, step = math.isqrt(size[0] * size[1]), self.step
            sides = {
                "min_side": self.min_side or max(step, side // 2 // step * step),
                "max_side": self.max_side or 2 * side,
            }
            resolution = size[0] if size[0] == size[1] else size
            upscale = folder.upscale is not False
            choose = partial(choose_bucket, resolution=resolution, **sides, step=step, upscale=upscale)
            choose(*size)  # raises if the settings are impossible
            choices[size] = choose
        return choices

    def _mask(self, path: Path, header: Header, masks: Masks, name: str) -> Path | None:
        mask = masks.of(path)
        if mask is not None and mask != path:
            size, own = image_size(mask), (header.width, header.height)
            check_mask(mask, own, size)
            if size != own:
                self.findings.add("scaled mask", name)
        elif mask is None and masks.kind:
            self.findings.add("no mask", name)
        return mask

    def _caption(self, path: Path, name: str, folder: Folder, captions: Captions) -> tuple[Caption, tuple[str, ...]]:
        """What was found for the image `path`, and the variants that it is trained on."""
        try:
            found = captions.of(path)
        except WrongRequest as error:
            if str(error) not in self.bad_captions:
                self.bad_captions.append(str(error))
            found = Caption("", why=str(error).rpartition("; ")[0])
        texts = caption_variants(found.texts, folder)
        self.findings.look_at_caption(name, found, texts[0], folder)
        return found, texts


def _require_large_images(folder: Folder, sizes: Collection[Size], largest: int) -> None:
    """Raise WrongRequest if one of `sizes` is larger than the largest image of `folder`, of so many pixels."""
    for width, height in sizes:
        if width * height > largest:
            side = math.isqrt(largest)
            raise WrongRequest(
                f"no image of {folder.path} is as large as {width} x {height} pixels (the largest has the area of "
                f"{side} x {side}); leave that out of its resolutions"
            )


def folder_captions(folder: Folder) -> Captions:
    return Captions(folder.path, folder.caption_line or "all", bool(folder.caption_from_name))


def check_folder(own: Folder, folder: Folder) -> None:
    """Raise WrongRequest for `own` settings of a folder that have no effect. folder: filled, with those of [data]."""
    tags = folder.shuffle_tags or folder.tag_dropout
    wrong = (
        (own.weight is not None and own.repeats != 1, "weight", "repeats", "one of them"),
        (own.keep_tokens and not tags, "keep_tokens", "neither shuffle_tags nor tag_dropout", "one of these"),
        (own.mask_outside and not folder.masks, "mask_outside", "no masks", "masks"),
        (own.mask_normalize and not folder.masks, "mask_normalize", "no masks", "masks"),
        (folder.prior_weight is not None and not folder.regularization, "prior_weight", "no regularization", "it"),
        (folder.regularization and folder.weight is not None, "weight", "regularization", "repeats"),
        (folder.caption_dropout == 1, "caption_dropout = 1", "captions, none of which would be seen", "less"),
        (
            folder.caption_dropout_epochs == 1,
            "caption_dropout_epochs = 1",
            "captions, none of which would be seen",
            "2",
        ),
        (folder.tag_dropout == 1, "tag_dropout = 1", "tags, none of which would be seen", "less"),
    )
    for is_wrong, one, other, way in wrong:
        if is_wrong:
            raise WrongRequest(f"{folder.path} has {one} and {other}; set {way}, or leave {one.split(' ')[0]} out")


def _require_same_captions(first: Example, path: Path, captions: Captions, folder: Folder) -> None:
    try:
        texts = caption_variants(captions.of(path).texts, folder)
    except WrongRequest:  # said before
        return
    if texts != first.texts:
        raise WrongRequest(
            f"{folder.path} is named twice, with different captions for {path.name} ({first.caption!r} and "
            f"{texts[0]!r}); name it once, or give both the same settings"
        )


def _checked_listing(folder: Folder) -> Listing:
    if folder.repeats < 1:
        raise WrongRequest(f"{folder.path} has {folder.repeats} repeats; give a whole number of at least 1")
    if not folder.path.exists():
        raise WrongRequest(f"{folder.path} does not exist; name a folder of images")
    if not folder.path.is_dir():
        raise WrongRequest(f"{folder.path} is a file, not a folder of images; name the folder that contains it")
    try:
        found = listing(folder.path)
    except OSError as error:
        raise WrongRequest(f"{folder.path} cannot be listed ({error.strerror}); make it readable") from error
    if not found.images:
        others = (
            f" ({', '.join(f'{count} {suffix}' for suffix, count in found.unread.items())})" if found.unread else ""
        )
        raise WrongRequest(f"{folder.path} holds no images that fluxq reads{others}; name a folder with some")
    return found


def _shape_of(path: Path, header: Header, shape: ChooseShape) -> Shape:
    try:
        return shape(header.width, header.height)
    except WrongRequest as error:
        raise WrongRequest(f"{path}: {error}, or pass --skip-bad") from error


def _refusal(bad: list[str]) -> str:
    if len(bad) == 1:
        return bad[0]
    named = ", ".join(line.rpartition("; ")[0] or line for line in bad[:LISTED])
    more = f", and {len(bad) - LISTED} more" if len(bad) > LISTED else ""
    return f"{len(bad)} files cannot be used; correct, replace or remove them, or pass --skip-bad: {named}{more}"
