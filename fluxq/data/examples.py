"""Folders of images to examples: which images there are, what each is called, and at which shape it is trained.

An image's caption is the first line with text in `<name>.txt`, else in `<name>.caption`, with runs of white space made
one space. Without such a line the caption is the folder's trigger alone. A caption that lacks the trigger, as a word of
its own in any case, gets it in front: "zqx, a dog on a beach"; how often that was done is among the notes.
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
    """A folder of images. Each is seen `repeats` times an epoch; `trigger` is the word that calls the concept."""

    path: Path
    repeats: int = 1
    trigger: str | None = None


@dataclass(frozen=True)
class Example:
    """One image to train on. `name`, "<folder>/<file>", is unique in its scan and stays when the folder is moved."""

    name: str
    path: Path
    caption: str
    repeats: int
    bucket: Size  # (w, h) in pixels
    resized: Size  # (w, h) that covers the bucket


@dataclass(frozen=True)
class Scan:
    """What `scan` found."""

    examples: list[Example]
    skipped: list[str]  # one line for each image that was left out
    notes: list[str]  # other lines that the user should see


def scan(
    folders: Sequence[Folder],
    resolution: int | Size,
    min_side: int,
    max_side: int,
    step: int = 16,
    upscale: bool = True,
    skip_bad: bool = False,
) -> Scan:
    """Every image of `folders`, in order. Only the images' headers are read.

    A bad image or caption file raises WrongRequest, or, with `skip_bad`, becomes a line of `skipped`. WrongRequest as
    well for a folder that is missing or has no image, for repeats below 1, and if no usable image is left.
    """
    if not folders:
        raise WrongRequest("no folder of images was given; name at least one")
    shape = partial(
        choose_bucket, resolution=resolution, min_side=min_side, max_side=max_side, step=step, upscale=upscale
    )
    shape(*((resolution, resolution) if isinstance(resolution, int) else resolution))  # refuses an impossible request
    result = Scan([], [], [])
    seen: set[Path] = set()
    labels: set[str] = set()
    for folder in folders:
        name = os.path.basename(os.path.abspath(folder.path))
        label = next(label for label in chain([name], (f"{name}#{n}" for n in count(2))) if label not in labels)
        labels.add(label)
        _scan_folder(folder, label, shape, skip_bad, seen, result)
    if not result.examples:
        raise WrongRequest(
            f"no usable image is left, {len(result.skipped)} were skipped; the first: {result.skipped[0]}"
        )
    return result


def read_caption(image: Path) -> str:
    """The caption in the text file beside `image`, "" without one. Raises WrongRequest if it is not UTF-8 text."""
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
    """`caption` with `trigger` in front, unless it has that word already. Either may be empty."""
    trigger = " ".join((trigger or "").split())
    if not trigger or re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption, re.IGNORECASE):
        return caption
    return f"{trigger}, {caption}" if caption else trigger


def _checked_files(folder: Folder) -> list[Path]:
    if folder.repeats < 1:
        raise WrongRequest(f"{folder.path} is to be repeated {folder.repeats} times; give a whole number from 1")
    if not folder.path.exists():
        raise WrongRequest(f"{folder.path} does not exist; name a folder of images")
    if not folder.path.is_dir():
        raise WrongRequest(f"{folder.path} is a file, not a folder of images; name the folder that it lies in")
    try:
        files = image_files(folder.path)
    except OSError as error:
        raise WrongRequest(f"{folder.path} cannot be listed ({error.strerror}); make it readable") from error
    if not files:
        raise WrongRequest(
            f"{folder.path} holds no image (.png .jpg .jpeg .webp .bmp; folders inside it are not searched)"
        )
    return files


def _scan_folder(
    folder: Folder, label: str, shape: Callable[[int, int], Shape], skip_bad: bool, seen: set[Path], result: Scan
) -> None:
    """Adds the images of one folder to `result`, and their real paths to `seen`."""
    twice, without_text, without_trigger = [], [], []
    for path in _checked_files(folder):
        if path.resolve() in seen:
            twice.append(path.name)
            continue
        seen.add(path.resolve())
        try:
            bucket, resized = _place(path, shape)
            text = read_caption(path)
        except WrongRequest as error:
            if not skip_bad:
                raise
            result.skipped.append(str(error))
            continue
        caption = with_trigger(text, folder.trigger)
        if not caption:
            without_text.append(path.name)
        elif text and text != caption:
            without_trigger.append(path.name)
        result.examples.append(Example(f"{label}/{path.name}", path, caption, folder.repeats, bucket, resized))
    for names, what in (
        (twice, "images listed more than once, each counted once"),
        (without_text, "images without caption and trigger, trained with the empty caption"),
        (without_trigger, f"captions without the trigger {folder.trigger!r}, which was put in front"),
    ):
        if names:
            examples = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            result.notes.append(f"{folder.path}: {what}: {len(names)} ({examples})")


def _place(path: Path, shape: Callable[[int, int], Shape]) -> Shape:
    size = image_size(path)
    try:
        return shape(*size)
    except WrongRequest as error:
        raise WrongRequest(f"{path}: {error}, or pass --skip-bad") from error
