"""From folders of images to examples: each image's name, its caption, and the shape that it is trained at.

An image without a caption is trained on the folder's class tokens, else on its trigger alone. If a caption does not
contain the trigger as a whole word (in any case), the trigger is put in front: "zqx, a dog on a beach". What is unusual
about images and captions becomes findings (findings.py).
"""

import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Protocol

from fluxq.errors import WrongRequest

from .buckets import Size, choose_bucket
from .captions import Caption, Captions, with_trigger
from .findings import Findings
from .images import Header, Listing, image_files, listing, read_header

Shape = tuple[Size, Size]  # bucket, and the size that covers it
LISTED = 10
"""So many bad files are named in one refusal."""
LEVELS = 3
"""So far down are images looked for that nobody asked to read, to say that they are there."""


@dataclass(frozen=True)
class Folder:
    """A folder of images. Each image is seen `repeats` times per epoch; `trigger` is the word for the concept.
    class_tokens: the caption of images without one. lines, from_names: as for `Captions`.
    """

    path: Path
    repeats: int = 1
    trigger: str | None = None
    class_tokens: str | None = None
    lines: str = "all"
    from_names: bool = False

    def captions(self) -> Captions:
        return Captions(self.path, self.lines, self.from_names)

    def caption(self, found: Caption) -> str:
        """What an image with that caption is trained on."""
        return with_trigger(found.text or self.class_tokens or "", self.trigger)


@dataclass(frozen=True)
class Example:
    """One image to train on. `name`, "<folder>/<file>", is unique in its scan and survives moving the folder."""

    name: str
    path: Path
    caption: str
    repeats: int
    bucket: Size  # (w, h) in pixels
    resized: Size  # (w, h), covers the bucket
    recolored: bool = False  # from the colors of its profile


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
    resolution: int | Size,
    min_side: int,
    max_side: int,
    step: int = 16,
    upscale: bool = True,
    skip_bad: bool = False,
) -> Scan:
    """Every image of `folders`, in order. Reads only the images' headers.

    Bad images and captions raise one WrongRequest that names them. With `skip_bad`, a bad image becomes a line of
    `skipped`, and a bad caption counts as none. Also raises WrongRequest for a folder that is missing or has no image,
    for repeats below 1, and if no usable image is left.
    """
    if not folders:
        raise WrongRequest("no folder of images was given; name at least one")
    shape = partial(
        choose_bucket, resolution=resolution, min_side=min_side, max_side=max_side, step=step, upscale=upscale
    )
    shape(
        *((resolution, resolution) if isinstance(resolution, int) else resolution)
    )  # raises if the settings are impossible
    scanned = _Scan(shape, with_labels=len(folders) > 1)
    labels: set[str] = set()
    for folder in folders:
        name = os.path.basename(os.path.abspath(folder.path))
        label = next(label for label in chain([name], (f"{name}#{n}" for n in count(2))) if label not in labels)
        labels.add(label)
        scanned.add(folder, label)
    bad = [*scanned.bad_images, *scanned.bad_captions]
    if bad and not skip_bad:
        raise WrongRequest(_refusal(bad))
    if not scanned.examples:
        raise WrongRequest(f"no usable image is left ({len(bad)} skipped); the first: {bad[0]}")
    scanned.look_for_subfolders([folder.path for folder in folders])
    return Scan(scanned.examples, scanned.bad_images, scanned.findings)


def captions_of(folders: Sequence[Folder]) -> Iterator[str]:
    """What each image of `folders` is trained on; bad captions are left out."""
    for folder in folders:
        captions = folder.captions()
        for path in image_files(folder.path):
            try:
                yield folder.caption(captions.of(path))
            except WrongRequest:
                continue


def subfolders(folder: Path, depth: float = LEVELS) -> Iterator[Path]:
    """Every folder inside `folder`, up to `depth` levels down, that holds images, sorted by path. Hidden ones are left
    out, and so are runs, whose previews nobody wants to train on.
    """
    for path, names, files in os.walk(folder):
        inside = Path(path).relative_to(folder).parts
        is_run = "config.toml" in files and "log.jsonl" in files
        names[:] = [] if is_run or len(inside) >= depth else sorted(name for name in names if not name.startswith("."))
        if inside and not is_run and image_files(Path(path)):
            yield Path(path)


