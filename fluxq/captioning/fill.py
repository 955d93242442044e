"""Write the captions that are missing, batch by batch. What is written stays: the same call goes on where it was."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from fluxq.console import Notify, plural
from fluxq.data.captions import with_trigger
from fluxq.data.images import open_image
from fluxq.errors import WrongRequest, is_out_of_memory

from .folder import Backup, Captioned, write_caption

Caption = Callable[[Sequence[Image.Image]], list[str]]
"""Images -> the caption of each, such as a `Captioner`."""
MAX_SIDE = 1024
"""Images are shrunk to it, in pixels: models that take any size would need minutes for a photo from a camera."""


@dataclass
class Filled:
    """Captions by the file that they were written to. unread: why images cannot be decoded. speechless: images of which
    the model said nothing. backups: folders with the files that were replaced.
    """

    captions: dict[Path, str] = field(default_factory=dict)
    unread: dict[Path, str] = field(default_factory=dict)
    speechless: list[Path] = field(default_factory=list)
    backups: list[Path] = field(default_factory=list)
    batch: int = 1


def to_fill(items: Sequence[Captioned], backup: Backup | None = None) -> list[Captioned]:
    """Those of `items` without a caption; with a `backup`, all but those that an interrupted attempt has replaced.
    Images that share a file of captions, a.jpg and a.png, get one.
    """
    wanted = (item for item in items if not (backup.is_done(item.file) if backup else item.caption.text))
    return list({item.file: item for item in wanted}.values())


def fill(
    items: Sequence[Captioned],
    caption: Caption,
    trigger: str | None = None,
    batch: int = 1,
    backup: Backup | None = None,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
    notify: Notify = print,
) -> Filled:
    """Caption `items`, so many images at a time, and put the trigger into what is written.

    If GPU memory runs out, the batch is halved, and stays so. Raises WrongRequest if one image is too much.
    """
    filled, done = Filled(batch=batch), 0
    progress("captions", done, len(items))
    while done < len(items):
        part, images = [], []
        for item in items[done : done + filled.batch]:
            try:
                images.append(_shrunk(open_image(item.image)))
                part.append(item)
            except WrongRequest as error:
                filled.unread[item.image] = str(error).rpartition("; ")[0]
        texts = _captions(caption, images)
        if texts is None:
            filled.batch = _halved(filled.batch, notify)
            continue
        for item, text in zip(part, texts, strict=True):
            if not any(map(str.isalnum, text)):
                filled.speechless.append(item.image)
                continue
            if backup is not None:
                backup.keep(item.file)
            write_caption(item.file, text := with_trigger(text, trigger))
            filled.captions[item.file] = text
            notify(f"{item.file}: {text}")
        done = min(done + filled.batch, len(items))
        progress("captions", done, len(items))
    if backup is not None:
        filled.backups = backup.finish()
    return filled


def _shrunk(image: Image.Image) -> Image.Image:
    image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    return image


def _captions(caption: Caption, images: Sequence[Image.Image]) -> list[str] | None:
    """None if GPU memory ran out; what the attempt held is free again."""
    try:
        return caption(images) if images else []
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    import torch

    gc.collect()
    torch.cuda.empty_cache()
    return None


def _halved(batch: int, notify: Notify) -> int:
    if batch == 1:
        raise WrongRequest(
            "the GPU's memory is too small for this model with even one image; name a smaller --model, close other "
            "programs, or hide the GPU with CUDA_VISIBLE_DEVICES=-1"
        )
    notify(f"out of GPU memory with {plural(batch, 'image')} at a time; going on with {batch // 2}")
    return batch // 2
