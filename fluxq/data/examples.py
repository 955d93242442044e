"""From folders of images to examples: each image's name, its caption, and the shape that it is trained at.

An image's caption is the first line with text in `<name>.txt`, else in `<name>.caption`; each run of white space
becomes one space. Without such a line, the caption is the folder's trigger alone. If a caption does not contain the
trigger as a whole word (in any case), the trigger is put in front: "zqx, a dog on a beach". A note counts how often.
"""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, count
from pathlib import Path

from fluxq.errors import WrongRequest

from .buckets import Size, choose_bucket
from .images import image_files, image_size

CAPTION_SUFFIXES = (".txt", ".caption")
Shape = tuple[Size, Size]  # bucket, and the size that covers it


@dataclass(frozen=True)
class Folder:
    """A folder of images. Each image is seen `repeats` times per epoch; `trigger` is the word for the concept."""

    path: Path
    repeats: int = 1
    trigger: str | None = None


@dataclass(frozen=True)
class Example:
    """One image to train on. `name`, "<folder>/<file>", is unique in its scan and survives moving the folder."""

    name: str
    path: Path
    caption: str
    repeats: int
    bucket: Size  # (w, h) in pixels
    resized: Size  # (w, h), covers the bucket


@dataclass(frozen=True)
class Scan:
    """The result of `scan`."""

    examples: list[Example]
    skipped: list[str]  # one line per image left out
    notes: list[str]  # other lines for the user


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

    A bad image or caption file raises WrongRequest or, with `skip_bad`, becomes a line of `skipped`. Also raises
    WrongRequest for a folder that is missing or has no image, for repeats below 1, and if no usable image is left.
    """
    if not folders:
        raise WrongRequest("no folder of images was given; name at least one")
    shape = partial(
        choose_bucket, resolution=resolution, min_side=min_side, max_side=max_side, step=step, upscale=upscale
    )
    shape(
        *((resolution, resolution) if isinstance(resolution, int) else resolution)
    )  # raises if the settings are impossible
    result = Scan([], [], [])
    seen: set[Path] = set()
    labels: set[str] = set()
    for folder in folders:
        name = os.path.basename(os.path.abspath(folder.path))
        label = next(label for label in chain([name], (f"{name}#{n}" for n in count(2))) if label not in labels)
        labels.add(label)
        _scan_folder(folder, label, shape, skip_bad, seen, result)
    if not result.examples:
        raise WrongRequest(f"no usable image is left ({len(result.skipped)} skipped); the first: {result.skipped[0]}")
    return result


def read_caption(image: Path) -> str:
    """The caption in the text file next to `image`, or "". Raises WrongRequest if the file is not UTF-8 text."""
    for suffix in CAPTION_SUFFIXES:
        path = image.with_suffix(suffix)
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except FileNotFoundError:
            continue
        except UnicodeDecodeError as error:
            raise WrongRequest(
                f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8, or pass --skip-bad"
            ) from error
        except OSError as error:
            raise WrongRequest(
                f"{path} cannot be read ({error.strerror}); make it readable, or pass --skip-bad"
            ) from error
        for line in lines:
            if line.strip():
                return " ".join(line.split())
    return ""


def with_trigger(caption: str, trigger: str | None) -> str:
    """`caption` with `trigger` in front, unless it already contains that word. Either may be empty."""
    trigger = " ".join((trigger or "").split())
    if not trigger or re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption, re.IGNORECASE):
        return caption
    return f"{trigger}, {caption}" if caption else trigger


def _checked_files(folder: Folder) -> list[Path]:
    if folder.repeats < 1:
        raise WrongRequest(f"{folder.path} has {folder.repeats} repeats; give a whole number of at least 1")
    if not folder.path.exists():
        raise WrongRequest(f"{folder.path} does not exist; name a folder of images")
    if not folder.path.is_dir():
        raise WrongRequest(f"{folder.path} is a file, not a folder of images; name the folder that contains it")
    try:
        files = image_files(folder.path)
    except OSError as error:
        raise WrongRequest(f"{folder.path} cannot be listed ({error.strerror}); make it readable") from error
    if not files:
        raise WrongRequest(f"{folder.path} holds no images (.png .jpg .jpeg .webp .bmp; subfolders are not searched)")
    return files


def _scan_folder(
    folder: Folder, label: str, shape: Callable[[int, int], Shape], skip_bad: bool, seen: set[Path], result: Scan
) -> None:
    """Add the images of one folder to `result`, and their real paths to `seen`."""
    duplicates, without_caption, without_trigger = [], [], []
    for path in _checked_files(folder):
        if path.resolve() in seen:
            duplicates.append(path.name)
            continue
        seen.add(path.resolve())
        try:
            bucket, resized = _shape_of(path, shape)
            text = read_caption(path)
        except WrongRequest as error:
            if not skip_bad:
                raise
            result.skipped.append(str(error))
            continue
        caption = with_trigger(text, folder.trigger)
        if not caption:
            without_caption.append(path.name)
        elif text and text != caption:
            without_trigger.append(path.name)
        result.examples.append(Example(f"{label}/{path.name}", path, caption, folder.repeats, bucket, resized))
    for names, what in (
        (duplicates, "images listed more than once, each counted once"),
        (without_caption, "images without a caption or trigger, trained with the empty caption"),
        (without_trigger, f"captions without the trigger {folder.trigger!r}, now added"),
    ):
        if names:
            examples = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            result.notes.append(f"{folder.path}: {what}: {len(names)} ({examples})")


def _shape_of(path: Path, shape: Callable[[int, int], Shape]) -> Shape:
    size = image_size(path)
    try:
        return shape(*size)
    except WrongRequest as error:
        raise WrongRequest(f"{path}: {error}, or pass --skip-bad") from error