def expand(folder: Folder, recursive: bool) -> list[Folder]:
    """`folder` as the folders that hold its images.

    With `recursive`, those inside it count too. Without images of its own, it stands for the folders inside it that
    are called as sd-scripts wants: "10_zqx man" has 10 repeats, and "zqx man" is the caption of images without one.
    Raises WrongRequest if it holds no images but folders inside it do.
    """
    if not folder.path.is_dir():
        return [folder]  # `scan` says what is wrong
    own, inside = bool(image_files(folder.path)), list(subfolders(folder.path, math.inf if recursive else LEVELS))
    named = [path for path in inside if path.parent == folder.path and repeats_and_class(path)]
    if not own and inside and not recursive and not named:
        images = sum(len(image_files(path)) for path in inside)
        raise WrongRequest(
            f"{folder.path} holds no images itself, but {images} lie in {len(inside)} folders inside it; name "
            "those, or pass --recursive"
        )
    paths = [*([folder.path] if own or not inside else []), *(inside if recursive else () if own else named)]
    return [_as_named(replace(folder, path=path)) for path in paths]


def repeats_and_class(folder: Path) -> tuple[int, str] | None:
    """(10, "zqx man") for a folder called "10_zqx man"; None for other names."""
    match = re.fullmatch(r"([1-9]\d*)_\s*(\S.*)", folder.name)
    return (int(match[1]), " ".join(match[2].split())) if match else None


def _as_named(folder: Folder) -> Folder:
    """`folder` with the repeats and class tokens of its name, unless it has its own."""
    found = repeats_and_class(folder.path)
    if found is None or folder.repeats != 1 or folder.class_tokens is not None:
        return folder
    return replace(folder, repeats=found[0], class_tokens=found[1])


class _Scan:
    """What `scan` has found so far. with_labels: a file's name alone would not tell which folder it is in."""

    def __init__(self, shape: ChooseShape, with_labels: bool) -> None:
        self.shape, self.with_labels = shape, with_labels
        self.examples: list[Example] = []
        self.bad_images: list[str] = []
        self.bad_captions: list[str] = []
        self.findings = Findings()
        self._seen: set[Path] = set()

    def add(self, folder: Folder, label: str) -> None:
        images, masks, unread = _checked_listing(folder)
        captions, prefix = folder.captions(), f"{label}/" if self.with_labels else ""
        self.findings.unread.update(unread)
        for path in images:
            if path.resolve() in self._seen:
                self.findings.add("twice", prefix + path.name)
                continue
            self._seen.add(path.resolve())
            try:
                header = read_header(path)
                bucket, resized = _shape_of(path, header, self.shape)
            except WrongRequest as error:
                self.bad_images.append(str(error))
                continue
            caption = self._caption(path, prefix + path.name, folder, captions)
            self.findings.look_at_shape(prefix + path.name, header, bucket, resized)
            full, recolored = f"{label}/{path.name}", header.recolored
            self.examples.append(Example(full, path, caption, folder.repeats, bucket, resized, recolored))
        for path in masks:
            self.findings.add("mask", prefix + path.name)
        for name in captions.unused([*images, *masks]):
            self.findings.add("no image", prefix + name)

    def look_for_subfolders(self, scanned: Sequence[Path]) -> None:
        known = {path.resolve() for path in scanned}
        for path in dict.fromkeys(inside for folder in scanned for inside in subfolders(folder)):
            if path.resolve() not in known:
                self.findings.add("unread folder", str(path))

    def _caption(self, path: Path, name: str, folder: Folder, captions: Captions) -> str:
        try:
            found = captions.of(path)
        except WrongRequest as error:
            if str(error) not in self.bad_captions:
                self.bad_captions.append(str(error))
            found = Caption("", why=str(error).rpartition("; ")[0])
        caption = folder.caption(found)
        self.findings.look_at_caption(name, found, caption)
        return caption


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
