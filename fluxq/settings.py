"""Shared by config.py and the packages below it: how a setting is described, and the settings of an image folder.

What a folder leaves unset is as [data] has it, and what that leaves unset has a default (DEFAULTS).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self, TypeVar

Size = tuple[int, int]
"""(width, height) in pixels."""
Resolution = int | tuple[Size, ...]
"""The side of a square in pixels, or sizes (w, h); an image is trained at each of several sizes."""


def option(
    default: Any,
    help: str,
    flag: str | None = None,
    choices: tuple[str, ...] = (),
    minimum: float | None = None,
    maximum: float = math.inf,
    parse: Callable[[Any], Any] | None = None,
) -> Any:
    """A field with its help text, its command-line option, and its choices or its range.

    parse: makes the value of what a file or the command line has; raises ValueError with what it must be.
    """
    about = {"help": help, "flag": flag, "choices": choices, "minimum": minimum, "maximum": maximum, "parse": parse}
    return field(default=default, metadata=about)


def parse_resolution(value: Any) -> Resolution:
    """768, "768", "768x1024" (width x height), "512,768,1024", [768, 1024] (width, height), [512, 768, 1024] or
    [[512, 512], [768, 1024]]. Raises ValueError for anything else.
    """
    wanted = 'a number of pixels from 16 up, "WIDTHxHEIGHT" or several of these like "512,768"'
    parts = value.split(",") if isinstance(value, str) else value
    if isinstance(parts, list | tuple):
        if len(parts) == 2 and all(_is_side(part) for part in parts) and not isinstance(value, str):
            parts = [parts]
        sizes = tuple(dict.fromkeys(_parse_size(part, wanted) for part in parts))
        if not sizes:
            raise ValueError(wanted)
        return sizes[0][0] if len(sizes) == 1 and sizes[0][0] == sizes[0][1] else sizes
    return _parse_size(value, wanted)[0]


def _parse_size(part: Any, wanted: str) -> Size:
    sides = part.lower().replace("×", "x").split("x") if isinstance(part, str) else part
    numbers: list[Any] = [
        int(side) if isinstance(side, str) and side.strip().isdecimal() else side
        for side in (sides if isinstance(sides, list | tuple) else [sides])
    ]
    if len(numbers) not in (1, 2) or not all(map(_is_side, numbers)):
        raise ValueError(wanted)
    return numbers[0], numbers[-1]


def _is_side(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 16


def sizes_of(resolution: Resolution) -> tuple[Size, ...]:
    return ((resolution, resolution),) if isinstance(resolution, int) else resolution


def block_numbers(text: str) -> set[int]:
    """The numbers in "0-3,5"; none in "none". Raises ValueError for anything else."""
    if text == "none":
        return set()
    numbers: set[int] = set()
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        numbers |= (found := set(range(int(first), int(last or first) + 1)))
        if not found:
            raise ValueError(f"{part} is empty")
    return numbers


@dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """How images and captions are read and varied. None is unset."""

    trigger: str | None = option(
        None,
        "The word that will call the concept in prompts, ideally a made-up one like zqx; put in front of captions that "
        "lack it; default: none.",
        "--trigger",
    )
    class_tokens: str | None = option(
        None,
        "The caption of images without one; default: that of the folder's name if it is called like `10_zqx man`, "
        "which has 10 repeats and `zqx man`.",
    )
    resolution: Resolution | None = option(
        None,
        "Pixels, a multiple of 16: images keep their shape and are resized to about resolution x resolution in area; "
        "higher learns more detail, but is slower and takes more memory; 768x1024 is a width and a height, and "
        "512,768,1024 trains each image at several sizes; default: 512, or 768 on a GPU of 12 GiB or more.",
        "--resolution",
        parse=parse_resolution,
    )
    upscale: bool | None = option(
        None, "Enlarge images that are smaller than their bucket; if false, they get a smaller bucket; default: true."
    )
    caption_line: str | None = option(
        None,
        "How much of a caption's text file is used: all, the first line, as in sd-scripts, or each line as a caption "
        "of its own, of which a step draws one; default: all.",
        None,
        ("all", "first", "each"),
    )
    caption_from_name: bool | None = option(
        None, "Caption an image that has no caption with its file's name, red_dress_02.png with `red dress`."
    )
    caption_prefix: str | None = option(None, "Text in front of every caption.")
    caption_suffix: str | None = option(None, "Text behind every caption.")
    caption_separator: str | None = option(None, "What separates the tags of a caption; default: a comma.")
    shuffle_tags: bool | None = option(
        None, "Shuffle the tags of captions, the parts between commas, anew in each variant.", "--shuffle-tags"
    )
    keep_tokens: int | None = option(
        None, "How many of the first tags stay in front and are never dropped; default: 0.", "--keep-tokens", minimum=0
    )
    keep_tokens_separator: str | None = option(
        None, "A mark in captions, like |||: tags before it, and behind a second one, stay in place; default: none."
    )
    tag_dropout: float | None = option(
        None,
        "Chance of each tag to be left out of a variant, 0 to below 1; default: 0.",
        "--tag-dropout",
        minimum=0,
        maximum=1,
    )
    wildcards: bool | None = option(
        None, "Draw one of the alternatives in captions like `a {red|blue} car`.", "--wildcards"
    )
    caption_dropout: float | None = option(
        None,
        "Chance of a step to see an image without its caption, 0 to below 1; 0.05 to 0.1 is usual for styles; "
        "default: 0.",
        "--caption-dropout",
        minimum=0,
        maximum=1,
    )
    caption_dropout_epochs: int | None = option(
        None,
        "Leave out all captions in each epoch whose number, counted from 1, is a multiple of this, 2 or more; "
        "default: 0, never.",
        minimum=0,
    )
    flip: bool | None = option(
        None, "Also train on mirror images; not for faces, text and whatever knows left from right.", "--flip"
    )
    random_crop: bool | None = option(
        None, "Cut images to their bucket at random places instead of in the center, anew in each variant."
    )
    color_augment: bool | None = option(
        None, "Change brightness, contrast and saturation by up to 10 %, anew in each variant."
    )
    variants: int | None = option(
        None,
        "The most variants of an image's captions, and of the image, that are drawn and encoded; default: 8.",
        minimum=1,
        maximum=1000,
    )
    masks: str | None = option(
        None,
        "Train on parts of images, white in their masks: beside takes 07-masklabel.png or 07_mask.png for 07.jpg, "
        "alpha the images' transparency, any other value is a folder of masks called as the images are; default: none.",
        "--masks",
    )
    mask_outside: float | None = option(
        None, "How much the area outside a mask counts, 0 to 1; default: 0.", minimum=0, maximum=1
    )
    mask_normalize: bool | None = option(
        None, "Weigh an image with a small mask as much as one with a large mask; default: each pixel counts alike."
    )


DEFAULTS: dict[str, Any] = {
    "upscale": True,
    "caption_line": "all",
    "caption_from_name": False,
    "caption_separator": ",",
    "shuffle_tags": False,
    "keep_tokens": 0,
    "tag_dropout": 0.0,
    "wildcards": False,
    "caption_dropout": 0.0,
    "caption_dropout_epochs": 0,
    "flip": False,
    "random_crop": False,
    "color_augment": False,
    "variants": 8,
    "mask_outside": 0.0,
    "mask_normalize": False,
}
"""The settings that have a value if nobody sets them."""


@dataclass(frozen=True)
class Folder(ImageSettings):
    """[[data.folders]] One folder of images."""

    path: Path
    repeats: int = option(1, "How often each image is used per epoch.", minimum=1)
    weight: float | None = option(
        None,
        "The folder's share of an epoch beside that of other folders, in place of repeats: with 1 and 2, images of the "
        "second are seen twice as often in total, however many each has.",
        minimum=0.001,
    )
    batch: int | None = option(None, "Images of this folder per forward pass; default: --batch.", minimum=1)
    regularization: bool | None = option(
        None, "Images of the kind that should stay as it is; their loss counts `prior_weight`."
    )
    prior_weight: float | None = option(
        None, "How much the loss of regularization images counts; default: 1.", minimum=0
    )

    def filled(self, shared: ImageSettings) -> Self:
        """This folder with what it leaves unset as in `shared`, then as in DEFAULTS."""
        names = [f.name for f in dataclasses.fields(ImageSettings)]
        values = ((name, _first(getattr(self, name), getattr(shared, name), DEFAULTS.get(name))) for name in names)
        return replace(self, **dict(values))

    def plain(self) -> Self:
        """This folder (filled) without random variants; of wildcards, one caption is drawn."""
        images = {"flip": False, "random_crop": False, "color_augment": False, "variants": 1}
        captions = {"shuffle_tags": False, "keep_tokens": 0, "tag_dropout": 0.0}
        return replace(self, **images, **captions, caption_dropout=0.0, caption_dropout_epochs=0)


T = TypeVar("T")


def _first(*values: T) -> T | None:
    return next((value for value in values if value is not None), None)
