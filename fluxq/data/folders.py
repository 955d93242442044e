"""The folders that hold images: those inside others, and those whose names mean repeats and class as in sd-scripts."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from fluxq.errors import WrongRequest
from fluxq.settings import Folder

from .images import image_files

LEVELS = 3
"""How many levels down unread images are looked for, to report them."""


def by_label(folders: Sequence[Folder]) -> dict[str, Folder]:
    """Each folder by its last name, or by its whole path if several have that name."""
    names = [f.path.name for f in folders]
    return {f.path.name if names.count(f.path.name) == 1 else str(f.path): f for f in folders}


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
    """`folder` with the repeats and class tokens of its name, unless it has its own; a weight replaces repeats."""
    found = repeats_and_class(folder.path)
    if found is None or folder.repeats != 1 or folder.class_tokens is not None:
        return folder
    return replace(folder, repeats=found[0] if folder.weight is None else 1, class_tokens=found[1])
