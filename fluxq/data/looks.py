"""How an image looks, in a few numbers: enough to notice copies, blur, and images that are all one color."""

from __future__ import annotations

import filecmp
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from .images import MAX_PIXELS, opened, to_rgb

SIDE = 512
"""Pixels of the longer side at which an image is looked at, if it has as many."""
GRID = 12
AREAS = 3 * GRID**2
"""Bytes of their colors."""
ALIKE, COMPARED = 2.0, 4
"""Images whose GRID x GRID areas differ in color by less than that, of 255 on average, are taken for copies;
their bytes are compared with those of so many earlier ones."""
BLURRED, PLAIN = 12.0, 3.0
"""Less detail, or less contrast, than this is a finding. Ten photographs of scikit-image, at SIDE pixels, have a detail
of 33 to 170; blurred by 2 pixels, of 4 to 12.
"""


class Look(NamedTuple):
    """areas: the mean colors of GRID x GRID areas, as hexadecimal bytes. detail: the 99th percentile of the Laplacian,
    so that a sharp person before a soft background is sharp. contrast: the standard deviation of gray values, of 255.
    """

    areas: str
    detail: float
    contrast: float

    @property
    def is_plain(self) -> bool:
        return self.contrast < PLAIN

    @property
    def is_blurred(self) -> bool:
        return self.detail < BLURRED and not self.is_plain


def look_at(path: Path, max_pixels: int = MAX_PIXELS) -> Look:
    """Decodes the whole image. Raises the errors of `open_image`."""
    with opened(path, max_pixels) as image:
        image.draft("RGB", (SIDE, SIDE))  # JPEG files are decoded smaller
        colors = to_rgb(image)
    if (longer := max(colors.size)) > SIDE:
        colors = colors.resize([max(1, side * SIDE // longer) for side in colors.size], Image.Resampling.BOX)
    pixels = np.pad(np.asarray(colors.convert("L"), np.float32), 1, mode="edge")
    middle, around = pixels[1:-1, 1:-1], (pixels[:-2, 1:-1], pixels[2:, 1:-1], pixels[1:-1, :-2], pixels[1:-1, 2:])
    detail = np.percentile(np.abs(4 * middle - sum(around)), 99)
    areas = colors.resize((GRID, GRID), Image.Resampling.BOX).tobytes()
    return Look(areas.hex(), round(float(detail), 1), round(float(middle.std()), 1))


def copies(looks: Mapping[Path, Look]) -> Iterator[tuple[Path, Path, bool]]:
    """Each image that looks like an earlier one: the earlier one, it, and whether the files are equal to the byte."""
    for path, earlier in alike(looks):
        equal = next((other for other in earlier[:COMPARED] if filecmp.cmp(other, path, shallow=False)), None)
        yield equal or earlier[0], path, equal is not None


def alike(looks: Mapping[Path, Look]) -> Iterator[tuple[Path, list[Path]]]:
    """Each image that looks like earlier ones, and these."""
    told_apart = [(path, look) for path, look in looks.items() if not look.is_plain]
    colors = b"".join(bytes.fromhex(look.areas) for _, look in told_apart)
    areas = np.frombuffer(colors, np.uint8).astype(np.int16).reshape(-1, AREAS)
    means = areas.reshape(len(areas), GRID**2, 3).mean(1)  # of red, green and blue: no farther apart than the areas are
    for i, (path, _) in enumerate(told_apart[1:], 1):
        near = np.flatnonzero(np.abs(means[:i] - means[i]).mean(1) < ALIKE)
        same = near[np.abs(areas[near] - areas[i]).mean(1) < ALIKE]
        if len(same):
            yield path, [told_apart[j][0] for j in same]
