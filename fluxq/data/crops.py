"""A sheet of every image as training sees it: what its bucket cuts off is darkened, its caption stands below."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from .examples import Example
from .images import open_image

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
CELL, GAP, LINES = 240, 10, 4
"""Pixels of an image's longer side and between images; lines of text below each."""
COLUMNS = 6


def crop_sheet(examples: Sequence[Example]) -> Image.Image:
    """Raises the errors of `open_image`."""
    font = ImageFont.load_default(13)
    line = 17
    columns, height = min(COLUMNS, len(examples)), CELL + LINES * line + GAP
    sheet = Image.new("RGB", (GAP + columns * (CELL + GAP), GAP + math.ceil(len(examples) / columns) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for i, example in enumerate(examples):
        x, y = GAP + i % columns * (CELL + GAP), GAP + i // columns * height
        shown = _darkened(example)
        sheet.paste(shown, (x, y + CELL - shown.height))
        name = f"{example.name}, {example.bucket[0]} x {example.bucket[1]}"
        for n, text in enumerate([name, *_first(wrapped(example.caption, font, CELL), LINES - 1)]):
            pen.text((x, y + CELL + 2 + n * line), _cut(text, font), "black" if n else "#555555", font)
    return sheet


def _darkened(example: Example) -> Image.Image:
    image, (width, height) = open_image(example.path), example.resized
    scale = CELL / max(width, height)
    shown = image.resize((max(1, round(width * scale)), max(1, round(height * scale))))
    kept = [round(side * scale) for side in example.bucket]
    left, top = (shown.width - kept[0]) // 2, (shown.height - kept[1]) // 2
    box = (left, top, left + max(1, kept[0]), top + max(1, kept[1]))
    dark = Image.blend(shown, Image.new("RGB", shown.size, "#c02020"), 0.6)
    dark.paste(shown.crop(box), box[:2])
    return dark


def wrapped(text: str, font: Font, width: int) -> list[str]:
    """The words of `text` in lines of at most `width` pixels, but for a word that is wider."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _first(lines: list[str], count: int) -> list[str]:
    """The first `count` of `lines`, the last of which says if there are more."""
    return lines if len(lines) <= count else [*lines[: count - 1], f"{lines[count - 1]} ..."]


def _cut(text: str, font: Font) -> str:
    """`text`, at most as wide as an image."""
    if len(text) <= CELL and font.getlength(text) <= CELL:
        return text
    text = text[:CELL]
    return next(cut for n in range(len(text), 0, -1) if font.getlength(cut := f"{text[: n - 1]}...") <= CELL)
