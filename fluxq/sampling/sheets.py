"""PNG files that contain their settings, and sheets of labeled images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from fluxq.data.crops import Font, wrapped
from fluxq.formats.atomic import atomic_path

from .requests import Request


def save_image(image: Image.Image, path: Path, request: Request | None = None, **facts: str) -> None:
    """Save `image` as PNG, with the request and `facts` in its metadata."""
    info = PngInfo()
    if request is not None:
        settings = ", ".join([request.describe(), *(f"{key}: {value}" for key, value in facts.items())])
        info.add_text("parameters", settings.encode(errors="replace").decode())  # a LoRA's name may not be UTF-8
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


def labeled_grid(
    rows: Sequence[Sequence[Image.Image]], row_labels: Sequence[str], column_labels: Sequence[str]
) -> Image.Image:
    """Images in rows and columns, with a label left of each row and above each column. Long labels wrap."""
    cell_w, cell_h = (max(image.size[axis] for row in rows for image in row) for axis in (0, 1))
    scale = max(1, round(160 / cell_w))  # small images are enlarged
    cell_w, cell_h, gap = cell_w * scale, cell_h * scale, 6
    font = ImageFont.load_default(max(12, min(cell_w // 12, 28)))
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    margin_w = max(cell_w * 2 // 3, 90)
    columns = [_wrapped(label, font, cell_w) for label in column_labels]
    top = max(int(measure.multiline_textbbox((0, 0), label, font=font)[3]) for label in columns) + 2 * gap
    sheet = Image.new(
        "RGB", (margin_w + len(columns) * (cell_w + gap) + gap, top + len(rows) * (cell_h + gap)), "white"
    )
    pen = ImageDraw.Draw(sheet)
    for c, label in enumerate(columns):
        pen.multiline_text((margin_w + c * (cell_w + gap), gap), label, "black", font)
    for r, (row, label) in enumerate(zip(rows, row_labels, strict=True)):
        y = top + r * (cell_h + gap)
        pen.multiline_text((gap, y + gap), _wrapped(label, font, margin_w - 2 * gap), "black", font)
        for c, image in enumerate(row):
            enlarged = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (margin_w + c * (cell_w + gap), y))
    return sheet


def _wrapped(text: str, font: Font, width: int) -> str:
    return "\n".join(wrapped(text, font, width))
